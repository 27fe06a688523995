#!/usr/bin/env python3
"""One LoRA step here and in PyTorch+PEFT, in turns, on the same weights: seconds, memory, FLOPs."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from started import started

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--flopaudit", default="target/release/flopaudit", metavar="PROGRAM")
    option("--python", default="target/peers-venv/bin/python", metavar="PROGRAM")
    option("--model", default="weights/model.gguf")
    option("--data", default="examples/alice.txt")
    option("--rank", type=int, default=8)
    option("--seq", type=int, default=256)
    option("--batch", type=int, default=1)
    option("--steps", type=int, default=5)
    option("--rounds", type=int, default=2, help="of both programs")
    option("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run(command: list[str]) -> int:
    """Runs to the end; peak resident bytes."""
    child = started(subprocess.Popen, command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(args: argparse.Namespace, folder: Path) -> dict:
    out = folder / "run"
    command = [
        args.flopaudit, "train", "--model", args.model, "--data", args.data, "--out", str(out),
        "--seq", str(args.seq), "--batch", str(args.batch), "--lora-rank", str(args.rank),
        "--steps", str(args.steps + 1), "--check-gradients", "0", "--prices", "matmul",
    ]
    peak = run(command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((out / "run.json").read_text())
    seconds = [line["seconds"] for line in lines][1:]  # the first step warms up
    flops = report["executed_flops"] // (args.steps + 1)
    return {"seconds": seconds, "peak": peak, "flops": flops, "audited": report["balanced"]}


def pytorch(args: argparse.Namespace, folder: Path) -> dict:
    out = folder / "torch.json"
    command = [
        args.python, str(HERE / "lora_step.py"), "--model", args.model, "--rank", str(args.rank),
        "--seq", str(args.seq), "--batch", str(args.batch), "--steps", str(args.steps),
        "--json", str(out),
    ]
    run(command)
    report = json.loads(out.read_text())
    peak = report["peak_rss_bytes"]
    return {"seconds": report["seconds"], "peak": peak, "flops": report["flops_forward_backward"]}


def main() -> None:
    args = arguments()
    found = {"flopaudit": [], "PyTorch + PEFT": []}
    for _ in range(args.rounds):
        for name, program in (("flopaudit", ours), ("PyTorch + PEFT", pytorch)):
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(program(args, Path(folder)))
    print(f"LoRA step, rank {args.rank}, batch {args.batch} x {args.seq} tokens, f32, {os.cpu_count()} cores")
    print(f"{'':16}{'median s':>10}{'fastest s':>11}{'tokens/s':>10}{'peak GB':>9}{'matmul FLOPs':>18}")
    medians = {}
    for name, runs in found.items():
        seconds = [s for one in runs for s in one["seconds"]]
        medians[name] = statistics.median(seconds)
        peak = max(one["peak"] for one in runs) / 1e9
        speed = args.batch * args.seq / medians[name]
        print(f"{name:16}{medians[name]:10.3f}{min(seconds):11.3f}{speed:10.1f}{peak:9.2f}{runs[0]['flops']:18,}")
    print(f"PyTorch's median is {medians['PyTorch + PEFT'] / medians['flopaudit']:.2f} times flopaudit's")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
