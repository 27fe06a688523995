#!/usr/bin/env python3
"""Holds Nsight Compute's counters of a run against the multiplications of its ledger's matmuls.

    ncu --clock-control none --csv --metrics METRICS flopaudit audit … --ledger run-ledger.json >run.csv
    counters.py run.csv run-ledger.json          (METRICS: counters.py --metrics)

The tensor cores work on whole tiles, so they may do more than was asked for, never less: what they
did beyond it is stated as padding. Products in f32 run on the FP32 units, as fused multiply-adds;
softmax, norms and the rest use these too, and for f32 the surplus is theirs. Exit status 1 if less
was done than the ledger says.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path

TENSOR = "sm__ops_path_tensor_src_bf16_dst_fp32.sum"
FP32 = {  # thread instructions -> operations
    "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": "ffma",
    "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": "fadd",
    "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": "fmul",
}
METRICS = ",".join([TENSOR, *FP32])


def counted(text: str) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Sums of every metric, and the same by kernel."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        sys.exit("no table of ncu --csv in it")
    sums: Counter[str] = Counter()
    kernels: dict[str, Counter[str]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        value = row["Metric Value"].replace(",", "")
        if not value.replace(".", "", 1).isdigit():
            continue  # n/a where the GPU has no such counter
        name = row["Kernel Name"].split("(")[0].split("<")[0]
        sums[row["Metric Name"]] += int(float(value))
        kernels.setdefault(name, Counter())[row["Metric Name"]] += int(float(value))
    return sums, kernels


def macs(ledger: dict) -> Counter[str]:
    """Multiply-adds of the ledger's matmuls, by element type."""
    found: Counter[str] = Counter()
    for key, calls in ledger["ledger"]:
        dims = key["op"].get("Matmul") if isinstance(key["op"], dict) else None
        if dims:
            found[key["dtype"]] += dims["b"] * dims["m"] * dims["k"] * dims["n"] * calls
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?")
    parser.add_argument("ledger", type=Path, nargs="?")
    parser.add_argument("--metrics", action="store_true", help="print what ncu is to count")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.metrics:
        print(METRICS)
        return
    if not args.csv or not args.ledger:
        parser.error("a file of ncu and a ledger are needed")
    sums, kernels = counted(args.csv.read_text(errors="replace"))
    asked = macs(json.loads(args.ledger.read_text()))
    tensor = sums[TENSOR] // 2  # an operation is a multiplication or an addition
    ffma = sum(value for metric, value in sums.items() if FP32.get(metric) == "ffma")
    print(f"ledger:       {asked['bf16']:>18,} MACs in bf16, {asked['f32']:,} in f32")
    print(f"tensor cores: {tensor:>18,} MACs in bf16"
          + (f", {100 * (tensor / asked['bf16'] - 1):.2f} % of them padding" if asked["bf16"] else ""))
    print(f"FP32 units:   {ffma:>18,} fused multiply-adds")
    for name, counts in sorted(kernels.items(), key=lambda item: -item[1][TENSOR]):
        if counts[TENSOR]:
            print(f"  {counts[TENSOR] // 2:>18,}  {name}")
    enough = tensor + ffma >= asked["bf16"] + asked["f32"]
    if args.json:
        args.json.write_text(json.dumps({
            "enough": enough, "ledger_macs": dict(asked), "tensor_macs": tensor, "counters": dict(sums),
        }, indent=2) + "\n")
    sys.exit(not enough)


if __name__ == "__main__":
    main()
