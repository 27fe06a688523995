#!/usr/bin/env python3
"""Writes the random weights of a preset as a GGUF for llama.cpp: synthetic_gguf.py PRESET FILE.

The weights are those of `qwen.synthetic`, matrices rounded to BF16, biases and norms in F32. It has
no tokenizer, only the vocabulary's size: llama-bench needs no more.
"""

import argparse
import os
import sys
from pathlib import Path

# gguf-py comes with llama.cpp's sources, where it is not installed.
sys.path.append(str(Path(__file__).resolve().parents[2] / "target" / "llama" / "source" / "gguf-py"))

import gguf
import torch

import qwen

# As in qwen.py, from a checkpoint's names to those of a GGUF.
LAYER = {theirs: name for name, theirs in qwen.GGUF_LAYER.items()}
TOP = {theirs: name for name, theirs in qwen.GGUF_TOP.items()}


def gguf_name(name: str) -> str:
    """A checkpoint's tensor in a GGUF: model.layers.0.self_attn.q_proj.bias is blk.0.attn_q.bias."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{LAYER[part]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def write(model: torch.nn.Module, path: Path) -> None:
    """The whole file, or none: it is renamed when it is complete."""
    config = model.config
    new = path.with_suffix(".new")
    writer = gguf.GGUFWriter(new, "qwen2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")
    for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        if parameter.dim() == 1:
            writer.add_tensor(gguf_name(name), parameter.detach().numpy())
        else:
            bits = parameter.detach().bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(gguf_name(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(new, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(qwen.PRESETS))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        write(qwen.synthetic(args.preset), args.file)
    except OSError as error:
        qwen.die(error)


if __name__ == "__main__":
    main()
