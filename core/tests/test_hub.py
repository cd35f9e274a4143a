"""The hub: pushed to and loaded from a stand-in for its endpoint, on this machine.

The stand-in keeps repositories in memory and answers what huggingface_hub asks. The clients are
processes of their own, as HF_ENDPOINT is read when the package is imported.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
from lora_lite import hub
from torch import nn

pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

Make = Callable[..., nn.Module]
TOKEN = "hf_of_the_stand_in"


class Endpoint(BaseHTTPRequestHandler):
    """What of the hub's interface is asked for. Repositories are `{id: [files of each commit]}`."""

    repositories: dict[str, list[dict[str, bytes]]]
    private: set[str]
    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            is_there = name in self.repositories
            self.repositories.setdefault(name, [{}])
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            url = {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name}
            return self.answer(url, 409 if is_there else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        _, _, _, user, name, what, *_ = path.split("/")
        repository = self.repositories[f"{user}/{name}"]
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": f["path"], **modes} for f in files]})
        assert what == "commit"
        files = dict(repository[-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository.append(files)
        sha = commit_of(repository)
        url = f"http://{self.headers['Host']}/{user}/{name}/commit/{sha}"
        return self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        user, name, *rest = parts[2:] if is_api else parts
        repository = self.repositories.get(f"{user}/{name}")
        if repository is None:
            return self.answer({"error": "Repository not found"}, 401, "RepoNotFound")
        if is_api:
            revision = rest[1] if len(rest) > 1 else "main"
            files = self.files_at(repository, revision)
            if files is None:
                return self.answer({"error": "Invalid rev id"}, 404, "RevisionNotFound")
            if rest[:1] == ["tree"]:
                listed = [
                    {"type": "file", "path": n, "size": len(d), "oid": sha_of(d)}
                    for n, d in files.items()
                ]
                return self.answer(listed)
            sha = revision if len(revision) == 40 else commit_of(repository)
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": f"{user}/{name}", "sha": sha, "siblings": siblings})
        files = self.files_at(repository, rest[1])
        data = (files or {}).get("/".join(rest[2:]))
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, "EntryNotFound")
        sha = rest[1] if len(rest[1]) == 40 else commit_of(repository)
        return self.send(data, commit=sha)

    def files_at(
        self, repository: list[dict[str, bytes]], revision: str
    ) -> dict[str, bytes] | None:
        if revision in ("main", "HEAD"):
            return repository[-1]
        for count in range(1, len(repository) + 1):
            if commit_of(repository[:count]) == revision:
                return repository[count - 1]
        return None

    def answer(self, content: object, status: int = 200, error: str = "") -> None:
        self.send(json.dumps(content).encode(), status, error)

    def send(self, data: bytes, status: int = 200, error: str = "", commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json" if not commit else "text/plain")
        self.send_header("ETag", f'"{sha_of(data)}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """The tests' output is not for the log of a server."""


def sha_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def commit_of(commits: list[dict[str, bytes]]) -> str:
    return sha_of(f"{len(commits)}".encode())


class Hub:
    """The stand-in, and clients of it."""

    def __init__(self, server: ThreadingHTTPServer, handler: type[Endpoint], home: Path) -> None:
        self.files = handler.repositories
        self.private = handler.private
        self.asked = handler.asked
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, code: str, folder: Path, **environment: str) -> str:
        """What a program prints that has `model`, a fresh base, and `logits(model)`."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PREAMBLE + code],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**self.environment, **environment},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


PREAMBLE = """
import sys
import torch, lora_lite as ll
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)

def fresh():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model.config.name_or_path = "someone/tiny-llama"
    return model.eval()

def trained(model, name="lora", **fields):
    adapter = ll.attach(model, name, r=2, targets=r"[qv]_proj$", **fields)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return adapter

def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits

def refused(call):
    try:
        call()
    except ll.LoraLiteError as error:
        print(type(error).__name__, " ".join(str(error).split()))
    else:
        print("not refused")

model = fresh()
"""


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Hub]:
    class Own(Endpoint):
        repositories: dict[str, list[dict[str, bytes]]] = {}
        private: set[str] = set()
        asked: list[str] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub(server, Own, tmp_path / "home")
    server.shutdown()
    thread.join()
    server.server_close()


def card_of(files: dict[str, bytes]) -> tuple[dict[str, Any], str]:
    """The head of a card, as YAML, and its text."""
    _, head, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def test_there_and_back(standin: Hub, tmp_path: Path) -> None:
    """Promise: what was pushed loads by its id, and by an older revision, with the same logits."""
    out = standin.run(
        """
adapter = trained(model, alpha=3.0)
first = ll.push_to_hub(adapter, "me/mine", private=True, results={"accuracy": 0.41239, "n": 3})
expected = logits(model)
for parameter in adapter.parameters():
    torch.nn.init.ones_(parameter)
second = ll.push_to_hub(adapter, "me/mine")
newer = logits(model)
assert first != second
for name, wanted in (("me/mine", newer), ("me/mine@" + first.rpartition("/")[2], expected)):
    other = fresh()
    assert ll.load(other, name).variant == adapter.variant
    assert torch.equal(logits(other), wanted), name
print(first)
""",
        tmp_path,
    )
    assert out.startswith(standin.environment["HF_ENDPOINT"] + "/me/mine/commit/")
    first = standin.files["me/mine"][1]
    assert sorted(first) == ["README.md", "adapter.safetensors"]
    assert standin.private == {"me/mine"}
    head, text = card_of(first)
    assert head["base_model"] == "someone/tiny-llama"
    assert head["tags"] == ["lora-lite", "lora"]
    assert head["library_name"] == "lora-lite"
    for said in (
        "| method | lora(r=2, alpha=3.0",
        "| layers | 4 (q_proj x 2, v_proj x 2) |",
        "| trainable parameters | 256 |",
        "pip install lora-lite-core lora-lite-lora\n",
        "ll.load(model, 'me/mine')",
        "| accuracy | 0.4124 |",
        "| n | 3 |",
    ):
        assert said in text


def test_a_folder_of_peft(standin: Hub, tmp_path: Path) -> None:
    """Promise: as a folder of PEFT it is pushed for PEFT, and such a folder loads by its id."""
    pytest.importorskip("lora_lite_peft")
    standin.run(
        """
adapter = trained(model, "pissa")
ll.push_to_hub(adapter, "me/plain", format="peft", rank=8)
other = fresh()
assert ll.load(other, "me/plain").variant.name == "lora"
torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
""",
        tmp_path,
    )
    files = standin.files["me/plain"][-1]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    head, text = card_of(files)
    assert head["library_name"] == "peft"
    assert "lora-lite-peft" in text
    assert "| method | pissa(r=2" in text


def test_a_merged_checkpoint(standin: Hub, tmp_path: Path) -> None:
    """Promise: a whole checkpoint is pushed as one that transformers loads by its id."""
    standin.run(
        """
ll.push_to_hub(trained(model), "me/whole", format="merged")
plain = LlamaForCausalLM.from_pretrained("me/whole").eval()
torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
""",
        tmp_path,
    )
    head, text = card_of(standin.files["me/whole"][-1])
    assert head["library_name"] == "transformers"
    assert head["base_model_relation"] == "merge"
    assert "from_pretrained('me/whole')" in text


def test_a_card_that_is_there_is_left(standin: Hub, tmp_path: Path) -> None:
    """Promise: nobody's own words are overwritten, and a warning says so."""
    standin.files["me/mine"] = [{"README.md": b"my words"}]
    out = standin.run(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ll.push_to_hub(trained(model), "me/mine")
print(*(w.message for w in caught))
""",
        tmp_path,
    )
    assert "the card of me/mine was left as it is" in out
    files = standin.files["me/mine"][-1]
    assert files["README.md"] == b"my words"
    assert "adapter.safetensors" in files


def test_what_is_refused(standin: Hub, tmp_path: Path) -> None:
    """Promise: an error names the id and the reason; nothing is attached, made or pushed."""
    standin.files["me/empty"] = [{"README.md": b"nothing else", "model.safetensors": b"x"}]
    standin.files["me/broken"] = [{"adapter.safetensors": b"\\x08" + bytes(30)}]
    out = standin.run(
        """
adapter = trained(model)
before = {name: value.clone() for name, value in model.state_dict().items()}
other = fresh()
refused(lambda: ll.load(other, "me/nowhere"))
refused(lambda: ll.load(other, "me/empty"))
refused(lambda: ll.load(other, "me/broken"))
refused(lambda: ll.load(other, "me/empty@v9"))
refused(lambda: ll.push_to_hub(adapter, "no such name"))
refused(lambda: ll.push_to_hub(adapter, "me/mine", format="pfet"))
refused(lambda: ll.push_to_hub(adapter, "me/mine", results=3))
assert not ll.adapters(other)
""",
        tmp_path,
    )
    expected = [
        "AdapterFileError me/nowhere is neither a path that is there, nor an adapter on the",
        "AdapterFileError me/empty on the Hugging Face hub holds no adapter",
        "safetensors",
        "AdapterFileError me/empty@v9 is neither",
        "AdapterFileError adapter 'default' was not pushed to no such name",
        "PluginError there is no format 'pfet'",
        "AdapterError results=3 is neither",
    ]
    lines = out.splitlines()
    assert len(lines) == len(expected)
    for line, reason in zip(lines, expected, strict=True):
        assert reason in line
    assert set(standin.files) == {"me/empty", "me/broken"}


def test_without_a_login(standin: Hub, tmp_path: Path) -> None:
    """Promise: an answer of 401 becomes the words that help."""
    code = 'refused(lambda: ll.push_to_hub(trained(model), "me/mine"))'
    out = standin.run(code, tmp_path, HF_TOKEN="hf_another")
    assert "was not pushed to me/mine" in out
    assert "Log in with `hf auth login`" in out
    assert not standin.files


def test_offline(standin: Hub, tmp_path: Path) -> None:
    """Promise: what was downloaded once loads without a connection, and else an error says so."""
    code = """
expected = trained(model)
ll.push_to_hub(expected, "me/mine")
ll.load(fresh(), "me/mine")
"""
    standin.run(code, tmp_path)
    asked = len(standin.asked)
    code = """
ll.load(fresh(), "me/mine")
refused(lambda: ll.load(fresh(), "me/other"))
"""
    out = standin.run(code, tmp_path, HF_HUB_OFFLINE="1")
    assert "AdapterFileError me/other is neither a path that is there" in out
    assert len(standin.asked) == asked


def test_paths_are_no_ids(blocks: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: what may be a path on this machine is never asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (
        "runs/adapter",
        "a/b.safetensors",
        "./a/b",
        "/a/b",
        "a/b/c",
        "a",
        "a\\\\b",
        "../b",
    ):
        assert not hub.is_hub_id(path), path
    assert not hub.is_hub_id(Path("user/name"))
    assert hub.is_hub_id("user/name")
    assert hub.is_hub_id("user/name@refs/pr/1")
    with pytest.raises(ll.AdapterFileError, match="runs/adapter cannot be read: No such file"):
        ll.load(blocks(), "runs/adapter")


def test_the_package_is_named_where_it_is_missing(
    blocks: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ll.AdapterFileError, match="pip install huggingface_hub"):
        ll.load(blocks(), "user/name")
    with pytest.raises(ll.AdapterFileError, match="pip install huggingface_hub"):
        ll.push_to_hub(ll.attach(blocks(), "lora", r=2), "user/name")


def test_results_of_the_benchmark(blocks: Make, tmp_path: Path) -> None:
    """Promise: the folder of a run gives the card its figures; another folder is refused."""
    from lora_lite.model_card import model_card

    adapter = ll.attach(blocks(), "lora", r=2)
    record = {
        "config": {
            "preset": "tiny",
            "label": "lora:r=2",
            "steps": 300,
            "seed": 1,
            "train": {"path": "tiny"},
        },
        "test": {"outcomes": [{"correct": True}, {"correct": False}, {"correct": True}]},
        "validation": None,
    }
    (tmp_path / "result.json").write_text(json.dumps(record))
    card = model_card(adapter, "me/mine", None, tmp_path)
    assert "| benchmark | preset tiny, row lora:r=2 |" in card
    assert "| right answers | 2 of 3 |" in card
    assert "a base that is not on the hub" in card
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ll.AdapterError, match="not the record of a finished run"):
        model_card(adapter, "me/mine", None, tmp_path)
    with pytest.raises(ll.AdapterError, match="nor the folder of a run"):
        model_card(adapter, "me/mine", None, tmp_path / "nowhere")
