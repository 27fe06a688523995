#!/usr/bin/env python3
"""What other tools count of the tiny models of families.py: profilers, transformers' Trainer,
torchtitan's and MaxText's formulas. Writes tests/golden/tools.json.

    tools.py [--maxtext CHECKOUT] [--vllm CHECKOUT]

In the environment that scripts/peers/setup.sh makes, with these besides, all of PyPI:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    pip install calflops==0.3.2 fvcore==0.1.5.post20221221 ptflops==0.7.5 accelerate
    pip install --no-deps torchtitan==0.3.0

MaxText's and vLLM's own code is run from a checkout, without what it imports; its figures are kept
from the last run where none is given.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import families  # sets HF_HUB_OFFLINE before transformers is imported
import torch
from calflops import calculate_flops
from deepspeed.profiling.flops_profiler import FlopsProfiler
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from torch import nn
from transformers import Trainer, TrainingArguments

OUT = families.OUT.parent / "tools.json"
BATCH, SEQ, PAST = 2, 12, 9
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "calflops", "fvcore", "ptflops",
            "torchtitan")

logging.disable(logging.WARNING)


def deepspeed(model: nn.Module, ids: torch.Tensor) -> int:
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    total = profiler.get_total_flops()
    profiler.end_profile()
    return total


def calflops(model: nn.Module, ids: torch.Tensor) -> int:
    return calculate_flops(model, kwargs={"input_ids": ids}, print_results=False,
                           output_as_string=False)[0]


class Logits(nn.Module):
    """What fvcore can trace: one tensor in, one out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def fvcore(model: nn.Module, ids: torch.Tensor) -> int:
    analysis = FlopCountAnalysis(Logits(model), ids)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def ptflops(model: nn.Module, ids: torch.Tensor) -> int:
    def given(_):
        return {"input_ids": ids, "use_cache": False}

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(get_model_complexity_info(model, (SEQ,), input_constructor=given,
                                             as_strings=False, print_per_layer_stat=False)[0])


def trainer(model: nn.Module, ids: torch.Tensor) -> int:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to=[])
        return Trainer(model, arguments).floating_point_ops({"input_ids": ids})


