#!/usr/bin/env python3
"""Holds the products that cuBLAS logged of a run against the matmuls of its ledger, one to one.

    CUBLAS_LOGINFO_DBG=1 CUBLAS_LOGDEST_DBG=run.log flopaudit audit … --ledger run-ledger.json
    cublas.py run.log run-ledger.json

A product (m×k)·(k×n) of b batches is a call with the same b, k, n and m: cuBLAS counts by columns,
so that its m is our n. Attention in one kernel (bf16, no gradient wanted, no --op-times) and
decoding of up to 8 sequences do not go through cuBLAS: --own NAMES leaves out matmuls of these
scopes' phases, and says how many. Adapters beside one input share the products of their A where
these lie together (bf16): --joined counts those of a layer's q, k and v, and of its gate and up, as
one each. Exit status 1 if the two differ.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

CALL = re.compile(r"function\s+\S+\s+(\w*[gG]emm\w*)\(")
FIELD = re.compile(r"^[iI]!\s+(\w+): type=.*?; val=([^\s(]+)")

Product = tuple[int, int, int, int]  # b, m, k, n

# What reads one input, by the name of a projection.
INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
# Along which of a product's dimensions the ranks of adapters lie, by phase; in all others n.
RANKS = {"backward dA": "m", "backward dX": "k"}


def logged(text: str) -> tuple[Counter[Product], Counter[str]]:
    """The products of a cuBLAS log, and the functions that ran them."""
    products: Counter[Product] = Counter()
    functions: Counter[str] = Counter()
    call: dict[str, str] | None = None

    def finish() -> None:
        if call is None:
            return
        batch = int(call.get("batchCount", 1))
        m, n, k = (int(call[key]) for key in ("m", "n", "k"))
        products[batch, n, k, m] += 1
        functions[call["function"]] += 1

    for line in text.splitlines():
        if "function" in line and " called" in line:
            finish()
            found = CALL.search(line)
            call = {"function": found[1]} if found else None
        elif call is not None and (field := FIELD.match(line)):
            call.setdefault(field[1], field[2])
    finish()
    return products, functions


def executed(ledger: dict, own: list[str], joined: bool = False) -> tuple[Counter[Product], int]:
    """The matmuls of a ledger, and how many are left out as kernels of our own."""
    products: Counter[Product] = Counter()
    together: dict[tuple, list[tuple[dict, int]]] = defaultdict(list)
    left_out = 0
    for key, calls in ledger["ledger"]:
        dims = key["op"].get("Matmul") if isinstance(key["op"], dict) else None
        if dims is None:
            continue
        attention = key["scope"]["module"] == "SelfAttn" and not key["phase"].startswith("backward")
        if ("attention" in own and attention) or ("decode" in own and key["phase"] == "decode"):
            left_out += calls
        elif joined and (place := of_a(key)):
            along = RANKS.get(key["phase"], "n")
            size = tuple(dims[side] for side in "bmkn" if side != along)
            together[along, size, place].append((dims, calls))
        else:
            products[dims["b"], dims["m"], dims["k"], dims["n"]] += calls
    for (along, *_), parts in together.items():
        one = parts[0][0] | {along: sum(dims[along] for dims, _ in parts)}
        products[one["b"], one["m"], one["k"], one["n"]] += parts[0][1]
    return products, left_out


def of_a(key: dict) -> tuple | None:
    """Which products of adapters' A, beside one input, the op belongs to."""
    match key["scope"]["module"]:
        case {"Lora": [str(projection), "A"]} if projection in INPUTS:
            return key["phase"], key["scope"]["layer"], INPUTS[projection]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--own", default="", metavar="NAMES", help="attention,decode: not by cuBLAS")
    parser.add_argument("--joined", action="store_true", help="adapters share products of their A")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    ours, left_out = executed(json.loads(args.ledger.read_text()), args.own.split(","), args.joined)
    theirs, functions = logged(args.log.read_text(errors="replace"))
    differing = sorted(p for p in ours | theirs if ours[p] != theirs[p])
    for b, m, k, n in differing[:20]:
        p = (b, m, k, n)
        print(f"b={b} m={m} k={k} n={n}: ledger {ours[p]}, cuBLAS {theirs[p]}")
    macs = sum(b * m * k * n * calls for (b, m, k, n), calls in theirs.items())
    agree = not differing
    print(f"{'agree' if agree else 'DIFFER'}: {ours.total()} matmuls in the ledger, {theirs.total()} "
          f"products in cuBLAS's log ({len(theirs)} shapes, {macs:,} MACs)"
          + (f"; {left_out} more by kernels of our own" if left_out else ""))
    if args.json:
        args.json.write_text(json.dumps({
            "agree": agree, "ledger": ours.total(), "cublas": theirs.total(), "macs": macs,
            "shapes": len(theirs), "own_kernels": left_out, "functions": dict(functions),
        }, indent=2) + "\n")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
