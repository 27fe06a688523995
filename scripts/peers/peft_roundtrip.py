#!/usr/bin/env python3
"""Holds an adapter directory against PEFT: its keys, its tensors, and the loss that it gives.

--adapter takes a directory that flopaudit saved. --make has PEFT save one (random A and B), for
flopaudit to load and to be held against the loss printed here.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import qwen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=Path, metavar="DIR",
                       help="adapter_config.json and adapter_model.safetensors")
    which.add_argument("--make", type=Path, metavar="DIR",
                       help="a new directory for an adapter that PEFT makes")
    option("--model", type=Path, default=Path("weights/model.gguf"), metavar="DIR_OR_GGUF")
    option("--make-base", action="store_true",
           help="make a tiny random base in --model first, which must be new")
    option("--ids", type=Path, default=Path("tests/golden/lora_grads.json"), metavar="FILE",
           help="JSON list of token ids, or an object with `token_ids` (default: the golden text)")
    option("--rank", type=qwen.positive, default=4, help="with --make")
    option("--alpha", type=qwen.positive, default=8, help="with --make")
    option("--targets", type=qwen.targets, default=["q_proj", "v_proj"], help="with --make")
    option("--seed", type=int, default=0, help="with --make and --make-base")
    option("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.make and args.make.exists():
        parser.error(f"{args.make}: exists; --make wants a new directory")
    if args.make_base and args.model.exists():
        parser.error(f"{args.model}: exists; --make-base wants a new directory")
    return args


def make(base: torch.nn.Module, args: argparse.Namespace) -> None:
    """A PEFT adapter whose A and B are random: with the usual B of zeros it would change nothing."""
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_modules=args.targets, lora_dropout=0.0,
        bias="none", task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(args.seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    model.save_pretrained(args.make, save_embedding_layers=False)
    model.unload()


def attach(base: torch.nn.Module, directory: Path) -> peft.PeftModel:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            qwen.die(f"{directory / name}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys and unknown options
        try:
            return peft.PeftModel.from_pretrained(base, directory).eval()
        except Exception as error:
            qwen.die(f"{directory}: PEFT does not take it: {type(error).__name__}: {error}")


def differences(model: peft.PeftModel, directory: Path) -> tuple[int, list[str]]:
    """How many tensors the file has, and each that the model lacks, adds or holds otherwise."""
    file = load_file(directory / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    found = [f"missing from the file: {name}" for name in sorted(loaded.keys() - file.keys())]
    found += [f"unexpected in the file: {name}" for name in sorted(file.keys() - loaded.keys())]
    for name in sorted(file.keys() & loaded.keys()):
        if not torch.equal(file[name].double(), loaded[name].double()):
            found.append(f"another value in the model: {name}")
    return len(file), found


@torch.no_grad()
def loss(model: torch.nn.Module, ids: list[int]) -> float:
    """Mean cross-entropy over the next-token positions, in the model's own dtype."""
    tensor = torch.tensor([ids])
    logits = model(input_ids=tensor, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], tensor[0, 1:]).item()


def main() -> None:
    args = arguments()
    directory = args.make or args.adapter
    out = qwen.open_output(args.json)
    if args.make_base:
        qwen.synthetic("tiny", seed=args.seed).save_pretrained(args.model)
    base = qwen.load(args.model)
    ids = qwen.read_ids(args.ids, base.config.vocab_size)
    losses = {"float32 without adapter": loss(base, ids)}
    if args.make:
        make(base, args)
    model = attach(base, directory)
    tensors, found = differences(model, directory)
    losses["float32"] = loss(model, ids)
    losses["float64"] = loss(model.double(), ids)

    config = json.loads((directory / "adapter_config.json").read_text())
    print(f"base      {args.model}")
    print(f"adapter   {directory}: rank {config['r']}, alpha {config['lora_alpha']},"
          f" {','.join(sorted(config['target_modules']))}, {tensors} tensors")
    for what in found:
        print(f"  {what}")
    print(f"keys      {'differ' if found else 'none missing, none unexpected, every tensor as in the file'}")
    print(f"loss      over {len(ids) - 1} next tokens of {args.ids}")
    for what, value in losses.items():
        print(f"  {what:<24}{value:.12f}")
    qwen.write_json(out, {"adapter": str(directory), "model": str(args.model), "tensors": tensors,
                          "differences": found, "losses": losses})
    if found or not all(map(math.isfinite, losses.values())):
        sys.exit(1)


if __name__ == "__main__":
    main()
