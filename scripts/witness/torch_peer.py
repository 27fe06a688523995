#!/usr/bin/env python3
"""Qwen2 of random weights in PyTorch transformers on a GPU, beside flopaudit's runs of the same
shapes: tokens per second of decoding and prefill, LoRA steps with PEFT, and the FLOPs that
FlopCounterMode saw. One JSON report; a part that fails is named in it and stops none of the others.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2ForCausalLM, StaticCache

import qwen

PARTS = ["decode-eager", "decode-sdpa", "decode-compiled", "prefill-eager", "prefill-sdpa", "lora-eager",
         "lora-sdpa", "flops"]


def model_of(args: argparse.Namespace, attn: str) -> Qwen2ForCausalLM:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    with torch.device(args.device):
        model = qwen.synthetic(args.preset, attn)
    return model.to(dtype).eval()


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def ids_of(args: argparse.Namespace, model: Qwen2ForCausalLM, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, seq), device=args.device)


@torch.inference_mode()
def decode(args: argparse.Namespace, attn: str, compiled: bool = False) -> list[dict]:
    """Greedy tokens one after another, as `generate` chooses them, after each context."""
    model = model_of(args, attn)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    results = []
    for batch, context in args.decode:
        length = context + args.tokens + 8
        cache = StaticCache(config=model.config, max_cache_len=length) if compiled else None
        out = model(input_ids=ids_of(args, model, batch, context), past_key_values=cache, use_cache=True,
                    logits_to_keep=1, cache_position=torch.arange(context, device=args.device))
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for step in range(args.tokens + 8):
            if step == 8:  # warm
                synchronize(args)
                start = time.perf_counter()
            position = torch.tensor([context + step], device=args.device)
            out = forward(input_ids=token, past_key_values=cache, use_cache=True, cache_position=position)
            token = out.logits[:, -1:].argmax(-1).clone()
        synchronize(args)
        seconds = (time.perf_counter() - start) / args.tokens
        results.append({"batch": batch, "context": context, "ms": 1e3 * seconds,
                        "tokens_per_s": batch / seconds})
    return results


@torch.inference_mode()
def prefill(args: argparse.Namespace, attn: str) -> list[dict]:
    model = model_of(args, attn)
    results = []
    for batch, seq in args.prefill:
        try:
            ids = ids_of(args, model, batch, seq)
            samples = []
            for _ in range(args.repetitions + 1):
                synchronize(args)
                start = time.perf_counter()
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                out.logits.argmax(-1).tolist()
                samples.append(time.perf_counter() - start)
                del out
            seconds = statistics.median(samples[1:])
            results.append({"batch": batch, "seq": seq, "ms": 1e3 * seconds,
                            "tokens_per_s": batch * seq / seconds})
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            results.append({"batch": batch, "seq": seq, "failed": "out of memory"})
    return results


def lora(args: argparse.Namespace, attn: str) -> list[dict]:
    import peft

    model = model_of(args, attn)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=args.device == "cuda")
    results = []
    for batch, seq in args.lora:
        ids = ids_of(args, model, batch, seq)
        samples = []
        for _ in range(args.repetitions + 2):
            synchronize(args)
            start = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            del logits
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            samples.append(time.perf_counter() - start)
        seconds = statistics.median(samples[2:])
        results.append({"batch": batch, "seq": seq, "ms": 1e3 * seconds,
                        "tokens_per_s": batch * seq / seconds})
    return results


@torch.inference_mode()
def flops(args: argparse.Namespace) -> list[dict]:
    """FLOPs of one forward pass over every position, by PyTorch's own counter."""
    model = model_of(args, "eager")
    results = []
    for batch, seq in args.flops:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids_of(args, model, batch, seq), use_cache=False)
        results.append({"batch": batch, "seq": seq, "flops": counter.get_total_flops()})
    return results


def shapes(text: str) -> list[tuple[int, int]]:
    return [tuple(int(n) for n in pair.split("x")) for pair in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--device", default="cuda", choices=["cuda", "cpu"])
    option("--preset", default="qwen2.5-0.5b", choices=sorted(qwen.PRESETS))
    option("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    option("--decode", type=shapes, default=shapes("1x128,8x128,64x128,1x2048"), metavar="BATCHxCONTEXT,…")
    option("--prefill", type=shapes, default=shapes("1x2048,8x2048"), metavar="BATCHxSEQ,…")
    option("--lora", type=shapes, default=shapes("16x512"), metavar="BATCHxSEQ,…")
    option("--flops", type=shapes, default=shapes("2x128"), metavar="BATCHxSEQ,…")
    option("--tokens", type=qwen.positive, default=64)
    option("--repetitions", type=qwen.positive, default=5)
    option("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    out = qwen.open_output(args.json)
    report = {"torch": torch.__version__, "preset": args.preset,
              "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    failed = False
    for part in args.parts.split(","):
        kind, _, attn = part.partition("-")
        try:
            match kind:
                case "decode" if attn == "compiled":
                    report[part] = decode(args, "sdpa", compiled=True)
                case "decode":
                    report[part] = decode(args, attn)
                case "prefill":
                    report[part] = prefill(args, attn)
                case "lora":
                    report[part] = lora(args, attn)
                case "flops":
                    report[part] = flops(args)
                case _:
                    parser.error(f"--parts: no part `{part}`")
        except Exception as error:  # PyTorch's versions differ; the others still run
            report[part] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            failed = True
        print(part, json.dumps(report[part]), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")  # what is there if time runs out
    qwen.write_json(out, report)
    sys.exit(failed)


if __name__ == "__main__":
    main()
