#!/usr/bin/env python3
"""Qwen2 of random weights in PyTorch transformers on a GPU, beside flopaudit's runs of the same
shapes: decoding, prefill, training steps of PEFT's adapters and of every weight, each as PyTorch
comes and as fast as it goes, and the FLOPs that FlopCounterMode saw. One JSON report; a part that
fails is named in it and stops none of the others.

Decoding: `decode-sdpa` launches each kernel from Python, which bounds it; `decode-graphed` replays
one recorded step; `decode-compiled` has torch.compile record it. Training, in bf16 on a GPU:

  lora-sdpa      PEFT as it comes, adapters in float32
  full-sdpa      weights in float32, autocast to bf16
  *-masters      weights or adapters in bf16, updated by float32 masters and moments: as flopaudit
  full-bf16      weights, gradients and moments in bf16 alone: less precise, and less to move
  *-compiled     the one with masters (full-bf16-compiled: in bf16 alone) through torch.compile
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, Qwen2ForCausalLM, StaticCache

import qwen

WARM = 8  # steps of decoding before those that are timed


@dataclass(frozen=True)
class Manner:
    """How a training step runs."""

    attn: str = "sdpa"
    autocast: bool = False  # weights in float32, products in bf16
    masters: bool = False  # weights narrower than the copies that AdamW updates
    compiled: bool = False


def narrow(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def model_of(args: argparse.Namespace, attn: str, dtype: torch.dtype | None = None) -> Qwen2ForCausalLM:
    with torch.device(args.device):
        model = qwen.synthetic(args.preset, attn)
    return model.to(dtype or narrow(args)).eval()


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def ids_of(args: argparse.Namespace, model: torch.nn.Module, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, seq), device=args.device)


def each(sizes: list[tuple[int, int]], length: str, tokens: Callable[[int, int], int],
         measure: Callable[[int, int], dict]) -> list[dict]:
    """A row for each size, of what `measure` says beside its `seconds`; or that memory ran out."""
    rows = []
    for batch, n in sizes:
        row = {"batch": batch, length: n}
        try:
            measured = measure(batch, n)
            seconds = measured.pop("seconds")
            row |= {"ms": 1e3 * seconds, "tokens_per_s": tokens(batch, n) / seconds, **measured}
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        torch.cuda.empty_cache()
        rows.append(row)
    return rows


def decoded(args: argparse.Namespace, measure: Callable[[int, int], dict]) -> list[dict]:
    return each(args.decode, "context", lambda batch, _: batch, measure)


def per_step(args: argparse.Namespace, step: Callable[[], None]) -> float:
    """Seconds of a step, over `--tokens` of them after those that warm up."""
    for _ in range(WARM):
        step()
    synchronize(args)
    start = time.perf_counter()
    for _ in range(args.tokens):
        step()
    synchronize(args)
    return (time.perf_counter() - start) / args.tokens


@torch.inference_mode()
def decode(args: argparse.Namespace, attn: str, compiled: bool = False) -> list[dict]:
    """Greedy tokens one after another, as `generate` chooses them, after each context."""
    model = model_of(args, attn)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

    def measure(batch: int, context: int) -> dict:
        length = context + WARM + args.tokens
        cache = StaticCache(config=model.config, max_cache_len=length) if compiled else None
        out = model(input_ids=ids_of(args, model, batch, context), past_key_values=cache, use_cache=True,
                    logits_to_keep=1, cache_position=torch.arange(context, device=args.device))
        cache, token, held = out.past_key_values, out.logits[:, -1:].argmax(-1), context

        def step() -> None:
            nonlocal token, held
            position = torch.tensor([held], device=args.device)
            out = forward(input_ids=token, past_key_values=cache, use_cache=True, cache_position=position)
            token, held = out.logits[:, -1:].argmax(-1).clone(), held + 1

        return {"seconds": per_step(args, step)}

    return decoded(args, measure)


def packed_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor, scaling: float, **_) -> tuple[torch.Tensor, None]:
    """Attention of one token of each sequence: query heads that share keys are rows of one product,
    so that no key is copied for each of them, as transformers' own `sdpa` does under a mask."""
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, width), None


