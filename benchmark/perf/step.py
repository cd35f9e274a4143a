"""Time and memory of a training step: LoRA against PEFT's LoRA, and methods against our LoRA.

python benchmark/perf/step.py [--pairs lora:peft antipasto:lora ...] [--tokens 1024] [--rounds 40]

Both sides of a pair take turns, step by step, on a small Llama of transformers, so that a busy
machine slows both. Time is the median of the rounds' ratios, with a bootstrap interval of 95 %.
Memory is what a step keeps for its backward: the bytes of the tensors that autograd saves, each
storage counted once, without parameters (the same for both sides on any device), and the peak of a
process of its own (resident set, measured against the same process before the first step).
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

RANKS = {"antipasto": 256}
PAIRS = ["lora:peft", "antipasto:lora", "hra:lora", "dora:lora"]


def base(dtype: torch.dtype) -> nn.Module:
    """Six blocks of width 512: Qwen3.5-0.8B at half its width and a quarter of its depth.

    Depth counts. A method that changes a layer's input needs the input's gradient even at the first
    adapted layer, where LoRA's backward ends at the output: one product with W, which is a share of
    1 / blocks.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def adapted(method: str, rank: int, dtype: torch.dtype, targets: str) -> nn.Module:
    """The base with one adapter: `peft` is PEFT's LoRA, `base` none, everything else a variant of
    ours. The backward of `base` goes through all layers, and trains nothing.
    """
    model = base(dtype)
    if method == "base":
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model
    if method == "peft":
        config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=rf".*({targets})")
        return peft.get_peft_model(model, config)
    ll.attach(model, method, r=rank, targets=targets)
    return model


def stepper(model: nn.Module, tokens: int) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    batch = torch.randint(1024, (tokens // 256, 256), generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, tokens: int) -> int:
    """What autograd keeps of one forward, without the parameters."""
    batch = torch.randint(1024, (tokens // 256, 256), generator=torch.Generator().manual_seed(1))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    total = sum(storages.values())
    del loss
    return total


def times(
    first: Callable[[], None], second: Callable[[], None], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds a step, the two sides in turn, after a warm-up."""
    both: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for step, kept in zip((first, second), both, strict=True):
            start = time.perf_counter()
            step()
            if number >= 2:
                kept.append(time.perf_counter() - start)
    return both


def interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """The median of the ratios of steps taken one after the other, with its interval of 95 %."""
    rng = random.Random(0)
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    draws = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), draws[50], draws[1949]


def peak_mib(arguments: argparse.Namespace, method: str, rank: int) -> float:
    """Growth of a fresh process's resident set over three steps."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        method,
        "--rank",
        str(rank),
        "--tokens",
        str(arguments.tokens),
    ]
    command += ["--dtype", arguments.dtype, "--targets", arguments.targets]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def measure_peak(arguments: argparse.Namespace) -> None:
    dtype = getattr(torch, arguments.dtype)
    step = stepper(
        adapted(arguments.peak, arguments.rank, dtype, arguments.targets), arguments.tokens
    )
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    for _ in range(3):
        step()
    print((resident_kib("VmHWM") - before) / 1024)


def resident_kib(which: str) -> int:
    """The resident set now (VmRSS), or its peak since it was last cleared (VmHWM). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", nargs="+", default=PAIRS, help="FIRST:SECOND, ratios are first / second"
    )
    parser.add_argument(
        "--rank", type=int, default=None, help="of both sides; default 32, and 256 for antipasto"
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--targets", default="down_proj$")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments: Any = parse()
    if arguments.peak:
        return measure_peak(arguments)
    dtype = getattr(torch, arguments.dtype)
    threads = torch.get_num_threads()
    print(
        f"{arguments.dtype}, {arguments.tokens} tokens a step, targets {arguments.targets}, "
        f"{threads} threads"
    )
    print("| pair | r | step time (95 %) | saved for backward | peak of the process |")
    print("|---|---|---|---|---|")
    for pair in arguments.pairs:
        first, second = pair.split(":")
        rank = arguments.rank or RANKS.get(first, 32)
        models = [adapted(method, rank, dtype, arguments.targets) for method in (first, second)]
        saved = [saved_bytes(model, arguments.tokens) for model in models]
        ratio, low, high = interval(
            *times(*(stepper(model, arguments.tokens) for model in models), arguments.rounds)
        )
        peaks = [peak_mib(arguments, method, rank) for method in (first, second)]
        print(
            f"| {first} / {second} | {rank} "
            f"| {ratio:.3f} ({low:.3f} to {high:.3f}) "
            f"| {saved[0] / saved[1]:.3f} "
            f"| {peaks[0]:.0f} / {peaks[1]:.0f} MiB = {peaks[0] / peaks[1]:.3f} |",
            flush=True,
        )
    return None


if __name__ == "__main__":
    main()
