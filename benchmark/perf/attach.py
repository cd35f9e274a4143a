"""Time to attach and to load LoRA on many small layers, against PEFT, both in one run.

python benchmark/perf/attach.py [--layers 1000 4000]
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lora_lite as ll
import peft
import torch
from torch import nn

FIELDS = {"r": 4}


class Stack(nn.Module):
    """Small layers, with the same weights every time: a file is loaded on the base that it was made
    on.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))


def seconds(
    works: Sequence[Callable[[nn.Module], object]], layers: int, repeats: int
) -> list[float]:
    """The least of some repeats, each on a fresh model, of each work; they take turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            model = Stack(layers)
            start = time.perf_counter()
            work(model)
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def peft_attach(model: nn.Module) -> peft.PeftModel:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=r"layers\.\d+", **FIELDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| layers | what | lora-lite ms/layer | PEFT ms/layer | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        for layers in options.layers:
            ll.attach(ours := Stack(layers), "lora", targets="layers", **FIELDS).save(file)
            peft_attach(theirs := Stack(layers)).save_pretrained(folder)
            del ours, theirs
            rows: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
                "attach": (
                    lambda model: ll.attach(model, "lora", targets="layers", **FIELDS),
                    peft_attach,
                ),
                "load": (
                    lambda model: ll.load(model, file),
                    lambda model: peft.PeftModel.from_pretrained(model, folder),
                ),
            }
            for what, works in rows.items():
                a, b = (1e3 * taken / layers for taken in seconds(works, layers, options.repeats))
                print(f"| {layers} | {what} | {a:.3f} | {b:.3f} | {a / b:.3f} |", flush=True)


if __name__ == "__main__":
    main()
