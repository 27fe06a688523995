#!/usr/bin/env python3
"""The table of a folder that scripts/gpu-session.sh filled: summary.py DIR. Also DIR/summary.json.

Fails where the device is further from the CPU than rounding goes."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple


def read(file: Path) -> dict | list | None:
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
        ("loss of packed text after 6 steps, f32", "train-packed-cpu", "train-packed-cuda", trained, 1e-4),
    ]:
        if theirs in reports and ours in reports:
            a, b = loss(reports[theirs]), loss(reports[ours])
            near = near and abs(a - b) <= bound * a
            rows.append([what, f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.1e}, at most {bound * a:.0e}"])
    for how, theirs, ours in [
        ("recorded", "text-cpu", "text-cuda"),
        ("recorded, prompts of four lengths", "ragged-cpu", "ragged-cuda"),
        ("launch by launch", "text-cpu", "text-no-graph"),
        ("op by op", "text-cpu", "text-ops"),
        ("recorded, drawn", "drawn-cpu", "drawn-cuda"),
        ("recorded, of Qwen3's shapes", "text-qwen3-cpu", "text-qwen3-cuda"),
    ]:
        if theirs in reports and ours in reports:
            a, b = ([t for s in reports[name]["sequences"] for t in s["token_ids"]] for name in (theirs, ours))
            same = sum(x == y for x, y in zip(a, b))
            near = near and a == b
            rows.append([f"tokens, f32, {how}", str(len(a)), str(len(b)), f"{len(a) - same} differ"])
    return rows, near


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


class Key(NamedTuple):
    """What is compared with what: decode, prefill, lora or full, and its size."""

    kind: str
    batch: int
    length: int


def benches(reports: dict[str, dict]) -> tuple[list[list[str]], dict[Key, dict[str, float]]]:
    """Rows of a table; and milliseconds of each size of the model that peers run too, of dense attention
    and of blocked."""
    rows, ours = [], {}
    for name, report in reports.items():
        if not name.startswith("bench-"):
            continue
        parts = name.removeprefix("bench-").split("-")
        # Of another model, its name comes first.
        kind = parts[1] if parts[0] == "qwen3" else parts[0]
        attention = "blocked" if "blocked" in parts else "dense"
        what = [*(["qwen3"] if parts[0] == "qwen3" else []), kind, *(["blocked"] if attention == "blocked" else [])]
        for p in report["points"]:
            energy, length = p.get("energy"), p["context"] if kind == "decode" else p["seq"]
            ms = 1e3 * p["seconds"]["median"]
            if parts[0] != "qwen3":
                ours.setdefault(Key(kind, p["batch"], length), {})[attention] = ms
            rows.append([
                " ".join(what), str(p["batch"]), str(length),
                f"{ms:.3f}", f"{p['tokens_per_s']:,.0f}", f"{p['flops_per_s'] / 1e12:.1f}",
                share(p["mfu_measured"]), share(p.get("bandwidth_use")),
                f"{1e3 * energy['joules'] / p['tokens']:.3g}" if energy else "",
            ])
    return rows, ours


class Peer(NamedTuple):
    """One measured size of a program that is no part of this one."""

    program: str
    part: str
    key: Key
    ms: float
    tokens_per_s: float


# Each kernel of a step is launched from Python: the time is that of launching, whatever the GPU does.
LAUNCH_BOUND = ("decode-eager", "decode-sdpa")


def of_torch(report: dict) -> list[Peer]:
    """What scripts/witness/torch_peer.py measured."""
    found = []
    for part, points in report.items():
        for p in points if isinstance(points, list) else []:
            if "ms" in p:
                key = Key(part.split("-")[0], p["batch"], p.get("context", p.get("seq")))
                found.append(Peer("PyTorch", part, key, p["ms"], p["tokens_per_s"]))
    return found


def of_llama(tests: list[dict]) -> list[Peer]:
    """What `llama-bench -o json` wrote: prompts, and tokens after a context, of one sequence."""
    found = []
    for test in tests:
        ms = statistics.median(test["samples_ns"]) / 1e6
        if test["n_gen"]:
            key, ms, tokens = Key("decode", 1, test["n_depth"]), ms / test["n_gen"], 1
        else:
            key, tokens = Key("prefill", 1, test["n_prompt"]), test["n_prompt"]
        found.append(Peer("llama.cpp", f"ubatch {test['n_ubatch']}", key, ms, 1e3 * tokens / ms))
    return found


def measured(peers: list[Peer], ours: dict[Key, dict[str, float]]) -> list[list[str]]:
    """All rows of peers, beside ours of dense attention."""
    rows = []
    for peer in peers:
        mine = ours.get(peer.key, {}).get("dense")
        part = f"{peer.part} (launch-bound)" if peer.part in LAUNCH_BOUND else peer.part
        rows.append([
            peer.program, peer.key.kind, part, str(peer.key.batch), str(peer.key.length), f"{peer.ms:.2f}",
            f"{peer.tokens_per_s:,.0f}", f"{mine:.3f}" if mine else "", f"{peer.ms / mine:.2f}" if mine else "",
        ])
    return rows


def headline(peers: list[Peer], ours: dict[Key, dict[str, float]]) -> list[list[str]]:
    """Ours, by its faster attention, against the fastest row of each peer of the same kind and size."""
    rows = []
    for key in dict.fromkeys(peer.key for peer in peers):
        if key not in ours:
            continue
        attention, mine = min(ours[key].items(), key=lambda item: item[1])
        for program in dict.fromkeys(peer.program for peer in peers if peer.key == key):
            best = min((p for p in peers if (p.program, p.key) == (program, key)), key=lambda p: p.ms)
            rows.append([
                key.kind, str(key.batch), str(key.length), f"{mine:.3f}", attention, program, best.part,
                f"{best.ms:.3f}", f"{best.ms / mine:.2f}",
            ])
    return rows


# The last line of each of compute-sanitizer's tools.
SANITIZED = re.compile(r"^========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE)


def sanitized(name: str, log: str) -> list[str]:
    """What a tool reported, and how the tests went that it watched."""
    found = [int(errors or hazards) for errors, hazards in SANITIZED.findall(log)]
    tests = [line for line in log.splitlines() if line.startswith("test result")]
    return [name.removeprefix("sanitize-"), f"{sum(found)} reports" if found else "no summary: it did not end",
            tests[-1] if tests else "no result"]


def main() -> int:
    folder = Path(sys.argv[1])
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    done = [name for name, status, _ in steps if status == "0"]
    skipped = [name for name, status, _ in steps if status == "skipped"]
    failed = [f"{name} ({status})" for name, status, _ in steps if status not in ("0", "skipped")]
    written = {name: r for name, *_ in steps if (r := read(folder / f"{name}.json"))}
    reports = {name: r for name, r in written.items() if isinstance(r, dict)}
    # A run with a planted fault is a step that passes where its audit does not balance.
    audited = {name: r["balanced"] for name, r in reports.items()
               if r.get("balanced") is not None and not name.startswith("fault-")}
    points = [p["balanced"] for r in reports.values() for p in r.get("points", [])]
    gpu = folder / "gpu.txt"
    if gpu.is_file():
        print(f"{gpu.read_text().strip()}\n")
    print(f"{len(done)} of {len(steps)} steps ran, {sum(audited.values()) + sum(points)} of "
          f"{len(audited) + len(points)} audits balance" + (f"; failed: {', '.join(failed)}" if failed else ""))
    for name in skipped:
        print(f"\nSkipped: {name}: {(folder / f'{name}.log').read_text().strip().splitlines()[-1]}")
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
    rows, ours = benches(reports)
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
    table("compute-sanitizer", ["tool and tests", "", "tests"],
          [sanitized(name, (folder / f"{name}.log").read_text()) for name, status, _ in steps
           if name.startswith("sanitize-") and status not in ("late", "skipped")])
    peers = [p for name, r in written.items() if name.startswith("torch-") for p in of_torch(r)]
    peers += [p for name, r in written.items() if name.startswith("llama-") for p in of_llama(r)]
    fastest, found = headline(peers, ours), measured(peers, ours)
    table("Against the fastest of each peer on the same device", ["", "batch", "context or length", "ours, ms",
          "attention", "peer", "its fastest", "ms", "times ours"], fastest)
    table("Peers on the same device, all that was measured (ours: dense attention)", ["", "", "", "batch",
          "context or length", "ms", "tokens/s", "ours, ms", "times ours"], found)
    for report in reports.values():
        for p in report.get("flops", []) if isinstance(report.get("flops"), list) else []:
            print(f"\nFlopCounterMode, forward of {p['batch']} x {p['seq']}: {p['flops']:,}")
    (folder / "summary.json").write_text(json.dumps(
        {"steps": steps, "benches": rows, "fastest": fastest, "peers": found, "witnesses": witnesses}, indent=1) + "\n")
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main())