def torchtitan(model: nn.Module) -> int:
    """Of a whole training step; torchtitan looks for embeddings among a model's children."""
    path = importlib.util.find_spec("torchtitan").submodule_search_locations[0]
    name = "get_dense_model_nparams_and_flops"
    count = functions(Path(path) / "models" / "utils.py", [name], {"torch": torch, "nn": nn})[name]
    flat, config = nn.Module(), model.config
    for part, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        flat.add_module(part, module)
    tied = config.tie_word_embeddings
    width = config.head_dim if getattr(config, "head_dim", None) else (
        config.hidden_size // config.num_attention_heads)
    _, per_token = count(flat, config.num_hidden_layers, config.num_attention_heads, 2 * width, SEQ,
                         enable_weight_tying=tied)
    return per_token * BATCH * SEQ


def functions(path: Path, names: list[str], known: dict) -> dict:
    """These of a file, without the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(tree.body) == len(names), f"{path}: not all of {names}"
    exec(compile(tree, str(path), "exec"), known)
    return known


def maxtext(checkout: Path, config) -> float:
    """TFLOPs of a training step of one device, in FLOPs."""
    path = checkout / "src/maxtext/utils/maxtext_utils.py"
    class Blocks:  # every name is its own value
        def __getattr__(self, name: str) -> str:
            return name

    main = "calculate_tflops_training_per_device"
    names = [main, "calculate_ffn_mamtul_tflops_per_device",
             "calculate_mixed_attention_model_tflops_training_per_device"]
    count = functions(path, names, {"DecoderBlockType": Blocks()})[main]
    gemma = config.model_type == "gemma3_text"
    width = config.head_dim if getattr(config, "head_dim", None) else (
        config.hidden_size // config.num_attention_heads)
    total, _, _ = count(types.SimpleNamespace(
        num_experts=1, decoder_block="GEMMA3" if gemma else "LLAMA2", attention_type="global",
        mlp_dim=config.intermediate_size, emb_dim=config.hidden_size, mlp_activations=["silu", "x"],
        per_device_batch_size=BATCH, max_target_length=SEQ, num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_dim=width, vocab_size=config.vocab_size,
        num_decoder_layers=config.num_hidden_layers, share_kv_projections=False,
        sliding_window_size=config.sliding_window if gemma else 0, engram_layers=[],
        use_multimodal=False, use_dpo=False, gradient_accumulation_steps=1), log=False)
    return round(total * 1e12)


def vllm(checkout: Path, config) -> dict[str, int]:
    """Of a prompt, and of a token after it."""
    perf = load_perf(checkout / "vllm/v1/metrics/perf.py")
    width = config.head_dim if getattr(config, "head_dim", None) else (
        config.hidden_size // config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or []
    windowed = sum("sliding" in kind for kind in kinds)
    if config.model_type == "mistral" and config.sliding_window:
        windowed = config.num_hidden_layers
    sizes = dict(num_hidden_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
                 weight_byte_size=4, activation_byte_size=4, tp_size=1, pp_size=1)
    parts = [
        perf.AttentionMetrics(num_attention_heads=config.num_attention_heads,
                              num_key_value_heads=config.num_key_value_heads, head_dim=width,
                              cache_byte_size=4, num_swa_layers=windowed,
                              sliding_window=config.sliding_window if windowed else None, **sizes),
        perf.FfnMetrics(ffn_tp_size=1, ffn_ep_size=1, intermediate_size=config.intermediate_size,
                        num_moe_layers=0, **sizes),
        perf.UnembedMetrics(vocab_size=config.vocab_size, **sizes),
    ]

    def total(tokens: int, context: int, is_prefill: bool) -> int:
        scheduled = perf.ExecutionContext()
        for _ in range(BATCH):
            scheduled.add(tokens, context, is_prefill)
        return sum(part.get_num_flops(scheduled) for part in parts)

    return {"prompt": total(SEQ, SEQ, True), "chunk": total(SEQ, SEQ + PAST, True),
            "token": total(1, SEQ + 1, False)}


def load_perf(path: Path):
    """vLLM's module with stand-ins for what it imports of vLLM."""
    def stub(name: str, **members) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)

    for name in ("vllm", "vllm.utils", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched",
                 "vllm.v1.metrics"):
        stub(name)
    stub("vllm.envs")
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    stub("vllm.config", VllmConfig=object)
    stub("vllm.logger", init_logger=logging.getLogger)
    stub("vllm.utils.torch_utils", STR_DTYPE_TO_TORCH_DTYPE={}, get_dtype_size=None,
         get_kv_cache_torch_dtype=None)
    stub("vllm.v1.core.sched.output", SchedulerOutput=object)
    stub("vllm.v1.metrics.utils", create_metric_per_engine=None)
    spec = importlib.util.spec_from_file_location("perf", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["perf"] = module
    spec.loader.exec_module(module)
    return module


def counted(name: str) -> dict:
    seed, targets, _, settings = families.CONFIGS[name]
    answer = {}
    for trained in ("full", "lora"):
        found = {}
        for attention in ("eager", "sdpa"):
            model = families.build(settings, seed)
            model.set_attn_implementation(attention)
            if trained == "lora":
                model = families.adapt(model, targets, seed)
            vocab = model.config.vocab_size
            ids = torch.tensor([families.text(vocab, SEQ, seed + 1),
                                families.text(vocab, SEQ, seed + 2)])
            found[attention] = {tool.__name__: tool(model, ids)
                                for tool in (deepspeed, calflops, fvcore, ptflops)}
            found["hf-trainer"] = trainer(model, ids)
        answer[trained] = found
    answer["full"]["torchtitan"] = torchtitan(families.build(settings, seed))
    return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--maxtext", type=Path)
    parser.add_argument("--vllm", type=Path)
    options = parser.parse_args()
    last = json.loads(OUT.read_text())["models"] if OUT.exists() else {}
    models = {}
    for name in families.CONFIGS:
        models[name] = counted(name)
        seed, _, _, settings = families.CONFIGS[name]
        config = families.build(settings, seed).config
        for tool, checkout in ((maxtext, options.maxtext), (vllm, options.vllm)):
            kept = last.get(name, {}).get(tool.__name__)
            found = tool(checkout, config) if checkout else kept
            if found is not None:
                models[name][tool.__name__] = found
    golden = {
        "versions": {package: version(package) for package in PACKAGES},
        "what": f"batch {BATCH}, {SEQ} tokens each; profilers: a forward pass with logits of all "
                "positions; hf-trainer, torchtitan, maxtext: a training step; vllm: a prompt, as "
                f"many tokens after {PAST}, a token after the prompt",
        "models": models,
    }
    OUT.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
