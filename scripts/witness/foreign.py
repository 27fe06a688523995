#!/usr/bin/env python3
"""Samples of what other tools write, of the preset `tiny`: tests/foreign, by the tools themselves.

In the environment of tools.py, with prometheus_client besides. Times differ from run to run, so a
rerun changes them and nothing else.
"""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import families  # sets HF_HUB_OFFLINE before transformers is imported
import torch
from calflops import calculate_flops
from deepspeed.profiling.flops_profiler import FlopsProfiler
from peft import LoraConfig, get_peft_model
from prometheus_client import CollectorRegistry, Counter, generate_latest
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

OUT = Path(__file__).resolve().parents[2] / "tests" / "foreign"
# count/src/config/presets.rs: `tiny`.
TINY = dict(model_type="qwen2", vocab_size=320, hidden_size=32, intermediate_size=48,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
            rope_parameters=families.plain(1e6))
BATCH, SEQ = 2, 12


def model(attention: str, lora: bool = False):
    made = families.build(TINY, 0).requires_grad_(True)
    made.set_attn_implementation(attention)
    if lora:
        made = get_peft_model(made, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM",
                                               target_modules=["q_proj", "v_proj"]))
    return made


def ids() -> torch.Tensor:
    return torch.tensor([families.text(320, SEQ, 1), families.text(320, SEQ, 2)])


def trainer(name: str, lora: bool) -> None:
    """Three steps of two micro-steps of two sequences, twice over twelve of them."""
    texts = [families.text(320, SEQ, seed) for seed in range(6)]
    data = [{"input_ids": text, "labels": text} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, report_to=[], per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_steps=3, logging_steps=1, save_steps=3,
            disable_tqdm=True, dataloader_drop_last=True, seed=0)
        Trainer(model("eager", lora), arguments, train_dataset=data + data).train()
        shutil.copy(Path(folder) / "checkpoint-3" / "trainer_state.json", OUT / name)


def table(attention: str, lora: bool, train: bool) -> str:
    """FlopCounterMode's own table of a forward pass or a step."""
    counted = model(attention, lora)
    counter = FlopCounterMode(display=False)
    with counter, contextlib.nullcontext() if train else torch.no_grad():
        out = counted(input_ids=ids(), labels=ids() if train else None, use_cache=False)
        if train:
            out.loss.backward()
    return counter.get_table(depth=2) + "\n"


def deepspeed(attention: str) -> None:
    profiled = model(attention)
    profiler = FlopsProfiler(profiled)
    profiler.start_profile()
    with torch.no_grad():
        profiled(input_ids=ids(), use_cache=False)
    profiler.print_model_profile(detailed=False,
                                 output_file=str(OUT / f"deepspeed_{attention}.txt"))
    profiler.end_profile()


def calflops() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        calculate_flops(model("sdpa"), kwargs={"input_ids": ids()}, print_detailed=False)
    (OUT / "calflops_sdpa.txt").write_text(printed.getvalue())


def vllm() -> None:
    """In the words of PerfMetricsProm and of the library that vLLM prints its metrics with; the
    figure is that of perf.py in tests/golden/tools.json's way: two prompts of 12 tokens, 4 new ones.
    """
    registry, labels = CollectorRegistry(), ["model_name", "engine"]
    for name, what, value in (
        ("vllm:prompt_tokens", "Number of prefill tokens processed.", 24),
        ("vllm:generation_tokens", "Number of generation tokens processed.", 8),
        ("vllm:estimated_flops_per_gpu", "Estimated number of floating point operations per GPU "
         "(for Model Flops Utilization calculations).", VLLM),
    ):
        counter = Counter(name, what, labels, registry=registry)
        counter.labels("tiny", "0").inc(value)
    (OUT / "vllm_metrics.txt").write_bytes(generate_latest(registry))


def served(batch: int, prompt: int, new: int) -> int:
    """vLLM's formula for `tiny`, by hand: 25,216 weights of layers, 10,240 of the head, two products
    of 3 layers of 32."""
    weights, head, width = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32 * 320, 2 * 3 * 32
    fed = [(prompt, prompt), *((1, prompt + i) for i in range(1, new))]
    return batch * sum(2 * (t * weights + head + t * s * width) for t, s in fed)


VLLM = served(BATCH, SEQ, 4)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    trainer("trainer_state.json", lora=False)
    trainer("trainer_state_lora.json", lora=True)
    (OUT / "torch_train_lora.txt").write_text(table("eager", lora=True, train=True))
    (OUT / "torch_forward_sdpa.txt").write_text(table("sdpa", lora=False, train=False))
    deepspeed("eager")
    deepspeed("sdpa")
    calflops()
    vllm()


if __name__ == "__main__":
    main()
