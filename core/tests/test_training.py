"""What every training tool builds on: parameter groups, and going on from a checkpoint."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

Make = Callable[..., nn.Module]
UP, DOWN = r"up$", r"down$"


def moved(adapter: ll.Adapter, seed: int = 1) -> ll.Adapter:
    """The adapter with every parameter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter.project()
    return adapter


def state(adapter: ll.Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(actual[name], expected[name]) for name in actual
    )


# --- parameter groups


def test_groups_have_every_parameter_once_and_decay_where_the_method_wants_it(blocks: Make) -> None:
    """Over all adapters: each trainable tensor is in one group, and what must not decay has 0."""
    model = blocks()
    lora = ll.attach(model, "lora", r=2, targets=UP)
    dora = ll.attach(model, "dora", r=2, targets=DOWN, name="other")
    groups = ll.param_groups(model, weight_decay=0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(p) for a in (lora, dora) for p in a.parameters())
    still = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert still == {id(p) for name, p in dora.named_parameters() if name.endswith(".dm")}
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2


def test_a_tensor_has_the_learning_rate_that_it_is_given(blocks: Make) -> None:
    """LoRA+ in one line: B at 16 times the rate of A, whatever the schedule does to both."""
    model = blocks()
    adapter = ll.attach(model, "lora", r=2, targets=UP)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr={"B": 1.6}), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    start = state(adapter)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    for name, value in adapter.state_dict().items():
        rate = 0.8 if name.endswith(".B") else 0.05
        torch.testing.assert_close(value, start[name] - rate)
    rates = [group.get("lr") for group in adapter.param_groups(lr={"A": 3.0})]
    assert rates == [None, 3.0]


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        ({"lr": {"b": 1.0}}, "no trainable tensor has this name", "are called A, B"),
        ({"lr": 0.1}, "not a mapping", "lr={'B': 16 * rate}"),
        ({"lr": {"B": -1.0}}, "lr['B']=-1.0 is not a number of at least 0", ""),
        ({"weight_decay": float("nan")}, "weight_decay=nan is not a number of at least 0", ""),
    ],
)
def test_groups_refuse_what_would_be_ignored(
    blocks: Make, arguments: dict[str, object], problem: str, advice: str
) -> None:
    """A name without a tensor, or a number that is none, is an error rather than a lost setting."""
    model = blocks()
    ll.attach(model, "lora", r=2)
    with pytest.raises(ll.AdapterError, match=re.escape(problem)) as caught:
        ll.param_groups(model, **arguments)
    assert advice in str(caught.value)


def test_a_model_without_adapters_is_refused(blocks: Make, tmp_path: Path) -> None:
    """An empty optimizer or checkpoint would be found out much later."""
    for call in (ll.param_groups, lambda model: ll.save_all(model, tmp_path)):
        with pytest.raises(ll.AdapterError, match="has no adapter"):
            call(blocks())
    assert not list(tmp_path.iterdir())


# --- one adapter


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "hra", "antipasto"])
@pytest.mark.parametrize("derived", [True, False])
def test_restore_gives_back_the_bits_in_the_same_parameters(
    blocks: Make, tmp_path: Path, variant: str, derived: bool
) -> None:
    """What was saved is back, bit for bit, in the tensors that an optimizer holds."""
    model = blocks()
    adapter = moved(ll.attach(model, variant, r=4, targets=UP))
    adapter.scale = 0.5
    slim = not derived and any(p.derived for p in _specs(adapter))
    adapter.save(tmp_path / "file", derived=not slim)
    saved, parameters = state(adapter), [id(p) for p in adapter.parameters()]
    moved(adapter, seed=2)
    adapter.scale = 2.0
    adapter.restore(tmp_path / "file")
    assert same(state(adapter), saved)
    assert adapter.scale == 0.5
    assert [id(p) for p in adapter.parameters()] == parameters


def _specs(adapter: ll.Adapter) -> list[ll.TensorSpec]:
    return [spec for _, spec, _ in adapter._tensors()]