class Decoding:
    """Greedy decoding of one batch after a random context, all of it in tensors that stay where they
    are: the token, its position and a static cache. So one step can be recorded and replayed."""

    def __init__(self, args: argparse.Namespace, model: Qwen2ForCausalLM, batch: int, context: int):
        self.args, self.model, self.context = args, model, context
        length = -(-(context + WARM + args.tokens) // 64) * 64
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        model.config._attn_implementation = "sdpa"
        out = model(input_ids=ids_of(args, model, batch, context), past_key_values=self.cache, use_cache=True,
                    logits_to_keep=1, cache_position=torch.arange(context, device=args.device))
        model.config._attn_implementation = "packed"
        self.first = out.logits[:, -1:].argmax(-1)
        self.token = self.first.clone()
        self.position = torch.tensor([context], device=args.device)
        self.keys = torch.arange(length, device=args.device)

    def rewind(self) -> None:
        """Back to the end of the context. What the cache holds beyond is masked until written anew."""
        self.token.copy_(self.first)
        self.position.fill_(self.context)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):  # newer transformers: the position that it writes to
                layer.cumulative_length.fill_(self.context)

    def step(self) -> None:
        """The next token takes the place of the last."""
        seen = (self.keys <= self.position)[None, None, None]
        out = self.model(input_ids=self.token, attention_mask=seen, position_ids=self.position[None],
                         past_key_values=self.cache, use_cache=True, cache_position=self.position)
        self.token.copy_(out.logits.argmax(-1))
        self.position.add_(1)

    def recorded(self) -> Callable[[], None]:
        """One step as a CUDA graph; where there is no GPU, the step itself."""
        if self.args.device != "cuda":
            return self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def chosen(self, step: Callable[[], None]) -> list[list[int]]:
        """Tokens from the context's end on, of each step one of each sequence."""
        self.rewind()
        tokens = []
        for _ in range(WARM + self.args.tokens):
            step()
            tokens.append(self.token.flatten().clone())
        return torch.stack(tokens).tolist()


@torch.inference_mode()
def decode_graphed(args: argparse.Namespace) -> list[dict]:
    """PyTorch's best without compiling: a recorded step, replayed for each token. Its tokens must be
    those of the same step launched kernel by kernel."""
    AttentionInterface.register("packed", packed_attention)
    model = model_of(args, "sdpa")

    def measure(batch: int, context: int) -> dict:
        decoding = Decoding(args, model, batch, context)
        launched = decoding.chosen(decoding.step)
        step = decoding.recorded()
        replayed = decoding.chosen(step)
        if replayed != launched:
            apart = next(i for i, (a, b) in enumerate(zip(launched, replayed)) if a != b)
            raise ValueError(f"{batch}x{context}: the recorded step's tokens differ from token {apart} on")
        decoding.rewind()
        seconds = per_step(args, step)
        if decoding.token.flatten().tolist() != launched[-1]:
            raise ValueError(f"{batch}x{context}: the last timed token is another")
        return {"seconds": seconds, "recorded": args.device == "cuda"}

    return decoded(args, measure)


@torch.inference_mode()
def prefill(args: argparse.Namespace, attn: str, compiled: bool = False) -> list[dict]:
    """A pass over the prompts with the choice of their first tokens."""
    model = model_of(args, attn)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def measure(batch: int, seq: int) -> dict:
        ids = ids_of(args, model, batch, seq)
        samples = []
        for _ in range(args.repetitions + 2):
            synchronize(args)
            start = time.perf_counter()
            out = forward(input_ids=ids, use_cache=True, logits_to_keep=1)
            out.logits.argmax(-1).tolist()
            samples.append(time.perf_counter() - start)
            del out
        return {"seconds": statistics.median(samples[2:])}

    return each(args.prefill, "seq", lambda batch, seq: batch * seq, measure)


def adapted(args: argparse.Namespace, manner: Manner) -> torch.nn.Module:
    """The model with adapters of the rank and on the projections that `bench train` has by default."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return peft.get_peft_model(model_of(args, manner.attn), config, autocast_adapter_dtype=not manner.masters)


class Updates:
    """AdamW with its gradients' norm clipped, on the trained parameters or on float32 copies of them."""

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module, masters: bool):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.updated = self.trained
        if masters:
            self.updated = [p.detach().to(torch.float32, copy=True).requires_grad_() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.updated, lr=1e-4, fused=args.device == "cuda")

    @torch.no_grad()
    def update(self) -> None:
        masters = self.updated is not self.trained
        if masters:
            for master, parameter in zip(self.updated, self.trained):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.updated, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if masters:
            torch._foreach_copy_(self.trained, self.updated)


