#!/usr/bin/env python3
"""Tests of the witnesses' parsers, on logs of real runs: see samples/README.md."""

import json
import sys
import unittest
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

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

    def test_products_of_adapters_are_joined(self) -> None:
        def key(phase: str, projection: str, part: str, m: int, k: int, n: int) -> list:
            op = {"Matmul": {"b": 1, "m": m, "k": k, "n": n}}
            scope = {"layer": 0, "module": {"Lora": [projection, part]}}
            return [{"dtype": "bf16", "op": op, "phase": phase, "scope": scope}, 2]

        ledger = {"ledger": [
            key("forward", "q_proj", "A", 64, 32, 8),
            key("forward", "v_proj", "A", 64, 32, 3),
            key("forward", "o_proj", "A", 64, 32, 8),
            key("forward", "q_proj", "B", 64, 8, 32),
            key("backward dX", "gate_proj", "A", 64, 8, 32),
            key("backward dX", "up_proj", "A", 64, 8, 32),
            key("backward dA", "gate_proj", "A", 8, 64, 32),
            key("backward dA", "up_proj", "A", 8, 64, 32),
        ]}
        alone = [(64, 32, 8), (64, 8, 32)]
        joined = [(64, 32, 11), (64, 16, 32), (16, 64, 32)]
        ours, _ = cublas.executed(ledger, [], joined=True)
        self.assertEqual(ours, Counter({(1, *product): 2 for product in alone + joined}))
        ours, _ = cublas.executed(ledger, [])
        self.assertEqual(ours.total(), 2 * 8)


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
            "text-cpu": {"sequences": [{"token_ids": [1, 2, 3]}]},
            "text-no-graph": {"sequences": [{"token_ids": tokens}]},
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


class Peers(unittest.TestCase):
    """Ours is 6.0 ms by dense attention and 5.0 ms by blocked."""

    def setUp(self) -> None:
        point = {"batch": 1, "seq": 2048, "tokens_per_s": 1.0, "flops_per_s": 1.0, "mfu_measured": None}
        reports = {
            "bench-prefill-1": {"points": [point | {"seconds": {"median": 0.006}}]},
            "bench-prefill-1-blocked": {"points": [point | {"seconds": {"median": 0.005}}]},
            "bench-qwen3-prefill": {"points": [point | {"seconds": {"median": 0.001}}]},
        }
        self.rows, self.ours = summary.benches(reports)
        self.torch = summary.of_torch({
            "torch": "2.11.0",
            "prefill-sdpa": [{"batch": 1, "seq": 2048, "ms": 24.0, "tokens_per_s": 1.0},
                             {"batch": 8, "seq": 2048, "failed": "out of memory"}],
            "prefill-compiled": [{"batch": 1, "seq": 2048, "ms": 7.5, "tokens_per_s": 1.0}],
            "decode-sdpa": [{"batch": 1, "context": 128, "ms": 80.0, "tokens_per_s": 1.0}],
            "lora-sdpa": {"failed": "RuntimeError"},
            "flops": [{"batch": 2, "seq": 128, "flops": 5}],
        })

    def test_rows_are_named_by_model_and_attention(self) -> None:
        self.assertEqual([row[0] for row in self.rows], ["prefill", "prefill blocked", "qwen3 prefill"])
        self.assertEqual(self.ours, {summary.Key("prefill", 1, 2048): {"dense": 6.0, "blocked": 5.0}})

    def test_the_ratio_is_to_the_fastest_row_of_the_same_size(self) -> None:
        self.assertEqual(summary.headline(self.torch, self.ours), [
            ["prefill", "1", "2048", "5.000", "blocked", "PyTorch", "prefill-compiled", "7.500", "1.50"]])

    def test_every_row_is_listed_and_the_launch_bound_is_marked(self) -> None:
        rows = summary.measured(self.torch, self.ours)
        self.assertEqual([row[2] for row in rows], ["prefill-sdpa", "prefill-compiled", "decode-sdpa (launch-bound)"])
        self.assertEqual([row[-1] for row in rows], ["4.00", "1.25", ""])

    def test_llama_bench(self) -> None:
        # Of what `llama-bench -o json` writes, the fields that are read.
        peers = summary.of_llama([
            {"n_prompt": 2048, "n_gen": 0, "n_depth": 0, "n_ubatch": 512, "samples_ns": [9e6, 8e6, 90e6]},
            {"n_prompt": 0, "n_gen": 32, "n_depth": 128, "n_ubatch": 512, "samples_ns": [64e6]},
        ])
        self.assertEqual([(p.key, p.ms) for p in peers], [
            (summary.Key("prefill", 1, 2048), 9.0), (summary.Key("decode", 1, 128), 2.0)])
        self.assertAlmostEqual(peers[1].tokens_per_s, 500)
        self.assertEqual([row[5] for row in summary.headline(self.torch + peers, self.ours)], ["PyTorch", "llama.cpp"])


