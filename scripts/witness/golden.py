#!/usr/bin/env python3
"""Greedy tokens of the trained weights on a device, held against those that PyTorch gave in float32:
golden.py FLOPAUDIT… -- [--device cuda] [--dtype f32] --model FILE [--json FILE]

What stands before -- is the program, what follows are its flags. Fails where a token in f32 differs."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "logits.json"


def generated(program: list[str], flags: list[str], text: str, tokens: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [*program, "generate", text, "--raw", "--ignore-eos", "--max-new-tokens", str(tokens),
                   *flags, "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    if "--" not in sys.argv:
        sys.exit(__doc__)
    split = sys.argv.index("--")
    program, flags = sys.argv[1:split], sys.argv[split + 1:]
    out = None
    if "--json" in flags:
        at = flags.index("--json")
        out = Path(flags[at + 1])
        del flags[at:at + 2]
    exact, prompts = True, []
    for prompt in json.loads(GOLDEN.read_text())["prompts"]:
        theirs = prompt["greedy32_ids"]
        report = generated(program, flags, prompt["text"], len(theirs))
        ours = report["token_ids"]
        exact = exact and report["workload"]["dtype"] == "f32"
        # After a first token that differs, the two go on with different texts.
        alike = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(theirs))
        prompts.append({"name": prompt["name"], "prompt_tokens": report["workload"]["prompt_tokens"],
                        "tokens": len(theirs), "alike": alike, "balanced": report["balanced"]})
        print(f"{prompt['name']}: {alike} of {len(theirs)} tokens alike, {report['workload']['dtype']}, "
              f"audit {'balances' if report['balanced'] else 'DOES NOT BALANCE'}")
    agree = all(p["alike"] == p["tokens"] for p in prompts) or not exact
    if out:
        out.write_text(json.dumps({"agree": agree, "exact": exact, "prompts": prompts}, indent=1) + "\n")
    sys.exit(0 if agree and all(p["balanced"] for p in prompts) else 1)


if __name__ == "__main__":
    main()
