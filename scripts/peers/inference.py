#!/usr/bin/env python3
"""Times a prompt and further tokens in PyTorch transformers, without and with FlopCounterMode."""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import qwen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=Path("weights/model.gguf"), metavar="DIR_OR_GGUF")
    option("--synthetic", metavar="PRESET", help="random weights of a preset's shapes")
    option("--prompt", type=qwen.positive, default=512, help="tokens of the prompt")
    option("--steps", type=qwen.positive, default=16, help="tokens after it, each at the same context")
    option("--repetitions", type=qwen.positive, default=3, help="of the prompt")
    option("--attn", choices=["eager", "sdpa"], default="sdpa")
    option("--threads", type=qwen.positive, help="default: PyTorch's choice")
    option("--json", type=Path, metavar="FILE")
    return parser.parse_args()


@torch.inference_mode()
def measure(model: torch.nn.Module, args: argparse.Namespace, counted: bool) -> dict:
    """Seconds of each prefill and each step; the first of each warms up and is not among them."""
    vocab = model.config.vocab_size
    ids = torch.tensor([[i * 7919 % vocab for i in range(args.prompt)]])
    token = torch.tensor([[1]])

    def timed(ids: torch.Tensor, cache: DynamicCache) -> tuple[float, int]:
        start = time.perf_counter()
        with FlopCounterMode(display=False) if counted else nullcontext() as counter:
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start
        return seconds, counter.get_total_flops() if counted else 0

    prefill, decode = [], []
    for _ in range(args.repetitions + 1):
        cache = DynamicCache(config=model.config)
        prefill.append(timed(ids, cache))
    for _ in range(args.steps + 1):
        decode.append(timed(token, cache))
        cache.crop(-1)  # the step before is forgotten
    return {
        "prefill_s": [s for s, _ in prefill[1:]], "decode_s": [s for s, _ in decode[1:]],
        "prefill_flops": prefill[-1][1], "decode_flops": decode[-1][1],
    }


def main() -> None:
    args = arguments()
    out = qwen.open_output(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.synthetic and args.synthetic not in qwen.PRESETS:
        qwen.die(f"`{args.synthetic}` is no preset; known: {', '.join(qwen.PRESETS)}")
    if args.synthetic:
        model = qwen.synthetic(args.synthetic, args.attn)
    else:
        model = qwen.load(args.model, args.attn)
    report = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "model": str(args.synthetic or args.model), "attn": args.attn,
        "threads": torch.get_num_threads(), "prompt": args.prompt,
        "plain": measure(model, args, counted=False),
        "counted": measure(model, args, counted=True),
    }
    for name in ("plain", "counted"):
        found = report[name]
        prefill, decode = (statistics.median(found[key]) for key in ("prefill_s", "decode_s"))
        flops = f", {found['prefill_flops']:,} and {found['decode_flops']:,} FLOPs" if name == "counted" else ""
        print(f"{name:8} prefill {prefill:.3f} s, step {1e3 * decode:.2f} ms{flops}")
    qwen.write_json(out, report)


if __name__ == "__main__":
    main()
