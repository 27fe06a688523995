#!/usr/bin/env python3
"""The table of a folder that scripts/gpu-session.sh filled: summary.py DIR. Also DIR/summary.json.

Fails where the device is further from the CPU than rounding goes."""

import json
import sys
from pathlib import Path


def read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    if rows:
        print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")


def against_cpu(reports: dict[str, dict]) -> tuple[list[list[str]], bool]:
    """Rows of a table, and whether all of them are as near as they have to be."""
    rows, near = [], True
    evaluated, trained = (lambda r: r["evaluation"]["loss"]), (lambda r: r["training"]["losses"][-1]["loss"])
    for what, theirs, ours, loss, bound in [
        ("loss of an evaluation, f32", "eval-cpu", "eval-cuda", evaluated, 2e-5),
        ("loss of an evaluation, bf16", "eval-cpu", "eval-bf16", evaluated, 1e-2),
        ("loss after 20 steps, f32", "train-tiny-cpu", "train-tiny-cuda", trained, 1e-4),
    ]:
        if theirs in reports and ours in reports:
            a, b = loss(reports[theirs]), loss(reports[ours])
            near = near and abs(a - b) <= bound * a
            rows.append([what, f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.1e}, at most {bound * a:.0e}"])
    for how, theirs, ours in [
        ("recorded", "text-cpu", "text-cuda"),
        ("launch by launch", "text-cpu", "text-no-graph"),
        ("op by op", "text-cpu", "text-ops"),
        ("recorded, drawn", "drawn-cpu", "drawn-cuda"),
        ("recorded, of Qwen3's shapes", "text-qwen3-cpu", "text-qwen3-cuda"),
    ]:
        if theirs in reports and ours in reports:
            a, b = reports[theirs]["token_ids"], reports[ours]["token_ids"]
            same = sum(x == y for x, y in zip(a, b))
            near = near and a == b
            rows.append([f"tokens, f32, {how}", str(len(a)), str(len(b)), f"{len(a) - same} differ"])
    return rows, near


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def benches(reports: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, report in reports.items():
        if not name.startswith("bench-"):
            continue
        parts = name.removeprefix("bench-").split("-")
        # Of another model, its name comes first.
        kind = parts[1] if parts[0] == "qwen3" else parts[0]
        what = f"qwen3 {kind}" if parts[0] == "qwen3" else kind
        for p in report["points"]:
            energy = p.get("energy")
            rows.append([
                what, str(p["batch"]), str(p["context"] if kind == "decode" else p["seq"]),
                f"{1e3 * p['seconds']['median']:.3f}", f"{p['tokens_per_s']:,.0f}", f"{p['flops_per_s'] / 1e12:.1f}",
                share(p["mfu_measured"]), share(p.get("bandwidth_use")),
                f"{1e3 * energy['joules'] / p['tokens']:.3g}" if energy else "",
            ])
    return rows


def peers(reports: dict[str, dict], rows: list[list[str]]) -> list[list[str]]:
    ours = {(r[0], r[1], r[2]): float(r[3]) for r in rows}
    found = []
    for report in reports.values():
        for part, points in report.items():
            if not isinstance(points, list):
                continue
            for p in points:
                if "ms" not in p:
                    continue
                kind = part.split("-")[0]
                length = str(p.get("context", p.get("seq")))
                mine = ours.get((kind, str(p["batch"]), length))
                found.append([
                    part, str(p["batch"]), length, f"{p['ms']:.2f}", f"{p['tokens_per_s']:,.0f}",
                    f"{mine:.3f}" if mine else "", f"{p['ms'] / mine:.1f}" if mine else "",
                ])
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    failed = [f"{name} ({status})" for name, status, _ in steps if status != "0"]
    reports = {name: r for name, *_ in steps if (r := read(folder / f"{name}.json"))}
    # A run with a planted fault is a step that passes where its audit does not balance.
    audited = {name: r["balanced"] for name, r in reports.items()
               if r.get("balanced") is not None and not name.startswith("fault-")}
    points = [p["balanced"] for r in reports.values() for p in r.get("points", [])]
    gpu = folder / "gpu.txt"
    if gpu.is_file():
        print(f"{gpu.read_text().strip()}\n")
    print(f"{len(steps) - len(failed)} of {len(steps)} steps ran, {sum(audited.values()) + sum(points)} of "
          f"{len(audited) + len(points)} audits balance" + (f"; failed: {', '.join(failed)}" if failed else ""))
    kernels = folder / "kernels.log"
    if kernels.is_file():
        lines = [line for line in kernels.read_text().splitlines() if line.startswith("test result")]
        print(f"\nKernels against their CPU twins: {lines[-1] if lines else 'no result'}")

    compared, near = against_cpu(reports)
    table("Against the CPU", ["", "CPU", "device", "apart"], compared)
    if not near:
        print("\nThe device is further from the CPU than rounding goes.")
    if ceiling := reports.get("ceiling"):
        best = max(ceiling["matmul"], key=lambda m: m["flops_per_s"])
        print(f"\nCeilings: {best['flops_per_s'] / 1e12:.3g} TFLOP/s in {best['dtype']} (product "
              f"{best['m']} x {best['k']} x {best['n']}), {ceiling['stream']['bytes_per_s'] / 1e12:.2f} TB/s")
    rows = benches(reports)
    table("Speeds (FLOPs of matrix products; shares of the measured ceilings)",
          ["", "batch", "context or length", "ms", "tokens/s", "TFLOP/s", "MFU", "bandwidth", "mJ a token"], rows)
    generated = []
    for name, r in reports.items():
        if name.startswith("generate-"):
            tokens, t = len(r["token_ids"]), r["timings"]
            generated.append([name.removeprefix("generate-"), str(tokens),
                              f"{1e3 * t['decode_s'] / (tokens - 1):.3f}", f"{t['decode_tokens_per_s']:.0f}"])
    table("Whole generations", ["", "tokens", "ms a token", "tokens/s"], generated)

    witnesses = []
    for name, r in reports.items():
        if name.startswith("cublas-"):
            witnesses.append([name, "agree" if r["agree"] else "DIFFER", f"{r['ledger']} matmuls in the ledger, "
                              f"{r['cublas']} products logged, {r['shapes']} shapes"])
        elif name.startswith("golden-"):
            alike = ", ".join(f"{p['alike']} of {p['tokens']}" for p in r["prompts"])
            witnesses.append([name, "agree" if r["agree"] else "DIFFER", f"{alike} tokens before one that is not "
                              "PyTorch's in f32"])
        elif name.startswith("ncu-"):
            asked = r["ledger_macs"].get("bf16", 0)
            padding = 100 * (r["tensor_macs"] / asked - 1) if asked else 0
            witnesses.append([name, "agree" if r["enough"] else "LESS", f"{asked:,} MACs in the ledger, "
                              f"{r['tensor_macs']:,} on the tensor cores, {padding:.2f} % padding"])
    table("Witnesses", ["", "", ""], witnesses)
    found = peers({n: r for n, r in reports.items() if n.startswith("torch-")}, rows)
    table("PyTorch on the same device", ["", "batch", "context or length", "ms", "tokens/s", "ours, ms", "times ours"],
          found)
    for report in reports.values():
        for p in report.get("flops", []) if isinstance(report.get("flops"), list) else []:
            print(f"\nFlopCounterMode, forward of {p['batch']} x {p['seq']}: {p['flops']:,}")
    (folder / "summary.json").write_text(json.dumps(
        {"steps": steps, "benches": rows, "peers": found, "witnesses": witnesses}, indent=1) + "\n")
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main())
