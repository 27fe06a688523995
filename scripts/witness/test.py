#!/usr/bin/env python3
"""Tests of the witnesses' parsers, on logs of real runs: see samples/README.md."""

import json
import sys
import unittest
from collections import Counter
from pathlib import Path

import counters
import cublas

SAMPLES = Path(__file__).resolve().parent / "samples"
sys.path.insert(0, str(SAMPLES.parents[1] / "cuda"))

import summary


class CublasLog(unittest.TestCase):
    def setUp(self) -> None:
        self.log = (SAMPLES / "forward.cublas").read_text()
        self.ledger = json.loads((SAMPLES / "forward.ledger").read_text())

    def test_every_product_is_in_the_ledger(self) -> None:
        ours, left_out = cublas.executed(self.ledger, [])
        theirs, functions = cublas.logged(self.log)
        self.assertEqual(ours, theirs)
        self.assertEqual(left_out, 0)
        # Three layers of seven projections and two products of attention, and the head.
        self.assertEqual(theirs.total(), 3 * 9 + 1)
        self.assertEqual(functions, Counter({"cublasGemmStridedBatchedEx": 28}))

    def test_columns_are_told_from_rows(self) -> None:
        theirs, _ = cublas.logged(self.log)
        # 64 rows of 32, times a weight (320, 32).
        self.assertEqual(theirs[1, 64, 32, 320], 1)

    def test_a_missing_call_shows(self) -> None:
        ours, _ = cublas.executed(self.ledger, [])
        cut = self.log[: self.log.rindex("I! cuBLAS (v13.1.0) function cublasStatus_t cublasGemmStridedBatchedEx")]
        theirs, _ = cublas.logged(cut)
        self.assertEqual((ours - theirs).total(), 1)

    def test_kernels_of_our_own_are_left_out_by_name(self) -> None:
        ours, left_out = cublas.executed(self.ledger, ["attention"])
        self.assertEqual((ours.total(), left_out), (3 * 7 + 1, 3 * 2))


class NcuTable(unittest.TestCase):
    def test_sums_by_metric_and_kernel(self) -> None:
        sums, kernels = counters.counted((SAMPLES / "forward.ncu").read_text())
        self.assertEqual(sums[counters.TENSOR], sum(k[counters.TENSOR] for k in kernels.values()))
        self.assertGreater(sums[counters.TENSOR], 0)
        self.assertIn("softmax_bf16_8_1_32", kernels)

    def test_the_tensor_cores_did_what_the_ledger_asks_for(self) -> None:
        sums, _ = counters.counted((SAMPLES / "forward.ncu").read_text())
        asked = counters.macs(json.loads((SAMPLES / "forward-bf16.ledger").read_text()))
        self.assertGreaterEqual(sums[counters.TENSOR] // 2, asked["bf16"])


class AgainstTheCpu(unittest.TestCase):
    def near(self, tokens: list[int], loss: float) -> bool:
        reports = {
            "text-cpu": {"token_ids": [1, 2, 3]},
            "text-no-graph": {"token_ids": tokens},
            "eval-cpu": {"evaluation": {"loss": 2.0}},
            "eval-bf16": {"evaluation": {"loss": loss}},
        }
        rows, near = summary.against_cpu(reports)
        self.assertEqual(len(rows), 2)
        return near

    def test_what_rounding_explains_is_near(self) -> None:
        self.assertTrue(self.near([1, 2, 3], 2.01))

    def test_another_token_or_loss_is_not(self) -> None:
        self.assertFalse(self.near([1, 2, 4], 2.0))
        self.assertFalse(self.near([1, 2], 2.0))
        self.assertFalse(self.near([1, 2, 3], 2.1))
        self.assertFalse(self.near([1, 2, 3], float("nan")))


if __name__ == "__main__":
    unittest.main()
