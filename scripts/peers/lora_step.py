#!/usr/bin/env python3
"""Times LoRA training steps of PyTorch and PEFT: forward, backward, AdamW."""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

import qwen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--model", type=Path, default=Path("weights/model.gguf"), metavar="DIR_OR_GGUF")
    option("--synthetic", action="store_true", help="random weights of Qwen2.5-0.5B's shapes")
    option("--rank", type=qwen.positive, default=8)
    option("--alpha", type=qwen.positive, help="default: twice the rank")
    option("--targets", type=qwen.targets, default=["q_proj", "v_proj"])
    option("--seq", type=qwen.positive, default=256)
    option("--batch", type=qwen.positive, default=1)
    option("--steps", type=qwen.positive, default=5)
    option("--warmup", type=int, default=1, help="steps that are not timed")
    option("--lr", type=float, default=1e-4)
    option("--attn", choices=["eager", "sdpa"], default="eager")
    option("--threads", type=qwen.positive, help="default: PyTorch's choice")
    option("--seed", type=int, default=0, help="of the adapter and of random tokens")
    option("--ids", type=Path, help="JSON list of token ids, repeated to fill batch x seq")
    option("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.seq < 2:
        parser.error("--seq: a next-token loss needs 2 tokens or more")
    if args.warmup < 0:
        parser.error("--warmup is negative")
    return args


def tokens(args: argparse.Namespace, vocab: int) -> torch.Tensor:
    count = args.batch * args.seq
    if args.ids is None:
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(vocab, (count,), generator=generator)
    else:
        given = qwen.read_ids(args.ids, vocab)
        ids = torch.tensor((given * (count // len(given) + 1))[:count])
    return ids.view(args.batch, args.seq)


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token; logits of every position, as transformers' own loss."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def reset_peak() -> bool:
    """Forgets the peak that loading left (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    args = arguments()
    out = qwen.open_output(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.synthetic:
        base = qwen.synthetic("qwen2.5-0.5b", args.attn)
    else:
        base = qwen.load(args.model, args.attn)
    ids = tokens(args, base.config.vocab_size)
    torch.manual_seed(args.seed)
    alpha = args.alpha or 2 * args.rank
    lora = peft.LoraConfig(
        r=args.rank, lora_alpha=alpha, target_modules=args.targets, lora_dropout=0.0,
        bias="none", task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        return loss.item()

    load_peak, of_steps = peak_rss(), reset_peak()
    for _ in range(args.warmup):
        step()
    seconds, losses = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    steps_peak = peak_rss()

    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()
    median = statistics.median(seconds)
    flops = counter.get_total_flops()
    report = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "model": "synthetic:qwen2.5-0.5b" if args.synthetic else str(args.model),
        "dtype": "float32", "attn": args.attn, "threads": torch.get_num_threads(),
        "lora": {"rank": args.rank, "alpha": alpha, "targets": args.targets},
        "trained_parameters": sum(p.numel() for p in trained),
        "batch": args.batch, "seq": args.seq, "warmup": args.warmup,
        "seconds": seconds, "losses": losses, "median_seconds": median, "fastest_seconds": min(seconds),
        "tokens_per_second": args.batch * args.seq / median,
        "flops_forward_backward": flops,
        "flops_by_op": {str(op): n for op, n in counter.get_flop_counts()["Global"].items()},
        "flop_per_second": flops / median,
        "peak_rss_bytes": steps_peak, "peak_rss_is_of": "steps" if of_steps else "loading and steps",
        "peak_rss_loading_bytes": load_peak,
    }

    mib = 2**20
    print(f"model     {report['model']}, float32, {args.attn} attention, {report['threads']} threads")
    print(f"adapters  rank {args.rank}, alpha {alpha}, {','.join(args.targets)}:"
          f" {report['trained_parameters']:,} parameters")
    print(f"tokens    batch {args.batch} x {args.seq}, {args.ids or 'random'}")
    for number, (s, loss) in enumerate(zip(seconds, losses), 1):
        print(f"  step {number}  {s:8.3f} s  loss {loss:.6f}")
    print(f"median    {median:.3f} s a step (fastest {min(seconds):.3f}), {report['tokens_per_second']:.1f} tokens/s,"
          f" {flops / median / 1e9:.1f} GFLOP/s")
    print(f"FLOPs     {flops:,} forward and backward, FlopCounterMode")
    print(f"memory    peak {steps_peak / mib:,.0f} MiB resident during {report['peak_rss_is_of']},"
          f" {load_peak / mib:,.0f} MiB until loaded")
    qwen.write_json(out, report)


if __name__ == "__main__":
    main()
