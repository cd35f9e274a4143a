"""format="merged": a whole checkpoint that loads with from_pretrained and nothing of lora-lite."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import safetensors.torch
import torch
from lora_lite import merged_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Guard = Callable[[nn.Module], AbstractContextManager[None]]

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 2}),
    ("dora", {"r": 2}),
    ("ia3", {}),
    ("ia3_ff", {}),
    ("hra", {"r": 2}),
    ("road", {"group_size": 4}),
    ("antipasto", {"r": 4}),
]


def adapted(model: nn.Module, name: str, fields: dict[str, Any], **options: Any) -> ll.Adapter:
    """An adapter with random tensors, as of training."""
    arguments = {"targets": r"(q|v|down)_proj$|c_attn$|mlp\.c_proj$", **options}
    adapter = ll.attach(model, name, **arguments, **fields)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def loaded(folder: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def biased(tiny_llama: Make) -> nn.Module:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model


@pytest.mark.parametrize(("name", "fields"), METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize("family", ["plain", "biased", "tied", "gpt2"])
def test_from_pretrained_gives_the_adapted_logits(
    tiny_llama: Make,
    tiny_gpt2: Make,
    tmp_path: Path,
    untouched: Guard,
    family: str,
    name: str,
    fields: dict[str, Any],
) -> None:
    """Every method, with and without biases, tied heads, Conv1D; the model is not touched."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": tiny_llama,
        "biased": lambda: biased(tiny_llama),
        "tied": lambda: tiny_llama(tie_word_embeddings=True),
        "gpt2": tiny_gpt2,
    }
    model = makers[family]().eval()
    base = logits(model)
    adapter = adapted(model, name, fields)
    adapter.scale = 0.5
    with untouched(model):
        adapter.save(tmp_path / "out", format="merged")
    assert relative(base, logits(model)) > 1e-3
    plain = loaded(tmp_path / "out")
    assert relative(logits(plain), logits(model)) < 1e-5
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (family in ("plain", "biased"))


def test_an_adapted_head_is_untied(tiny_llama: Make, tmp_path: Path) -> None:
    """An adapter on a tied head changes the head alone, and the config says so."""
    model = tiny_llama(tie_word_embeddings=True).eval()
    adapted(model, "lora", {"r": 2}, targets="lm_head", exclude=()).save(
        tmp_path / "out", format="merged"
    )
    plain = loaded(tmp_path / "out")
    assert relative(logits(plain), logits(model)) < 1e-5
    assert plain.config.tie_word_embeddings is False
    assert model.config.tie_word_embeddings is True


def test_shards(tiny_llama: Make, tmp_path: Path) -> None:
    """Shards are of the size asked for, told one by one, and together the same checkpoint."""
    model = tiny_llama().eval()
    adapter = adapted(model, "lora", {"r": 2})
    told: list[str] = []
    adapter.save(tmp_path / "many", format="merged", shard_bytes=4000, tell=told.append)
    adapter.save(tmp_path / "one", format="merged")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == len(told) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == one.keys()
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert torch.equal(tensor, one[name])
    assert torch.equal(logits(loaded(tmp_path / "many")), logits(loaded(tmp_path / "one")))


