#!/usr/bin/env python3
"""Golden token ids of llama.cpp for each pre-tokenizer that `tokenizer.ggml.pre` may name.

    pretokenizers.py        writes tests/golden/pretokenizers.json

With `pip install xllamacpp gguf tokenizers numpy`. Merges are learnt from the texts below as they are, not split, so that
they reach across every border: where a pre-tokenizer puts one, other tokens come out. The ids begin with the
beginning-of-sequence token where llama.cpp adds it of itself.
"""

import json
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from bpe import byte_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "pretokenizers.json"
BOS = "<s>"
NAMES = """qwen2 qwen35 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open llama-bpe llama3 llama-v3 falcon3
pixtral midm-2.0 lfm2 smaug-bpe dbrx tekken gpt-4o llama4 kanana2 seed-coder smollm starcoder refact codeshell exaone
minerva-7b mellum2 gpt-2 phi-2 mpt olmo gigachat a.x-4.0 mellum exaone4 trillion deepseek-v3 hunyuan-dense
deepseek-coder default""".split()
# In Unicode's form C; capitals beyond ASCII, which llama.cpp takes for small letters too, are left out.
TEXTS = [
    "I'Ve  1234 ab\n\n x=$9",
    "It's WE'LL they'RE don't I'm he'd",
    "    def f(x):\r\n\t\treturn x_1 + 12345678\n\n\n",
    "camelCase HTTPServer parseXML2JSON",
    "price: $1,234.56 (50%) -- e.g. #tag @user",
    "path/to/file.rs:12\nhttps://example.org/?q=a&b=c",
    "Füße naïve cafés ½ ² ٣٤٥",
    "हिन्दी में लिखा x̂y",
    "日本語のテスト、中文测试。한국어",
    "🦀🏳️‍🌈 ok!?\n!\n",
    "a \u00a0b\u3000c\u200bd",
    " \n \n  tail   ",
    "+<=>^~|`' '' s 'x",
    "!abc ?def .ghi (jkl",
]


def learnt() -> tuple[list[str], list[str]]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1200, min_frequency=1, show_progress=False,
                                  initial_alphabet=byte_tokens(), special_tokens=[BOS], max_token_length=6)
    # Pieces too, so that merges do not all begin at a text's start.
    pieces = [text[at:at + 3] for text in TEXTS for at in range(len(text) - 1)]
    made.train_from_iterator(TEXTS + pieces, trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def write(file: Path, name: str, tokens: list[str], merges: list[str]) -> None:
    out, width = gguf.GGUFWriter(file, "qwen2"), 32
    out.add_block_count(1)
    out.add_context_length(512)
    out.add_embedding_length(width)
    out.add_feed_forward_length(width)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(name)
    out.add_token_list(tokens)
    out.add_token_merges(merges)
    out.add_token_types([gguf.TokenType.CONTROL if token == BOS else gguf.TokenType.NORMAL for token in tokens])
    out.add_bos_token_id(tokens.index(BOS))
    out.add_eos_token_id(tokens.index(BOS))
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
              "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (16, width),
              "blk.0.attn_v": (16, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (width, width),
              "blk.0.ffn_up": (width, width), "blk.0.ffn_down": (width, width)}
    for tensor, shape in shapes.items():
        out.add_tensor(f"{tensor}.weight", np.zeros(shape, np.float32))
    for tensor, size in {"attn_q": width, "attn_k": 16, "attn_v": 16}.items():
        out.add_tensor(f"blk.0.{tensor}.bias", np.zeros(size, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def ids(file: Path) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.fit_params = str(file), 256, False, False
    server = xllamacpp.Server(params)

    def one(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        asked = urllib.request.Request(f"{server.listening_address}/tokenize", body,
                                       {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            return json.load(answer)["tokens"]

    return [one(text) for text in TEXTS]


def main() -> None:
    tokens, merges = learnt()
    alike: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            file = Path(folder) / f"{name}.gguf"
            write(file, name, tokens, merges)
            alike.setdefault(json.dumps(ids(file)), []).append(name)
    made = {
        "made_by": "scripts/witness/pretokenizers.py",
        "versions": {"xllamacpp": version("xllamacpp")},
        "tokens": tokens,
        "merges": merges,
        "texts": TEXTS,
        "groups": [{"names": names, "ids": json.loads(all)} for all, names in alike.items()],
    }
    OUT.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
