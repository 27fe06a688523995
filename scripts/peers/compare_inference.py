#!/usr/bin/env python3
"""Prefill and decode here and in peers, in turns, on the same weights in float32: one table.

flopaudit, candle-transformers, PyTorch transformers, the same under FlopCounterMode, and llama.cpp
where llama-bench is installed. Each round runs every program once, so that none has a better hour.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from started import started

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--flopaudit", default="target/release/flopaudit", metavar="PROGRAM")
    option("--candle", default="target/release/examples/candle_peer", metavar="PROGRAM")
    option("--python", default="target/peers-venv/bin/python", metavar="PROGRAM")
    option("--llama-bench", default=shutil.which("llama-bench"), metavar="PROGRAM")
    option("--model", default="weights/model.gguf")
    option("--llama-model", metavar="GGUF", help="a float32 GGUF of the same weights; without it llama.cpp is left out")
    option("--prompt", type=int, default=512, help="tokens of the prompt")
    option("--steps", type=int, default=16, help="tokens after it, each at the same context")
    option("--repetitions", type=int, default=2, help="of the prompt, in each round")
    option("--rounds", type=int, default=2, help="of all programs")
    option("--threads", type=int, default=os.cpu_count())
    option("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def output(command: list[object], threads: int) -> str:
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    done = started(subprocess.run, [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{command[0]} failed")
    return done.stdout


def flopaudit(args: argparse.Namespace, _: Path) -> dict:
    def bench(*parts: object) -> dict:
        command = [args.flopaudit, "bench", *parts, "--model", args.model, "--dtype", "f32",
                   "--threads", args.threads, "--json"]
        return json.loads(output(command, args.threads))["points"][0]

    prefill = bench("prefill", "--seq", args.prompt, "--repetitions", args.repetitions)
    decode = bench("decode", "--context", args.prompt, "--repetitions", 1, "--new-tokens", args.steps)
    times = {"prefill_s": prefill["seconds"]["samples"], "decode_s": decode["seconds"]["samples"],
             "prefill_flops": prefill["flops"], "decode_flops": decode["flops"]}
    return {"flopaudit": times}


def candle(args: argparse.Namespace, _: Path) -> dict:
    command = [args.candle, args.model, args.prompt, args.repetitions, args.steps]
    return {"candle-transformers": json.loads(output(command, args.threads))}


def pytorch(args: argparse.Namespace, folder: Path) -> dict:
    out = folder / "torch.json"
    output([args.python, HERE / "inference.py", "--model", args.model, "--prompt", args.prompt,
            "--steps", args.steps, "--repetitions", args.repetitions, "--threads", args.threads,
            "--json", out], args.threads)
    found = json.loads(out.read_text())
    return {"PyTorch": found["plain"], "PyTorch + FlopCounter": found["counted"]}


def llama(args: argparse.Namespace, _: Path) -> dict:
    def bench(*parts: object) -> list[float]:
        command = [args.llama_bench, "-m", args.llama_model, "-t", args.threads, *parts, "-o", "json"]
        return json.loads(output(command, args.threads))[0]["samples_ns"]

    prefill = bench("-p", args.prompt, "-n", 0, "-r", args.repetitions)
    decode = bench("-p", 0, "-n", args.steps, "-d", args.prompt, "-r", 1)
    return {"llama.cpp": {"prefill_s": [ns / 1e9 for ns in prefill],
                          "decode_s": [ns / 1e9 / args.steps for ns in decode]}}


def table(found: dict, args: argparse.Namespace) -> str:
    def median(name: str, key: str) -> float:
        return statistics.median(found[name][key])

    lines = [f"{'':22}{'prefill s':>10}{'tokens/s':>10}{'ratio':>7}{'step ms':>10}{'tokens/s':>10}{'ratio':>7}"
             f"{'prefill FLOPs':>20}{'step FLOPs':>16}"]
    for name, times in found.items():
        prefill, decode = median(name, "prefill_s"), median(name, "decode_s")
        ratios = prefill / median("flopaudit", "prefill_s"), decode / median("flopaudit", "decode_s")
        flops = [f"{times[key]:,}" if times.get(key) else "-" for key in ("prefill_flops", "decode_flops")]
        lines.append(f"{name:22}{prefill:10.3f}{args.prompt / prefill:10.1f}{ratios[0]:7.2f}"
                     f"{1e3 * decode:10.2f}{1 / decode:10.1f}{ratios[1]:7.2f}{flops[0]:>20}{flops[1]:>16}")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    programs = [flopaudit, candle, pytorch]
    if args.llama_bench and args.llama_model:
        programs.append(llama)
    found: dict[str, dict] = {}
    for _ in range(args.rounds):
        for program in programs:
            with tempfile.TemporaryDirectory() as folder:
                for name, times in program(args, Path(folder)).items():
                    known = found.setdefault(name, {"prefill_s": [], "decode_s": []})
                    for key, value in times.items():
                        known[key] = known[key] + value if key.endswith("_s") else value
    print(f"{args.model}, float32, batch 1, {args.prompt} tokens, then one more at that context; "
          f"{args.threads} threads, medians of {args.rounds} rounds; ratio: time over flopaudit's")
    print(table(found, args))
    if args.json:
        report = {"model": args.model, "prompt": args.prompt, "threads": args.threads, "programs": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