def test_one_shard_is_in_memory_at_a_time(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights are computed when their shard is written, and not before."""
    model = tiny_llama()
    adapter = adapted(model, "lora", {"r": 2})
    events: list[str] = []
    merge, write = merged_checkpoint.plain_contents, safetensors.torch.save_file

    def contents(*arguments: Any) -> Any:
        found = merge(*arguments)
        for name, entry in found.entries.items():
            read = entry.read
            note = lambda name=name, read=read: (events.append(name), read())[1]  # noqa: E731
            object.__setattr__(entry, "read", note)
        return found

    def save_file(*arguments: Any) -> None:
        events.append("file")
        write(*arguments)

    monkeypatch.setattr(merged_checkpoint, "plain_contents", contents)
    monkeypatch.setattr(merged_checkpoint, "save_file", save_file)
    adapter.save(tmp_path / "out", format="merged", shard_bytes=1)
    assert events[1::2] == ["file"] * (len(events) // 2)


def test_half_precision(tiny_llama: Make, tmp_path: Path) -> None:
    """A bfloat16 base stays one: each merged weight is W + ΔW, rounded once."""
    model = tiny_llama().bfloat16().eval()
    adapter = adapted(model, "lora", {"r": 2})
    adapter.save(tmp_path / "out", format="merged")
    plain = loaded(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    for path, layer in adapter.merged().items():
        assert torch.equal(plain.get_submodule(path).weight, layer.weight)


def test_tokenizer_and_config_go_along(tiny_llama: Make, tmp_path: Path) -> None:
    """What lies beside the base's weights is copied; weights and other files are not."""
    source = tmp_path / "base"
    tiny_llama().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(f"{{}} {name}")
    model = loaded(source)
    adapted(model, "lora", {"r": 2}).save(tmp_path / "out", format="merged")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "notes.txt" not in names
    other = tiny_llama()
    adapted(other, "lora", {"r": 2}).save(tmp_path / "two", format="merged", base_folder=source)
    assert (tmp_path / "two" / "tokenizer.json").exists()


def test_other_adapters_are_left_out(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama().eval()
    first = adapted(model, "lora", {"r": 2})
    expected = logits(model)
    ll.attach(model, "antipasto_ablate", r=4, init_alpha=0.5, name="other")
    first.save(tmp_path / "out", format="merged")
    assert relative(logits(loaded(tmp_path / "out")), expected) < 1e-5


def test_a_mixture_of_experts_is_written_as_it_is_published(tmp_path: Path) -> None:
    """transformers fuses experts in memory; the checkpoint has the published names."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=32,
        )
    ).eval()
    model.save_pretrained(tmp_path / "base")
    adapted(model, "lora", {"r": 2}, targets=r"[qv]_proj$").save(
        tmp_path / "out", format="merged", shard_bytes=5000
    )
    names: set[str] = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        names |= load_file(file).keys()
    assert names == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert relative(logits(loaded(tmp_path / "out")), logits(model)) < 1e-5


def test_experts_whose_outputs_are_shifted_are_refused(tmp_path: Path) -> None:
    """Promise: an offset that the weights of experts cannot have is refused, and not left out."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, head_dim=8))
    adapter = adapted(model, "lora_bias", {"r": 2}, targets=r"experts\.down_proj$")
    with pytest.raises(ll.AdapterError, match=r"lora_bias shifts the outputs of .*down_proj\[0\]"):
        adapter.save(tmp_path / "out", format="merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"embed_tokens": ("lora", {"r": 2})},
        {"q_proj": ("lora", {"r": 2}), "norm$": "full"},
        {"embed_tokens": "full", "down_proj": "full"},
    ],
)
def test_layers_of_every_kind_are_merged(
    tiny_llama: Make, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    """Promise: what is trained beside linear layers is in the checkpoint, laid out as the layer
    keeps it."""
    model = tiny_llama()
    adapter = ll.attach(model, recipe)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    adapter.save(tmp_path / "out", format="merged")
    assert relative(logits(loaded(tmp_path / "out")), logits(model)) < 1e-5
    adapter.scale = 0.5
    if "norm$" in recipe:
        with pytest.raises(ll.AdapterError, match=r"norm has parameters of its own.*scale = 1"):
            adapter.save(tmp_path / "half", format="merged")
        with pytest.raises(ll.AdapterError, match="has no weight matrix"):
            adapter.merged()


def test_a_convolution_is_merged_as_its_kernel(tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv1d(3, 4, 2))  # noqa: E731
    model, plain = make(), make()
    adapter = adapted(model, "lora", {"r": 2}, targets="0|1")
    adapter.save(tmp_path / "out", format="merged")
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x, y = torch.randn(2, 2, 6, 6), torch.randn(2, 3, 6)
    torch.testing.assert_close(plain[0](x), model[0](x))
    torch.testing.assert_close(plain[1](y), model[1](y))


def test_a_model_of_plain_torch(blocks: Make, tmp_path: Path) -> None:
    """Without a config there is one file, whose tensors are the model's state."""
    model, plain = blocks(), blocks()
    adapted(model, "lora", {"r": 2}, targets="up|down").save(tmp_path / "out", format="merged")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(3, 8)
    torch.testing.assert_close(plain(x), model(x))


# --- nothing that is whole only in part


def test_a_folder_that_is_there_is_not_touched(tiny_llama: Make, tmp_path: Path) -> None:
    adapter = adapted(tiny_llama(), "lora", {"r": 2})
    (tmp_path / "out").mkdir()
    adapter.save(tmp_path / "out", format="merged")  # an empty one will do
    for path in (tmp_path / "out", tmp_path / "out" / "config.json"):
        with pytest.raises(ll.AdapterFileError, match="is there already"):
            adapter.save(path, format="merged")


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_full_disk_leaves_nothing(
    tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Whatever file it happens at, there is neither a folder that loads nor a half one."""
    adapter = adapted(tiny_llama(), "lora", {"r": 2})
    write, count = safetensors.torch.save_file, 0

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal count
        count += 1
        write(tensors, path, metadata)
        if count == which:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merged_checkpoint, "save_file", full)
    with pytest.raises(ll.AdapterFileError, match="cannot be written: No space left"):
        adapter.save(tmp_path / "out", format="merged", shard_bytes=4000)
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stops the writing as a full disk does."""
    script = (
        "import resource, signal, sys, torch, lora_lite as ll\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])\n"
        "adapter = ll.attach(model, 'lora', r=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    adapter.save(sys.argv[1], format='merged')\n"
        "except ll.AdapterFileError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base_only_when_asked(tmp_path: Path) -> None:
    """Its layers are named; dequantised, the checkpoint is plain, adapted layers or not."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.ModuleList(
        [bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4") for _ in range(2)]
    ).to("cpu")
    adapter = adapted(model, "lora", {"r": 2}, targets="0")
    with pytest.raises(ll.AdapterError, match="2 layers of the base are quantised") as caught:
        adapter.save(tmp_path / "out", format="merged")
    assert "dequantise=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    adapter.save(tmp_path / "out", format="merged", dequantise=True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name in ("0", "1"):
        plain = nn.Linear(64, 64)
        plain.load_state_dict({k: tensors[f"{name}.{k}"] for k in ("weight", "bias")})
        x = torch.randn(3, 64)
        torch.testing.assert_close(plain(x), model[int(name)](x), rtol=1e-2, atol=1e-2)
