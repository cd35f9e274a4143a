"""The other process of `another_process_agrees`.

python -m lora_lite.testing.child FOLDER MODULE FILE
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from pathlib import Path

import torch

import lora_lite as ll
from lora_lite.testing.case import Case


def main(folder: Path, module: str, file: str) -> None:
    """Load FOLDER/adapter.safetensors onto the base of FOLDER/case.pickle, and attach a fresh one.

    Writes what the loaded one computes, and what the fresh one starts from.
    """
    torch.set_num_threads(1)
    _import(module, file)
    case: Case = pickle.loads((folder / "case.pickle").read_bytes())
    model = case.model()
    ll.load(model, folder / "adapter.safetensors", variant=type(case.variant))
    with torch.no_grad():
        output = model(case.inputs(2, 3))
    start = case.attach(case.model()).state_dict()
    torch.save({"output": output, "start": start}, folder / "found.pt")


def _import(name: str, file: str) -> None:
    """Import the module of the variant's class.

    By its name, or from its file if that name cannot be imported (a test's).
    """
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin and Path(found.origin).resolve() == Path(file).resolve():
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} cannot be imported from {file!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
