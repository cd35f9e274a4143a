"""Serving many adapters of one shape from one compiled model: a swap against compiling again.

python benchmark/perf/swap.py [--method lora] [--rounds 20]

The small Llama of `step.py`, with the adapter on all linear layers. Printed are the seconds of the
first forward, which compiles; of one after `torch.compiler.reset`, which finds inductor's code in
its cache; the milliseconds of `load_state_dict` with other values, and of the forward after it; and
how often torch compiled again in all rounds.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import lora_lite as ll
import torch
from step import base
from torch._dynamo.utils import counters

TARGETS = r"_proj$"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    model = base(torch.float32).eval()
    adapter = ll.attach(model, options.method, r=8, targets=TARGETS)
    others = [
        {name: tensor + 0.01 * number for name, tensor in adapter.state_dict().items()}
        for number in (1, 2)
    ]
    compiled = torch.compile(model)
    tokens = torch.zeros(1, 16, dtype=torch.long)

    def forward() -> object:
        return compiled(input_ids=tokens, use_cache=False)

    first = seconds(forward)
    graphs = counters["stats"]["unique_graphs"]
    swaps, forwards = [], []
    for number in range(options.rounds):
        swap = functools.partial(adapter.load_state_dict, others[number % 2])
        swaps.append(seconds(swap))
        forwards.append(seconds(forward))
    again = counters["stats"]["unique_graphs"] - graphs
    torch.compiler.reset()
    anew = seconds(forward)
    print(f"{options.method} on {len(adapter.sites)} layers, {torch.get_num_threads()} threads")
    print("| first forward | compiled anew | swap | forward after it | compiled again |")
    print("|---:|---:|---:|---:|---:|")
    print(
        f"| {first:.1f} s | {anew:.1f} s | {1000 * statistics.median(swaps):.1f} ms "
        f"| {1000 * statistics.median(forwards):.1f} ms | {again} of {options.rounds} |"
    )


if __name__ == "__main__":
    main()
