#!/usr/bin/env python3
"""Golden figures of adapters that differ by layer and projection, by PEFT on the models of families.py.

    adapters.py [NAME...]                  writes tests/golden/adapters/NAME/, all without a name

In the environment that scripts/peers/setup.sh makes. Factors and texts come from seeds, as there.
"""

import shutil
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import families
from families import CONFIGS, PACKAGES, TEXT, build, counted, lists, lora_gradients, text

OUT = families.OUT.parent / "adapters"

# The base in families.py, and what LoraConfig is given.
ADAPTERS = {
    # Keys of a pattern are expressions that match the ends of names, the first of the file counts.
    "patterns": ("qwen2-a", dict(
        r=4, lora_alpha=6, use_rslora=True, layers_to_transform=[1, 2],
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
        rank_pattern={"layers.2.mlp.down_proj": 6, "v_proj": 2},
        alpha_pattern={r"layers\.1\..*": 12, "self_attn.q_proj": 3})),
    # The head is none of them.
    "all-linear": ("gemma3-a", dict(
        r=2, lora_alpha=4, target_modules="all-linear", rank_pattern={"k_proj": 1, "up_proj": 3})),
    # Whole names by an expression; training begins in the second half of layer 1.
    "expression": ("llama-b", dict(
        r=3, lora_alpha=5, target_modules=r".*layers\.[12]\.(self_attn\.o|mlp\.(up|down))_proj",
        exclude_modules=["layers.1.self_attn.o_proj"],
        alpha_pattern={"down_proj": 1})),
    # Each projection in layers of its own.
    "single": ("qwen2-b", dict(
        r=2, lora_alpha=3, layers_to_transform=[1, 3], layers_pattern="layers",
        target_modules=["1.self_attn.o_proj", "layers.3.mlp.gate_proj", "k_proj"],
        rank_pattern={"k_proj": 4})),
}


def adapt(base: str, settings: dict) -> PeftModel:
    """B is not zero, so that no gradient is."""
    seed, _, _, config = CONFIGS[base]
    adapted = get_peft_model(build(config, seed), LoraConfig(
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)).eval()
    random = torch.Generator().manual_seed(seed + 3_000_000)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return adapted


def witness(name: str) -> None:
    base, settings = ADAPTERS[name]
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    adapted = adapt(base, settings)
    families.save_adapter(adapted, folder)
    seed = CONFIGS[base][0]
    vocab = adapted.config.vocab_size
    ids = text(vocab, TEXT, seed)
    with torch.no_grad():
        logits = lists(adapted(torch.tensor([ids]), use_cache=False).logits[0])
    loss, gradients = lora_gradients(adapted, ids)
    assert gradients.keys() == load_file(folder / "adapter_model.safetensors").keys()
    save_file(gradients, folder / "lora_gradients.safetensors")
    batch = torch.tensor([text(vocab, 12, seed + 1), text(vocab, 12, seed + 2)])
    train = counted(
        lambda: adapted(input_ids=batch, labels=batch, use_cache=False).loss.backward())
    with torch.no_grad():
        forward = counted(lambda: adapted(batch, use_cache=False))
    families.write_json(folder / "expected.json", {
        "made_by": "scripts/witness/adapters.py",
        "versions": {"torch": torch.__version__, **{p: version(p) for p in PACKAGES}},
        "base": base,
        "ids": ids,
        "loss": loss,
        "flops": {
            "what": "FlopCounterMode's totals, batch 2, 12 tokens each: a forward pass; forward and "
                    "backward of the mean cross-entropy of the next token, the base frozen",
            "forward": forward.get_total_flops(),
            "train": train.get_total_flops(),
        },
        "logits": logits,
    })
    for file in folder.iterdir():
        file.chmod(0o644)
    print(f"{name}: {len(gradients)} factors, loss {loss:.3f}")


def main() -> None:
    names = sys.argv[1:]
    unknown = set(names) - ADAPTERS.keys()
    if unknown:
        sys.exit(f"adapters.py: no {', '.join(sorted(unknown))}; known: {', '.join(ADAPTERS)}")
    for name in names or ADAPTERS:
        witness(name)


if __name__ == "__main__":
    main()
