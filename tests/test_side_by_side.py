"""The scripts that train by PEFT and by us, side by side, on a small model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lora_lite_benchmark.tiny import MODEL_DIR

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmark" / "side_by_side" / "compare.py"


@pytest.mark.slow
def test_both_sides_resume_and_keep_the_base_out(tmp_path: Path) -> None:
    """The page's claims that do not depend on the model: few lines changed, no base in a
    checkpoint, a resumed run of the same bits, no message of ours.
    """
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(MODEL_DIR), str(data)],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    found = {(row[0], row[1]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert set(found) == {(m, side) for m in ("SFT", "DPO") for side in ("PEFT", "lora-lite")}
    base_kB = (Path(MODEL_DIR) / "model.safetensors").stat().st_size / 1000
    for (_, side), row in found.items():
        assert row["resumed losses, weights"] == "same, same"
        assert int(row["lines changed"]) <= 4
        assert float(row["adapter kB"].replace(",", "")) < base_kB
        if side == "lora-lite":
            assert row["messages"] == "0", done.stdout
    for method in ("SFT", "DPO"):
        first = {found[method, side]["losses"].split()[0] for side in ("PEFT", "lora-lite")}
        assert len(first) == 1


def test_the_page_shows_what_the_script_prints() -> None:
    """The columns of the page's table are those of the script."""
    page = (ROOT / "docs" / "side-by-side.md").read_text(encoding="utf-8")
    columns = re.findall(
        r"^COLUMNS \+?= (\[.*\])", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE
    )
    names = [name for part in columns for name in json.loads(part)]
    assert f"| {' | '.join(names)} |" in page
