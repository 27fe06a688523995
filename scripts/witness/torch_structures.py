#!/usr/bin/env python3
"""What PyTorch's FlopCounterMode sees of a training step: by attention, with and without checkpointed
layers. Writes tests/golden/torch_structures.json from the tiny models of families.py.

In the environment that scripts/peers/setup.sh makes. Fused attention is the CPU's, which a release
with a formula for it counts as a GPU's: two products forward, five backward. What a release without
one reports is had by taking the formula away.
"""

import json
from contextlib import contextmanager

import torch
from torch.utils import flop_counter
from torch.utils.checkpoint import set_checkpoint_early_stop

import families

OUT = families.OUT.parent / "torch_structures.json"
CPU = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
       torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward]
BATCH, SEQ = 2, 12


@contextmanager
def without_formula():
    """A counter of a release that does not know the CPU's fused attention."""
    kept = {op: flop_counter.flop_registry.pop(op) for op in CPU}
    try:
        yield
    finally:
        flop_counter.flop_registry.update(kept)


def total(name: str, full: bool, attention: str, recompute: bool, early_stop: bool = False) -> int:
    seed, targets, _, settings = families.CONFIGS[name]
    model = families.build(settings, seed)
    model.set_attn_implementation(attention)
    model = model.requires_grad_(True) if full else families.adapt(model, targets, seed)
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        # transformers then asks for gradients of the embedded tokens, which nobody trains.
        model.disable_input_require_grads()
    vocab = model.config.vocab_size
    ids = torch.tensor([families.text(vocab, SEQ, seed + 1), families.text(vocab, SEQ, seed + 2)])
    with set_checkpoint_early_stop(early_stop):
        run = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # noqa: E731
        return families.counted(run).get_total_flops()


def main() -> None:
    models = {}
    for name in families.CONFIGS:
        models[name] = {}
        for trained in ("full", "lora"):
            full = trained == "full"
            sees = {}
            for recompute in (False, True):
                found = {"eager": total(name, full, "eager", recompute),
                         "sdpa": total(name, full, "sdpa", recompute)}
                with without_formula():
                    found["sdpa-cpu"] = total(name, full, "sdpa", recompute)
                sees["recompute" if recompute else "kept"] = found
            sees["early_stop"] = total(name, full, "eager", True, early_stop=True)
            models[name][trained] = sees
    golden = {
        "torch": torch.__version__,
        "what": f"FlopCounterMode's totals of one training step, batch {BATCH}, {SEQ} tokens each",
        "models": models,
    }
    OUT.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