class Sanitizer(unittest.TestCase):
    RESULT = "test result: ok. 3 passed; 0 failed"

    def test_reports_are_summed(self) -> None:
        log = f"========= COMPUTE-SANITIZER\n{self.RESULT}\n========= ERROR SUMMARY: 2 errors\n"
        self.assertEqual(summary.sanitized("sanitize-memcheck-lib", log), ["memcheck-lib", "2 reports", self.RESULT])

    def test_hazards_are_reports(self) -> None:
        log = f"{self.RESULT}\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
        self.assertEqual(summary.sanitized("sanitize-racecheck-lib", log)[1], "1 reports")

    def test_a_tool_that_did_not_end_is_not_clean(self) -> None:
        self.assertNotIn("0 reports", summary.sanitized("sanitize-synccheck-lib", "========= COMPUTE-SANITIZER\n"))


class TorchPeer(unittest.TestCase):
    """Parts that only a GPU runs at speed, on the CPU: do they compute the same?"""

    def setUp(self) -> None:
        try:
            import torch_peer
        except ImportError as error:
            self.skipTest(f"needs the environment of scripts/peers/setup.sh: {error}")
        self.peer = torch_peer
        torch_peer.torch.set_num_threads(1)
        self.args = Namespace(device="cpu", preset="tiny", tokens=4, repetitions=2, full=[(2, 16)], lora=[(2, 16)])

    def test_static_steps_choose_as_whole_passes_do(self) -> None:
        torch = self.peer.torch
        self.peer.AttentionInterface.register("packed", self.peer.packed_attention)
        with torch.inference_mode():
            model = self.peer.model_of(self.args, "sdpa")
            torch.manual_seed(1)
            decoding = self.peer.Decoding(self.args, model, 3, 70)
            chosen = decoding.chosen(decoding.recorded())
            self.assertEqual(decoding.chosen(decoding.step), chosen)
            torch.manual_seed(1)
            ids = self.peer.ids_of(self.args, model, 3, 70)
            model.config._attn_implementation = "eager"
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            for tokens in chosen:
                following = model(input_ids=ids).logits[:, -1:].argmax(-1)
                self.assertEqual(following.flatten().tolist(), tokens)
                ids = torch.cat([ids, following], 1)

    def test_masters_in_float32_change_nothing_in_float32(self) -> None:
        for part in ("full", "lora"):
            with self.subTest(part):
                losses = []
                for masters in (False, True):
                    self.peer.torch.manual_seed(0)
                    rows = getattr(self.peer, part)(self.peer.Manner(masters=masters))(self.args)
                    losses.append(rows[0]["losses"])
                self.assertEqual(*losses)

    def test_a_recorded_step_with_other_tokens_fails(self) -> None:
        def off_by_one(decoding):
            def step() -> None:
                decoding.step()
                decoding.token.add_(1).remainder_(320)
            return step

        self.args.decode = [(1, 8)]
        with mock.patch.object(self.peer.Decoding, "recorded", off_by_one), self.assertRaisesRegex(ValueError, "differ"):
            self.peer.decode_graphed(self.args)


if __name__ == "__main__":
    unittest.main()
