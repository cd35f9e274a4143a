"""A training step with LoRA on fused experts: time and memory, against PEFT's `target_parameters`.

python benchmark/perf/experts.py [--tokens 64 512] [--rounds 12]

A Qwen3-MoE of two layers with 64 experts, of which a token goes to 8; LoRA of rank 8 on all of
them, in two of the ways in which transformers computes experts. Both sides take turns, step by
step. Memory is how much a process of its own grows in three steps.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import peft
import torch
from step import interval, resident_kib, times
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

WAYS = ("eager", "grouped_mm")
PARAMETERS = ("gate_up_proj", "down_proj")


def base() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
    )
    return Qwen3MoeForCausalLM(config).train()


def adapted(side: str, way: str) -> nn.Module:
    """The base with LoRA on its experts: `peft`'s, `ours`, or `base` for none."""
    model = base()
    model.set_experts_implementation(way)  # type: ignore[operator]
    if side == "base":
        return model.requires_grad_(False)
    if side == "peft":
        names = [f"experts.{name}" for name in PARAMETERS]
        config = peft.LoraConfig(r=8, target_modules=[], target_parameters=names)
        return peft.get_peft_model(model, config)
    ll.attach(model, "lora", r=8, targets=r"experts\.")
    return model


def stepper(model: nn.Module, tokens: int) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    batch = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def growth_mib(side: str, way: str, tokens: int) -> float:
    """How much a fresh process's resident set grows at most in three steps."""
    command = [sys.executable, __file__, "--grow", side, way, str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_growth(side: str, way: str, tokens: int) -> None:
    step = stepper(adapted(side, way), tokens)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_kib("VmRSS")
    for _ in range(3):
        step()
    print((resident_kib("VmHWM") - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--grow", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.grow:
        side, way, tokens = options.grow
        measure_growth(side, way, int(tokens))
        return
    print(f"{torch.get_num_threads()} threads")
    print("| experts | tokens | ours / PEFT: step (95 %) | growth of memory, MiB |")
    print("|---|---|---|---|")
    for way in WAYS:
        for tokens in options.tokens:
            ours, theirs = (stepper(adapted(side, way), tokens) for side in ("ours", "peft"))
            ratio, low, high = interval(*times(ours, theirs, options.rounds))
            growth = [growth_mib(side, way, tokens) for side in ("ours", "peft")]
            print(
                f"| {way} | {tokens} | {ratio:.3f} ({low:.3f} to {high:.3f}) "
                f"| {growth[0]:.0f} / {growth[1]:.0f} = {growth[0] / growth[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