def attached_otherwise(model: nn.Module, how: str) -> ll.Adapter:
    """An adapter that is almost the one of `ll.attach(model, "lora", r=2, targets=UP)`."""
    if how == "fields":
        return ll.attach(model, "lora", r=2, alpha=64.0, targets=UP)
    if how == "variant":
        return ll.attach(model, "dora", r=2, targets=UP)
    if how == "more layers":
        return ll.attach(model, "lora", r=2)
    if how == "fewer layers":
        return ll.attach(model, "lora", r=2, targets=UP, layers=0)
    if how == "dtype":
        return ll.attach(model, "lora", r=2, targets=UP, dtype="bfloat16")
    with torch.no_grad():
        model.get_submodule("blocks.0.up").weight.add_(1.0)
    return ll.attach(model, "lora", r=2, targets=UP)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fields", "blocks.0.up: alpha=16.0 in the file, alpha=64.0 in the model"),
        ("variant", "blocks.0.up: variant 'lora' in the file, 'dora' in the model"),
        ("more layers", "blocks.0.down: only in the model"),
        ("fewer layers", "blocks.1.up: only in the file"),
        ("dtype", "blocks.0.up.A: torch.float32 in the file, torch.bfloat16 in the model"),
        ("base", "on a base with other weights: 1 of 2 layers"),
    ],
)
def test_restore_refuses_the_state_of_another_run(
    blocks: Make, tmp_path: Path, how: str, words: str
) -> None:
    """Fields, variant, layers, precision and base must be those that it was saved with: the
    difference is named, and nothing is changed.
    """
    moved(ll.attach(blocks(), "lora", r=2, targets=UP)).save(tmp_path / "file")
    adapter = moved(attached_otherwise(blocks(), how))
    before = state(adapter)
    with pytest.raises(ll.AdapterFileError, match=re.escape(words)):
        adapter.restore(tmp_path / "file")
    assert same(state(adapter), before)


def test_restore_refuses_a_damaged_file(blocks: Make, tmp_path: Path) -> None:
    """One flipped bit is seen, wherever it is, before anything is changed."""
    file = tmp_path / "file"
    adapter = moved(ll.attach(blocks(), "lora", r=2))
    adapter.save(file)
    before, whole = state(adapter), file.read_bytes()
    for place in range(16, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ll.AdapterFileError):
            adapter.restore(file)
        assert same(state(adapter), before)


