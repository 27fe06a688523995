#!/usr/bin/env python3
"""Golden token ids of transformers for each kind of post-processor that a tokenizer.json may have.

    framing.py        writes tests/golden/framing.json

With `pip install transformers`. The tokenizer is that of tests/checkpoints: bytes, and two special tokens.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from bpe import byte_tokens
from transformers import AutoTokenizer

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "framing.json"
BOS, EOS = ("<|im_start|>", 256), ("<|im_end|>", 257)
TEXTS = ["Hi", "", "<|im_start|>Hi<|im_end|>", " a\n"]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def template(*pieces: str) -> dict:
    one = {"A": {"Sequence": {"id": "A", "type_id": 0}}}
    special = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (BOS, EOS)}
    single = [one.get(piece, {"SpecialToken": {"id": piece, "type_id": 0}}) for piece in pieces]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {name: special[name] for name in pieces if name != "A"}}


PROCESSORS = [
    None,
    BYTES,
    template("A"),
    template(BOS[0], "A"),
    template("A", EOS[0]),
    template(BOS[0], "A", EOS[0]),
    template(BOS[0], BOS[0], "A"),
    {"type": "Sequence", "processors": [BYTES, template(BOS[0], "A")]},
    {"type": "Sequence", "processors": [template(BOS[0], "A"), template("A", EOS[0])]},
    {"type": "BertProcessing", "sep": list(EOS), "cls": list(BOS)},
    {"type": "RobertaProcessing", "sep": list(EOS), "cls": list(BOS), "trim_offsets": True, "add_prefix_space": False},
]


def ids(processor: dict | None) -> list[list[int]]:
    added = [{"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for name, id in (BOS, EOS)]
    vocab = {token: id for id, token in enumerate(sorted(byte_tokens()))}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": BYTES, "decoder": BYTES,
                 "post_processor": processor, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS[0], "eos_token": EOS[0]}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        made = AutoTokenizer.from_pretrained(folder)
        return [made(text)["input_ids"] for text in TEXTS]


def main() -> None:
    made = {
        "made_by": "scripts/witness/framing.py",
        "versions": {"transformers": version("transformers")},
        "texts": TEXTS,
        "processors": [{"post_processor": processor, "ids": ids(processor)} for processor in PROCESSORS],
    }
    OUT.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
