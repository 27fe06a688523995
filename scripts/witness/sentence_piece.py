#!/usr/bin/env python3
"""Golden token ids of SentencePiece's BPE, as Mistral and Gemma use it.

    sentence_piece.py        writes tests/golden/sentence_piece.json

With `pip install sentencepiece==0.2.3`. Two tiny models are trained on the text below; their tokens,
scores and types are written down as llama.cpp's converter writes them to a GGUF, with the ids that
SentencePiece itself gives.
"""

import io
import json
import random
from importlib.metadata import version
from pathlib import Path

import sentencepiece

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "sentence_piece.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

WORDS = """the a of and to in that it is was for on as with his they be at one have this from or had by
not but some what there we can out other were all your when up use word how said an each she which do
their time if will way about many then them would write like so these her long make thing see him two
has look more day could go come did my sound no most number who over know water than call first people
may down side been now find running cafés naïve Füße ééé aaaa aaaaa ====== 12 345 6789""".split()
TEXTS = [
    "the people would write more than one word",
    " two  spaces   and    more, then one ",
    "running    down\n\n\nthe\tside\n",
    "12 345 6789 000 aaaaaaa aaa ======= ===",
    "Füße, naïve cafés: ééééé",
    "日本語 🦀 ½ \u00a0\u3000",
    "a▁b c",
    "<tool>the</tool> <tool",
    "",
    " ",
]


def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(4000)]


def model(prefix: bool, symbols: list[str]) -> dict:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=written, model_type="bpe", vocab_size=520,
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=1.0, split_digits=True,
        allow_whitespace_only_pieces=True, user_defined_symbols=symbols, num_threads=1,
        minloglevel=2,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokens, types = [], []
    for id in range(made.get_piece_size()):
        token, kind = made.id_to_piece(id), NORMAL
        if made.is_unknown(id):
            kind = UNKNOWN
        elif made.is_control(id):
            kind = CONTROL
        elif made.is_byte(id):
            kind = BYTE
        elif token in symbols:
            # The converter writes these with spaces.
            token, kind = token.replace("▁", " "), USER_DEFINED
        tokens.append(token)
        types.append(kind)
    return {
        "add_space_prefix": prefix,
        "tokens": tokens,
        "scores": [made.get_score(id) for id in range(len(tokens))],
        "types": types,
        "texts": [{"text": text, "ids": made.encode(text), "back": made.decode(made.encode(text))}
                  for text in TEXTS],
    }


def main() -> None:
    runs = [n * char for char in ("\n", "▁") for n in range(2, 6)]
    made = {
        "made_by": "scripts/witness/sentence_piece.py",
        "versions": {"sentencepiece": version("sentencepiece")},
        "models": [model(True, []), model(False, ["<tool>", "</tool>", *runs])],
    }
    OUT.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