def test_restore_that_is_interrupted_changes_nothing(
    blocks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between two tensors gives back the old state, the scale included."""
    adapter = moved(ll.attach(blocks(), "lora", r=2))
    adapter.save(tmp_path / "file")
    moved(adapter, seed=2).scale = 3.0
    before = state(adapter)
    calls = iter(range(3))

    def interrupted(target: Tensor, values: Tensor) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        target.copy_(values)

    monkeypatch.setattr("lora_lite.adapter_state.overwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.restore(tmp_path / "file")
    assert same(state(adapter), before)
    assert adapter.scale == 3.0


# --- all of them


def two(model: nn.Module) -> tuple[ll.Adapter, ll.Adapter]:
    """Two adapters under two names."""
    first = moved(ll.attach(model, "lora", r=2, targets=UP))
    return first, moved(ll.attach(model, "hra", r=2, targets=DOWN, name="other"))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Training steps on fixed data; their losses."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_run_that_is_resumed_goes_on_to_the_same_bits(blocks: Make, tmp_path: Path) -> None:
    """Adapters from the folder and the optimizer's own state: the losses of the run in one go, also
    with a layer of the base that is trained beside them.
    """

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = blocks()
        two(model)
        head = model.get_submodule("lm_head").requires_grad_(True)
        groups = [*ll.param_groups(model, 0.01), {"params": list(head.parameters())}]
        return model, torch.optim.AdamW(groups, lr=1e-2)

    model, optimizer = start()
    steps(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.save_all(model, tmp_path / "checkpoint")
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    expected = steps(model, optimizer, 3)
    model, optimizer = start()
    ll.restore_all(model, tmp_path / "checkpoint")
    optimizer.load_state_dict(optimizer_state)
    assert steps(model, optimizer, 3) == expected


def test_running_statistics_of_the_base_are_in_the_folder(tmp_path: Path) -> None:
    """Batch normalisation goes on where it was; a folder from before the training takes it back."""

    def start() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        moved(ll.attach(model, "lora", r=2, targets=r"."))
        return model

    model = start()
    ll.save_all(model, tmp_path / "before")
    model(torch.randn(8, 4))
    ll.save_all(model, tmp_path / "after")
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    after = norm.running_mean.clone()
    assert after.any()
    model(torch.randn(8, 4))
    ll.restore_all(model, tmp_path / "after")
    assert torch.equal(norm.running_mean, after)
    ll.restore_all(model, tmp_path / "before")
    assert not norm.running_mean.any()


def test_the_folder_holds_the_adapters_and_not_the_model(blocks: Make, tmp_path: Path) -> None:
    """One file for each adapter, which `ll.load` reads, and a list of them; nothing else."""
    model = blocks()
    adapters = two(model)
    ll.save_all(model, tmp_path)
    files = {"adapters.json", "default.adapter.safetensors", "other.adapter.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == files
    for adapter in adapters:
        loaded = ll.load(blocks(), tmp_path / f"{adapter.name}.adapter.safetensors")
        assert same(state(loaded), state(adapter))


@pytest.mark.parametrize("names", [["default"], ["default", "third"], ["default", "other", "more"]])
def test_restore_all_refuses_other_adapters(blocks: Make, tmp_path: Path, names: list[str]) -> None:
    """An adapter that is missing on one side or the other is named, and nothing is changed."""
    model = blocks()
    two(model)
    ll.save_all(model, tmp_path)
    fresh = blocks()
    adapters = [
        moved(ll.attach(fresh, "lora", r=2, targets=UP, name=name), seed=2) for name in names
    ]
    before = [state(adapter) for adapter in adapters]
    with pytest.raises(ll.AdapterFileError, match="'default', 'other', and the model has"):
        ll.restore_all(fresh, tmp_path)
    assert all(same(state(adapter), b) for adapter, b in zip(adapters, before, strict=True))


def test_restore_all_is_all_or_nothing(blocks: Make, tmp_path: Path) -> None:
    """If the second adapter does not fit, the first one is as it was, scale included."""
    model = blocks()
    two(model)
    ll.save_all(model, tmp_path)
    fresh = blocks()
    first = moved(ll.attach(fresh, "lora", r=2, targets=UP), seed=2)
    ll.attach(fresh, "hra", r=4, targets=DOWN, name="other")
    first.scale = 0.25
    before = state(first)
    with pytest.raises(ll.AdapterFileError, match="r=2 in the file, r=4 in the model"):
        ll.restore_all(fresh, tmp_path)
    assert same(state(first), before)
    assert first.scale == 0.25


def test_restore_all_refuses_what_else_trains(blocks: Make, tmp_path: Path) -> None:
    """A head that was trained beside the adapter, and is frozen now (or the reverse), is named."""
    model = blocks()
    two(model)
    head = model.get_submodule("lm_head")
    ll.save_all(model, tmp_path / "frozen")
    head.requires_grad_(True)
    with pytest.raises(ll.AdapterFileError, match=r"lm_head\.weight: trained now"):
        ll.restore_all(model, tmp_path / "frozen")
    ll.save_all(model, tmp_path / "trained")
    head.requires_grad_(False)
    with pytest.raises(ll.AdapterFileError, match=r"lm_head\.weight: in the folder"):
        ll.restore_all(model, tmp_path / "trained")


def test_a_save_that_fails_leaves_the_folder_as_it_was(blocks: Make, tmp_path: Path) -> None:
    """One adapter that diverged: the files of the last good save are all still there."""
    model = blocks()
    _, other = two(model)
    ll.save_all(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    moved(ll.adapters(model)["default"], seed=5)
    with torch.no_grad():
        next(other.parameters()).fill_(float("nan"))
    with pytest.raises(ll.AdapterFileError, match="not finite"):
        ll.save_all(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_of_two_saves_are_not_mixed(blocks: Make, tmp_path: Path) -> None:
    """A folder with one file of an older save, as an interruption leaves it, is refused."""
    model = blocks()
    first, _ = two(model)
    ll.save_all(model, tmp_path)
    old = (tmp_path / "other.adapter.safetensors").read_bytes()
    moved(ll.adapters(model)["other"], seed=7)
    ll.save_all(model, tmp_path)
    before = state(first)
    (tmp_path / "other.adapter.safetensors").write_bytes(old)
    with pytest.raises(ll.AdapterFileError, match="saving into it was interrupted") as caught:
        ll.restore_all(model, tmp_path)
    assert "other.adapter.safetensors" in str(caught.value)
    (tmp_path / "other.adapter.safetensors").unlink()
    with pytest.raises(ll.AdapterFileError, match="saving into it was interrupted"):
        ll.restore_all(model, tmp_path)
    assert same(state(first), before)


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 5000, '{"format": 9, "digests": {}}', "\ud800", None]
)
def test_a_folder_of_something_else_is_refused(
    blocks: Make, tmp_path: Path, text: str | None
) -> None:
    """No list, a list of another kind, or one that leads out of the folder: one readable error."""
    model = blocks()
    two(model)
    if text is not None:
        (tmp_path / "adapters.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ll.AdapterFileError, match=r"holds no adapters|is damaged"):
        ll.restore_all(model, tmp_path)
    outside = {"format": 1, "digests": {"../default.adapter.safetensors": "0"}}
    (tmp_path / "adapters.json").write_text(json.dumps(outside))
    with pytest.raises(ll.AdapterFileError, match="outside of its folder"):
        ll.restore_all(model, tmp_path)
