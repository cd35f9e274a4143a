"""Peak memory while adapters are attached to a quantised model.

python benchmark/perf/quantised.py [--width 2048] [--layers 6] [--variants lora dora antipasto]

It is counted beyond what the model takes and what the adapters keep, in dense layers: one is a
float32 copy of one layer's weight. The layers are those of bitsandbytes, on the CPU.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable

import lora_lite as ll
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

FORMATS: dict[str, Callable[[int, int], nn.Module]] = {
    "nf4": lambda d_in, d_out: Linear4bit(d_in, d_out, bias=False, quant_type="nf4"),
    "int8": lambda d_in, d_out: Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False),
}


def quantised_model(name: str, width: int, layers: int) -> nn.ModuleList:
    """Made layer by layer, so that the dense weights are never there all at once."""
    return nn.ModuleList([FORMATS[name](width, 2 * width).to("cpu") for _ in range(layers)])


def resident(field: str) -> int:
    """Bytes, of this process: VmRSS now, VmHWM the highest since `forget_peak`."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(name: str, variant: str, width: int, layers: int) -> dict[str, float]:
    """Bytes of the model and of one dense layer, and the peak of an attach, in dense layers."""
    torch.set_num_threads(1)
    warm = quantised_model(name, 128, 2)
    ll.attach(warm, variant, targets="", r=8).detach()
    model = quantised_model(name, width, layers)
    dense = 4 * 2 * width * width
    forget_peak()
    before = resident("VmRSS")
    adapter = ll.attach(model, variant, targets="", r=8)
    peak = resident("VmHWM")
    kept = sum(t.numel() * t.element_size() for t in adapter.state_dict().values())
    return {
        "model": layers * dense / (8 if name == "nf4" else 4),
        "dense": dense,
        "peak": (peak - before - kept) / dense,
    }


def in_its_own_process(*arguments: object) -> dict[str, float]:
    """Call `measure` in a process whose allocator gives freed tensors back at once, so that what is
    resident is what is in use.
    """
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--variants", nargs="+", default=["lora", "dora", "pissa", "lora_xs", "delora", "antipasto"]
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    print("| base | model MB | one dense layer MB | variant | peak of attach, dense layers |")
    print("|---|---|---|---|---|")
    for name in FORMATS:
        for variant in options.variants:
            row = in_its_own_process(name, variant, options.width, options.layers)
            print(
                f"| {name} | {row['model'] / 1e6:.0f} | {row['dense'] / 1e6:.0f} "
                f"| {variant} | {row['peak']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
