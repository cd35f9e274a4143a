"""Time to attach and to load LoRA on many small layers, against PEFT, both in one run.

python benchmark/perf/attach.py [--layers 1000 4000]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import peft
import torch
from torch import nn

FIELDS = {"r": 4}


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))


def seconds(work: Callable[[nn.Module], object], layers: int, repeats: int) -> float:
    """The least of some repeats, each on a fresh model."""
    times = []
    for _ in range(repeats):
        model = Stack(layers)
        start = time.perf_counter()
        work(model)
        times.append(time.perf_counter() - start)
    return min(times)


def peft_attach(model: nn.Module) -> peft.PeftModel:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=r"layers\.\d+", **FIELDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| layers | what | lora-lite ms/layer | PEFT ms/layer | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        for layers in options.layers:
            ll.attach(ours := Stack(layers), "lora", targets="layers", **FIELDS).save(file)
            peft_attach(theirs := Stack(layers)).save_pretrained(folder)
            del ours, theirs
            rows: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
                "attach": (lambda model: ll.attach(model, "lora", targets="layers", **FIELDS), peft_attach),
                "load": (lambda model: ll.load(model, file), lambda model: peft.PeftModel.from_pretrained(model, folder)),
            }
            for what, (mine, other) in rows.items():
                a, b = (1e3 * seconds(work, layers, options.repeats) / layers for work in (mine, other))
                print(f"| {layers} | {what} | {a:.3f} | {b:.3f} | {a / b:.3f} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
