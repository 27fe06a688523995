#!/usr/bin/env python3
"""The table of a folder that scripts/gpu-session.sh filled: summary.py DIR."""

import json
import statistics
import sys
from pathlib import Path


def report(folder: Path, name: str) -> dict | None:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def main() -> None:
    folder = Path(sys.argv[1])
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    failed = [name for name, status, _ in steps if status != "0"]
    reports = {name: report(folder, name) for name, *_ in steps}
    ran = {name: r for name, r in reports.items() if r}
    balanced = [name for name, r in ran.items() if r.get("balanced")]
    print(f"{len(steps) - len(failed)} of {len(steps)} steps ran, {len(balanced)} of {len(ran)} audits balance"
          + (f"; failed: {', '.join(failed)}" if failed else ""))

    print("\n| against the CPU | CPU | device | apart |\n|---|---|---|---|")
    for kind in ("eval", "train-tiny"):
        sides = [(n, r) for n, r in ran.items() if n.startswith(kind)]
        if len(sides) < 2:
            continue
        a, b = (r["evaluation"]["loss"] if kind == "eval" else r["training"]["losses"][-1]["loss"]
                for _, r in sides[:2])
        print(f"| {'loss of an evaluation' if kind == 'eval' else 'loss after 20 steps'} | {a:.7f} | {b:.7f} | {abs(a - b):.1e} |")

    print("\n| speed | tokens/s | ms a step | FLOP/s (unit) |\n|---|---|---|---|")
    for name, r in ran.items():
        if name.startswith("decode"):
            t = r["timings"]
            per_step = 1e3 * t["decode_s"] / (len(r["token_ids"]) - 1)
            print(f"| {name} | {t['decode_tokens_per_s']:.1f} | {per_step:.2f} | {t['decode_flops_per_s']:.3g} |")
        elif name.startswith("prefill"):
            e = r["evaluation"]
            print(f"| {name} (first pass included) | {e['tokens_per_s']:.0f} | | {r['total_flops'] / e['seconds']:.3g} |")
        elif name.startswith(("lora", "full")):
            t = r["training"]
            seconds = t["step_seconds"][2:]
            median = statistics.median(seconds)
            tokens = t["tokens_per_s"] * t["seconds"] / t["steps"]
            flops = t["budget"]["next_step"]
            print(f"| {name} | {tokens / median:.0f} | {1e3 * median:.1f} | {flops / median:.3g} |")


if __name__ == "__main__":
    main()
