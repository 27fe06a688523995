#!/usr/bin/env python3
"""Tests of what the comparisons say where a program is missing."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent


class MissingProgram(unittest.TestCase):
    def test_is_one_line_and_status_2(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            missing = f"{folder}/none"
            for script in ("compare_inference.py", "compare_lora_step.py"):
                command = [sys.executable, HERE / script, "--flopaudit", missing]
                done = subprocess.run(command, capture_output=True, text=True)
                with self.subTest(script):
                    self.assertEqual(done.returncode, 2, done.stderr)
                    self.assertEqual(done.stdout, "")
                    self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
                    self.assertIn(missing, done.stderr)


if __name__ == "__main__":
    unittest.main()
