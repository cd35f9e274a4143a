"""All or nothing: an exception at any line of attach, load or detach leaves no half of an adapter.

A trace function raises once, at one line of lora-lite or of a plugin that the call executes.
Afterwards the model is what it was before the call, or the call is done whole; and the next call
works.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Line = tuple[str, int]

VARIANTS = {
    "lora": {"r": 2},
    "eva": {"r": 2, "calibration": [torch.randn(9, 4, generator=torch.Generator().manual_seed(3))]},
    "antipasto": {"r": 4},
}
OWN_CODE = ("lora_lite", "lora_lite_lora", "lora_lite_eva", "lora_lite_antipasto")


class InjectedError(Exception):
    """An ordinary exception that nothing raises but these tests."""


class Three(nn.Module):
    """Three layers, one parameter of which did not train before, one module of which is in eval
    mode.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers[1].bias.requires_grad_(False)
        self.layers[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(4))


def output(model: nn.Module) -> Tensor:
    """What the model computes of a fixed batch."""
    with torch.no_grad():
        out: Tensor = model(X)
    return out


def perturb(adapter: ll.Adapter) -> None:
    """So that the adapter does something, which a lost hook would change."""
    with torch.no_grad():
        for index, p in enumerate(adapter.parameters()):
            p.add_(0.1 * (1 + index))


# --- the injector


def is_own(frame: FrameType) -> bool:
    """Whether a frame runs code of lora-lite or of one of its plugins."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in OWN_CODE


@contextmanager
def traced(at_line: Callable[[Line], None]) -> Iterator[None]:
    """Call `at_line` before every line of our own code, for the duration of the context."""

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: on_line if is_own(frame) else None)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """The lines that a call executes, in order."""
    lines: list[Line] = []
    with traced(lines.append):
        call()
    return lines


def interrupted(call: Callable[[], Any], number: int, error: type[BaseException]) -> Any:
    """The call's result, with `error` raised at the `number`-th line that it executes; None if the
    exception came through."""
    count = 0

    def at_line(line: Line) -> None:
        nonlocal count
        count += 1
        if count - 1 == number:
            sys.settrace(None)  # a single fault
            raise error(f"injected at {Path(line[0]).name}:{line[1]}")

    try:
        with traced(at_line):
            return call()
    except (Exception, KeyboardInterrupt):
        return None


def holds(guard: AbstractContextManager[None]) -> bool:
    """Whether the model is what it was when the guard was entered."""
    try:
        guard.__exit__(None, None, None)
    except AssertionError:
        return False
    return True


def entered(guard: AbstractContextManager[None]) -> AbstractContextManager[None]:
    """The guard, with the model's state of now."""
    guard.__enter__()
    return guard


# --- one fault in one call


