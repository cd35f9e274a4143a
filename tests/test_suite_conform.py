"""`lora-lite conform`: the suite's verdicts, as a report and an exit status."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from lora_lite.cli import main
from lora_lite.testing import PROMISES, conform
from lora_lite.testing.suite import Outcome

MODULE = """
import torch, lora_lite as ll
from lora_lite.testing import VariantTests

class Centred(ll.Variant, name="centred"):
    def tensors(self, site): return {"e": ll.TensorSpec((site.d_out,))}
    def init(self, site, derived, statistics, rng): return {"e": torch.zeros(site.d_out)}
    def delta_output(self, site, t, x, y): return (y - y.mean(0)) * t["e"]

class TestCentred(VariantTests):
    variant = Centred
    expected_failures = {
        "test_accumulated_gradients_add_up": "it looks at the batch",
        "test_fields_survive_json": "or not",
    }

nothing = 3
"""

FEW = (
    "fields_survive_json",
    "batch_is_its_rows_and_sequence_its_tokens",
    "accumulated_gradients_add_up",
)


@pytest.fixture
def few_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three promises, for the report is the same for each."""
    monkeypatch.setattr(conform, "PROMISES", {name: PROMISES[name] for name in FEW})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, as an author has it before there is a package."""
    (tmp_path / "my_centred.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_centred", raising=False)
    return "my_centred"


@pytest.mark.usefixtures("few_promises")
def test_a_variant_that_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """Each promise is ok, and the status 0."""
    assert main(["conform", "lora"]) == 0
    first, _, *lines, _, last = capsys.readouterr().out.splitlines()
    versions = [metadata.version(name) for name in ("lora-lite-lora", "lora-lite-core")]
    assert first == "lora of lora-lite-lora {}, with lora-lite-core {}".format(*versions)
    assert lines == [f"ok        {name}" for name in FEW]
    assert last.startswith("lora breaks none of 3 promises")


@pytest.mark.usefixtures("few_promises")
def test_a_broken_promise(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is reported with its values, the drawn case, and what the promise says; the status is 1.

    The summary says how long it took.
    """
    assert main(["conform", f"{module}:Centred"]) == 1
    told = capsys.readouterr()
    broken = "BROKEN    batch_is_its_rows_and_sequence_its_tokens\n"
    assert f"{broken}          AssertionError: rows one by one" in told.out
    assert "instead of" in told.out
    assert "Case(variant=Centred()" in told.out or sys.version_info < (3, 11)
    assert "Every token's output depends on this token alone" in told.out
    assert "Usually broken by a mean" in told.out
    names = "batch_is_its_rows_and_sequence_its_tokens, accumulated_gradients_add_up"
    assert re.search(rf"centred breaks 2 of 3 promises \(\d+ s\): {names}\n", told.err)


@pytest.mark.usefixtures("few_promises")
def test_declared_failures(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a test class count as declared; a declared one that passes is broken."""
    assert main(["conform", f"{module}:TestCentred"]) == 1
    told = capsys.readouterr()
    assert "declared  accumulated_gradients_add_up\n          it looks at the batch\n" in told.out
    assert (
        "STALE     fields_survive_json\n          test_fields_survive_json passes; take it out"
        in told.out
    )
    assert re.search(r"breaks 2 of 3 promises \(\d+ s\): fields_survive_json, batch_is", told.err)


def test_a_new_promise() -> None:
    """One that is broken is told, with the version that will insist on it, and is not counted as
    broken.
    """
    since = ".".join(metadata.version("lora-lite-core").split(".")[:2])
    outcome = Outcome(
        replace(PROMISES["macs_are_as_declared"], since=since),
        AssertionError("declared 1, counted 2"),
        None,
    )
    told = conform.report(outcome)
    assert told.startswith("new       macs_are_as_declared\n")
    assert "the next minor version fails here: declared 1, counted 2" in told


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("lroa", "there is no variant 'lroa'"),
        ("no_such_module:Centred", "No module named 'no_such_module'"),
        ("my_centred:Missing", "has no attribute 'Missing'"),
        (
            "my_centred:nothing",
            "is 3; expected a subclass of Variant that has a name, or of VariantTests",
        ),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_tested(
    name: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, and one sentence."""
    assert main(["conform", name]) == 1
    assert complaint in capsys.readouterr().err


def test_without_the_testing_extra(tmp_path: Path) -> None:
    """Where hypothesis is missing, the command says what to install; the others do not need it."""
    (tmp_path / "hypothesis.py").write_text(
        "raise ModuleNotFoundError('hidden', name='hypothesis')"
    )
    run = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lora_lite.cli import main; "
        "sys.exit(main(sys.argv[2:]))"
    )
    for arguments, status in ((["conform", "lora"], 1), (["variants", "--check"], 0)):
        command = [sys.executable, "-c", run, str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert ("needs hypothesis; pip install lora-lite-core[testing]" in done.stderr) is bool(
            status
        )
