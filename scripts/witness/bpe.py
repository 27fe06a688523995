"""Byte-level BPE tokenizers as llama.cpp reads them from a GGUF: tokens, merges, types, `pre`."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: matched in the text before it is split

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# What `tokenizer.ggml.pre` names: the splits of the text, one after the other.
PRE = {
    "gpt-2": [GPT2],
    "qwen2": [QWEN2],
    "llama-bpe": [QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")],
    "smollm": [r"\p{N}", GPT2],
}


def byte_tokens() -> list[str]:
    """GPT-2's 256 characters for the bytes, in its order: those that print stand for themselves."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, prints), *(chr(256 + i) for i in range(256 - len(prints)))]


def tokenizer(tokens: list[str], merges: list[str], types: list[int], pre: str) -> Tokenizer:
    special = {t for t, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)}
    made = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        ignore_merges=pre == "llama-bpe",  # a word that is a token needs no merges
    ))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE[pre]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if t in special])
    return made