class Trial:
    """A model that may carry a first adapter already, and one of the three calls on it."""

    def __init__(self, call: str, variant: str, second: bool, folder: Path) -> None:
        self.call, self.variant, self.second = call, variant, second
        self.name = "second" if second else "default"
        self.file = folder / "adapter"
        self.attach(Three()).save(self.file)

    def attach(self, model: nn.Module) -> ll.Adapter:
        """The adapter under trial, with something to do."""
        adapter = ll.attach(model, self.variant, name=self.name, **VARIANTS[self.variant])
        perturb(adapter)
        return adapter

    def prepared(self) -> tuple[nn.Module, Callable[[], ll.Adapter | None]]:
        """A model as it is before the call, and the call."""
        model = Three()
        if self.second:
            perturb(ll.attach(model, "lora", r=2, name="first"))
        if self.call == "attach":
            arguments = VARIANTS[self.variant]
            return model, lambda: ll.attach(model, self.variant, name=self.name, **arguments)
        if self.call == "load":
            return model, lambda: ll.load(model, self.file, name=self.name)
        adapter = self.attach(model)
        return model, adapter.detach

    def lines(self) -> list[Line]:
        """What the undisturbed call executes, once everything that it imports is there."""
        self.prepared()[1]()
        return lines_of(self.prepared()[1])

    def run(self, number: int, error: type[BaseException], untouched: Untouched) -> None:
        """Raise at one line, then look at what is left, and call again."""
        pristine = Three()
        expected_base = output(pristine)
        model, call = self.prepared()
        first = ["first"] if self.second else []
        attached = [*first, self.name] if self.call == "detach" else first
        expected, before = output(model), entered(untouched(model))
        handle = interrupted(call, number, error)
        assert torch.is_grad_enabled(), "gradients are off"
        assert not torch.is_inference_mode_enabled()
        names = sorted(ll.adapters(model))
        unchanged = holds(before)
        if self.call == "detach":
            assert names in (sorted(attached), first), names
            assert unchanged == (names == sorted(attached))
            assert torch.equal(output(model), expected) or not unchanged
        elif handle is None:
            assert unchanged
            assert names == first
            assert torch.equal(output(model), expected)
        else:
            assert handle.name in names
        self.call_again(model)
        for name in list(ll.adapters(model)):
            ll.detach(model, name)
        assert torch.equal(output(model), expected_base)
        assert [p.requires_grad for p in model.parameters()] == [
            p.requires_grad for p in pristine.parameters()
        ]
        assert [m.training for m in model.modules()] == [m.training for m in pristine.modules()]
        assert model.state_dict().keys() == pristine.state_dict().keys()
        assert [sorted(m.__dict__) for m in model.modules()] == [
            sorted(m.__dict__) for m in pristine.modules()
        ]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def call_again(self, model: nn.Module) -> None:
        """The same call without a fault does the rest."""
        there = self.name in ll.adapters(model)
        if self.call == "detach":
            if there:
                ll.detach(model, self.name)
            assert self.name not in ll.adapters(model)
        elif not there:
            again = (
                ll.load(model, self.file, name=self.name)
                if self.call == "load"
                else self.attach(model)
            )
            assert len(again.sites) == 3
            assert len(list(again.parameters())) > 0


def all_trials(test: Any) -> Any:
    """Every call, variant and exception, for a first adapter and for one beside another."""
    for name, values in {
        "call": ["attach", "load", "detach"],
        "variant": list(VARIANTS),
        "second": [False, True],
        "error": [KeyboardInterrupt, InjectedError],
    }.items():
        ids = {
            "second": ["first adapter", "second adapter"],
            "error": ["interrupt", "exception"],
        }.get(name)
        test = pytest.mark.parametrize(name, values, ids=ids)(test)
    return test