def train(args: argparse.Namespace, sizes: list[tuple[int, int]], full: bool, manner: Manner) -> list[dict]:
    """Forward, backward and update. Cross-entropy over every next token, in float32."""
    if full:
        model = model_of(args, manner.attn, torch.float32 if manner.autocast else None)
    else:
        model = adapted(args, manner)
    model.train()
    updates = Updates(args, model, manner.masters)
    products = partial(torch.autocast, args.device, torch.bfloat16) if manner.autocast else nullcontext

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        # The last position has no next token: masked, so that no copy of the logits is made without it.
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss_of = torch.compile(loss_of, dynamic=False) if manner.compiled else loss_of

    def measure(batch: int, seq: int) -> dict:
        ids = ids_of(args, model, batch, seq)
        samples, losses = [], []
        for _ in range(args.repetitions + 2):
            synchronize(args)
            start = time.perf_counter()
            with products():
                loss = loss_of(ids)
            loss.backward()
            updates.update()
            losses.append(loss.item())
            samples.append(time.perf_counter() - start)
        # Adapters start as nothing and learn slowly: in bf16 their first steps may drown in rounding.
        if not math.isfinite(losses[-1]) or full and losses[-1] >= losses[0]:
            raise ValueError(f"{batch}x{seq}: the loss of one text does not fall: {losses}")
        return {"seconds": statistics.median(samples[2:]), "losses": [losses[0], losses[-1]]}

    return each(sizes, "seq", lambda batch, seq: batch * seq, measure)


@torch.inference_mode()
def flops(args: argparse.Namespace) -> list[dict]:
    """FLOPs of one forward pass over every position, by PyTorch's own counter."""
    model = model_of(args, "eager")
    results = []
    for batch, seq in args.flops:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids_of(args, model, batch, seq), use_cache=False)
        results.append({"batch": batch, "seq": seq, "flops": counter.get_total_flops()})
    return results


def lora(manner: Manner) -> Callable[[argparse.Namespace], list[dict]]:
    return lambda args: train(args, args.lora, False, manner)


def full(manner: Manner) -> Callable[[argparse.Namespace], list[dict]]:
    return lambda args: train(args, args.full, True, manner)


# What `--parts` takes, and what each runs.
PARTS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "decode-eager": partial(decode, attn="eager"),
    "decode-sdpa": partial(decode, attn="sdpa"),
    "decode-graphed": decode_graphed,
    "decode-compiled": partial(decode, attn="sdpa", compiled=True),
    "prefill-eager": partial(prefill, attn="eager"),
    "prefill-sdpa": partial(prefill, attn="sdpa"),
    "prefill-compiled": partial(prefill, attn="sdpa", compiled=True),
    "lora-eager": lora(Manner(attn="eager")),
    "lora-sdpa": lora(Manner()),
    "lora-masters": lora(Manner(masters=True)),
    "lora-compiled": lora(Manner(masters=True, compiled=True)),
    "full-sdpa": full(Manner(autocast=True)),
    "full-masters": full(Manner(masters=True)),
    "full-bf16": full(Manner()),
    "full-compiled": full(Manner(masters=True, compiled=True)),
    "full-bf16-compiled": full(Manner(compiled=True)),
    "flops": flops,
}


def shapes(text: str) -> list[tuple[int, int]]:
    """The argparse type of sizes: BATCHxLENGTH,…"""
    sizes = []
    for pair in text.split(","):
        batch, _, length = pair.partition("x")
        sizes.append((qwen.positive(batch), qwen.positive(length)))
    return sizes


def parts(text: str) -> list[str]:
    """The argparse type of --parts."""
    for name in (names := text.split(",")):
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"no part `{name}`; there are {','.join(PARTS)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option = parser.add_argument
    option("--device", default="cuda", choices=["cuda", "cpu"])
    option("--preset", default="qwen2.5-0.5b", choices=sorted(qwen.PRESETS))
    option("--parts", type=parts, default=list(PARTS), metavar="PART,…", help=f"of {','.join(PARTS)}")
    option("--decode", type=shapes, default=shapes("1x128,8x128,64x128,1x2048"), metavar="BATCHxCONTEXT,…")
    option("--prefill", type=shapes, default=shapes("1x2048,8x2048"), metavar="BATCHxSEQ,…")
    option("--lora", type=shapes, default=shapes("16x512"), metavar="BATCHxSEQ,…")
    option("--full", type=shapes, default=shapes("8x512"), metavar="BATCHxSEQ,…")
    option("--flops", type=shapes, default=shapes("2x128"), metavar="BATCHxSEQ,…")
    option("--tokens", type=qwen.positive, default=64)
    option("--repetitions", type=qwen.positive, default=5)
    option("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    out = qwen.open_output(args.json)
    if args.device == "cpu":
        torch.set_num_threads(1)  # a rehearsal of small products: threads would wait for each other
    else:
        # Products that are left in float32 (PEFT's adapters) run on the tensor cores too.
        torch.set_float32_matmul_precision("high")
    report = {"torch": torch.__version__, "preset": args.preset,
              "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
    failed = False
    for part in args.parts:
        try:
            report[part] = PARTS[part](args)
        except Exception as error:  # PyTorch's versions differ; the others still run
            report[part] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            failed = True
        print(part, json.dumps(report[part]), flush=True)
        torch.compiler.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")  # what is there if time runs out
    qwen.write_json(out, report)
    sys.exit(failed)


if __name__ == "__main__":
    main()
