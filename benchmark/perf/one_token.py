"""Time of one token: every method under `frozen()`, and PEFT's, as ratios to the bare base.

python benchmark/perf/one_token.py [--methods lora peft ...] [--dtype bfloat16] [--rounds 300]

A forward of one token without gradients, with the adapter on every linear layer of the blocks of a
small Llama of transformers: what serving a single request costs at each step, and where the Python
around a layer counts most. The models take turns, token by token, in one process, so that a busy
machine slows all of them. A ratio is the median over the rounds, with its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import lora_lite as ll
import peft
import torch
from step import base
from torch import nn

TARGETS = r"_proj$"
METHODS = ["lora", "ia3", "pissa", "dora", "hra", "antipasto", "peft:lora", "peft:dora", "peft:ia3"]
RANKS = {"antipasto": 64}
PEFT = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules=rf".*{TARGETS}"),
    "dora": lambda: peft.LoraConfig(r=8, use_dora=True, target_modules=rf".*{TARGETS}"),
    "ia3": lambda: peft.IA3Config(target_modules=rf".*{TARGETS}", feedforward_modules=[]),
}


def adapted(method: str, dtype: torch.dtype) -> tuple[nn.Module, ll.Adapter | None]:
    """A base with the adapter of a method, in eval mode."""
    model = base(dtype).eval()
    if method.startswith("peft:"):
        return peft.get_peft_model(model, PEFT[method.removeprefix("peft:")]()).eval(), None
    fields = {} if method == "ia3" else {"r": RANKS.get(method, 8)}
    return model, ll.attach(model, method, targets=TARGETS, **fields)


def forward(model: nn.Module) -> Callable[[], float]:
    """The seconds of a forward of one token."""
    token = torch.zeros(1, 1, dtype=torch.long)

    def seconds() -> float:
        start = time.perf_counter()
        model(input_ids=token, use_cache=False)
        return time.perf_counter() - start

    return seconds


@torch.no_grad()
def ratios(methods: list[str], dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Each method's seconds by the base's of the same round."""
    bare = forward(base(dtype).eval())
    found: dict[str, list[float]] = {method: [] for method in methods}
    with ExitStack() as frozen:
        sides = {}
        for method in methods:
            model, adapter = adapted(method, dtype)
            sides[method] = forward(model)
            if adapter is not None:
                frozen.enter_context(adapter.frozen())
        for number in range(rounds + 10):
            for method, side in sides.items():
                before, own, after = bare(), side(), bare()
                if number >= 10:
                    found[method].append(2 * own / (before + after))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"one token, {options.dtype}, targets {TARGETS}, {torch.get_num_threads()} threads")
    print("| method | time / base | quartiles |")
    print("|---|---:|---:|")
    for method, values in ratios(options.methods, dtype, options.rounds).items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"| {method} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
