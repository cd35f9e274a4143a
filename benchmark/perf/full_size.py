"""The preset qwen3.5-0.8b at full size, on a model with random weights and nothing to download.

python benchmark/perf/full_size.py [--variants lora antipasto] [--tokens 512]

Prints what every installed variant's row would cost. Then, each in a process of its own, attaches
variants to the model in bfloat16, trains one step of 8 rows, and prints times and the peak of the
resident set.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import lora_lite as ll
import torch
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Batch
from lora_lite_benchmark.evaluate import nats
from lora_lite_benchmark.preset import Preset, resolve
from lora_lite_benchmark.variants import compared_variants
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5TextConfig

PRESET = "qwen3.5-0.8b"

SIZES = {
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": True,
}


def random_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**SIZES), dtype=torch.bfloat16)


def empty_model() -> nn.Module:
    """The same without weights, on the meta device."""
    with torch.device("meta"):
        return random_model()


def arguments(config: RunConfig) -> dict[str, Any]:
    return {"targets": config.targets, "exclude": config.exclude, **config.fields}


def plans() -> dict[str, ll.Plan]:
    """What each installed variant's row of the preset would cost."""
    preset, model = Preset.load(PRESET), empty_model()
    configs = {name: resolve(preset, name) for name in compared_variants()}
    return {name: ll.plan(model, name, **arguments(config)) for name, config in configs.items()}


def print_plans() -> None:
    print("| variant | r | sites | parameters | MACs / token | MACs / forward |")
    print("|---|---|---|---|---|---|")
    for name, plan in plans().items():
        rank = getattr(plan.variant, "r", "–")
        macs = f"{plan.macs_per_token:,} | {plan.macs_per_forward:,}"
        print(
            f"| {name} | {rank} | {len(plan.placements)} | {plan.parameters:,} | {macs} |",
            flush=True,
        )


def step(variant: str, rows: int, tokens: int) -> dict[str, float]:
    """Attach and train one step.

    Returns seconds, and the peak in bytes of the whole process: libraries, weights, gradients and
    optimizer.
    """
    torch.manual_seed(0)
    model = random_model().train()
    started = time.perf_counter()
    config = resolve(Preset.load(PRESET), variant)
    adapter = ll.attach(model, variant, **arguments(config))
    attached = time.perf_counter()
    ids = torch.randint(SIZES["vocab_size"], (rows, tokens))
    optimizer = torch.optim.AdamW(adapter.param_groups(config.weight_decay), lr=config.lr)
    total = 0.0
    for row in ids.split(1):
        loss = nats(model, Batch(row, torch.ones_like(row), row)).sum() / ids.numel()
        loss.backward()
        total += loss.item()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    optimizer.step()
    moved = [
        not torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True)
    ]
    return {
        "attach": attached - started,
        "step": time.perf_counter() - attached,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "loss": total,
        "moved": sum(moved) / len(moved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["lora", "antipasto"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options.one, options.rows, options.tokens)))
        return
    print_plans()
    threads = torch.get_num_threads()
    print(f"\n{options.rows} rows of {options.tokens} tokens, one row a forward, {threads} threads")
    print("| variant | attach s | step s | peak GiB | loss | tensors that moved |")
    print("|---|---|---|---|---|---|")
    for variant in options.variants:
        command = [
            sys.executable,
            __file__,
            "--one",
            variant,
            "--rows",
            str(options.rows),
            "--tokens",
            str(options.tokens),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout)
        peak = f"{row['peak'] / 2**30:.1f} | {row['loss']:.2f} | {row['moved']:.0%}"
        print(f"| {variant} | {row['attach']:.1f} | {row['step']:.1f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