def failures(
    trial: Trial, numbers: list[int], lines: list[Line], error: Any, untouched: Untouched
) -> list[str]:
    """Where the promise is broken, a line each."""
    found = []
    for number in numbers:
        try:
            trial.run(number, error, untouched)
        except Exception as problem:  # also what the second call raises
            file, line = lines[number]
            text = str(problem).splitlines()[0] if str(problem) else ""
            found.append(f"{Path(file).name}:{line}: {type(problem).__name__}: {text}")
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@all_trials
def test_a_fault_at_some_lines(
    tmp_path: Path, untouched: Untouched, call: str, variant: str, second: bool, error: Any
) -> None:
    """Promise: attach, load and detach are all or nothing. Here at a seeded choice of the lines
    that they execute, each line of source at most once."""
    trial = Trial(call, variant, second, tmp_path)
    lines = trial.lines()
    last = {line: number for number, line in enumerate(lines)}
    chooser = random.Random(f"{call} {variant} {second} {error.__name__}")
    numbers = sorted(chooser.sample(sorted(last.values()), min(20, len(last))))
    assert len(numbers) == 20
    found = failures(trial, numbers, lines, error, untouched)
    assert not found, f"{len(found)} of {len(numbers)}:\n" + "\n".join(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@all_trials
def test_a_fault_at_every_line(
    tmp_path: Path, untouched: Untouched, call: str, variant: str, second: bool, error: Any
) -> None:
    """Promise: attach, load and detach are all or nothing. Here an interrupt at every line that
    they execute, as often as they execute it, and an exception where each line comes first and
    last.
    """
    trial = Trial(call, variant, second, tmp_path)
    lines = trial.lines()
    numbers = set(range(len(lines)))
    if error is InjectedError:
        last = {line: number for number, line in enumerate(lines)}
        numbers = {lines.index(line) for line in last} | set(last.values())
    found = failures(trial, sorted(numbers), lines, error, untouched)
    assert not found, f"{len(found)} of {len(numbers)}:\n" + "\n".join(sorted(set(found)))


def test_the_injector_reaches_every_stage(tmp_path: Path, untouched: Untouched) -> None:
    """These tests can fail: an attach executes hundreds of lines, in the core and in the plugin,
    and a model that is really half changed is seen.
    """
    lines = Trial("attach", "antipasto", False, tmp_path).lines()
    assert len(lines) > 300
    assert len({Path(file).parent for file, _ in lines}) > 1
    model = Three()
    guard = entered(untouched(model))
    model.layers[0].requires_grad_(False)
    assert not holds(guard)
    with pytest.raises(AssertionError):
        assert interrupted(lambda: ll.attach(Three(), "lora", r=2), 50, InjectedError) is not None


def test_load_state_dict_copies_after_everything_is_checked(blocks: Any) -> None:
    """Promise: an error of load_state_dict leaves every tensor as it was, wherever the fault
    stands.
    """
    adapter = ll.attach(blocks(), "lora", r=2)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "shape": lambda t: t[:1],
        "nan": lambda t: torch.full_like(t, torch.nan),
        "overflow": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
        "integers": lambda t: t.long(),
        "complex": lambda t: t.to(torch.complex64),
        "meta": lambda t: t.to("meta"),
        "no tensor": lambda _: 3,  # type: ignore[arg-type, return-value]
        "none": lambda _: None,  # type: ignore[arg-type, return-value]
    }
    for fault, change in faults.items():
        for key in before:
            wrong = {name: value + 1 for name, value in before.items()}
            wrong[key] = change(wrong[key])
            with pytest.raises(ll.AdapterFileError, match=key.replace(".", r"\.")):
                adapter.load_state_dict(wrong)
            for name, value in adapter.state_dict().items():
                assert torch.equal(value, before[name]), f"{fault} in {key}: {name} was written"
    for wrong in (None, 3, [], "x"):
        with pytest.raises(ll.LoraLiteError):
            adapter.load_state_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failing_exit_of_a_kind_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Promise: whichever layer's `exit` raises on detach, the other layers are left as well, the
    base's requires_grad is restored, and the error is not lost."""
    from lora_lite import layers

    exits: list[nn.Module] = []

    def failing(_: object, module: nn.Module) -> None:
        exits.append(module)
        if len(exits) == nth:
            raise ZeroDivisionError("exit")

    model = Three()
    flags = [p.requires_grad for p in model.parameters()]
    adapter = ll.attach(model, "lora", r=2)
    monkeypatch.setattr(layers.Linear, "exit", failing)
    with pytest.raises(ZeroDivisionError, match="exit"):
        adapter.detach()
    assert exits == list(model.layers)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not ll.adapters(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("what", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_hook_that_cannot_be_registered(
    untouched: Untouched, monkeypatch: pytest.MonkeyPatch, what: str, nth: int
) -> None:
    """Promise: the hook that was registered before the failing one is not lost on the layer."""
    real, count = getattr(nn.Module, what), 0

    def sometimes(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, what, sometimes)
    model = Three()
    with untouched(model), pytest.raises(MemoryError):
        ll.attach(model, "lora", r=2)


@pytest.mark.parametrize("nth", range(6))
def test_requires_grad_that_fails(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Promise: an interrupt while flags are set or restored leaves them right: after attach as they
    were, after detach as they were or still attached, and a second call does the rest."""
    real, count = Tensor.requires_grad_, 0

    def sometimes(self: Tensor, value: bool = True) -> Tensor:
        nonlocal count
        count += 1
        if count == nth + 1:
            raise KeyboardInterrupt
        return real(self, value)

    model = Three()
    flags = [p.requires_grad for p in model.parameters()]
    for call in ("attach", "detach"):
        adapter = ll.attach(model, "lora", r=2) if call == "detach" else None
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "requires_grad_", sometimes)
            try:
                adapter.detach() if adapter else ll.attach(model, "lora", r=2)
            except KeyboardInterrupt:
                assert adapter is not None or not ll.adapters(model)
        for name in list(ll.adapters(model)):
            ll.detach(model, name)
        assert [p.requires_grad for p in model.parameters()] == flags
