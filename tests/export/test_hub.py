"""The hub client against a server that speaks the hub's API on 127.0.0.1."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")

from samescore.export import hub
from samescore.runtime.errors import CheckpointError, MissingDependencyError, UsageError

from ..conftest import tiny_adapter

REPO = "someone/classifier"
FIRST, SECOND = "1" * 40, "2" * 40
WEIGHTS = bytes(range(256)) * 4096
CHECKPOINT = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"model_max_length": 512}',
    "special_tokens_map.json": b'{"pad_token": "[PAD]"}',
    "README.md": b"# A card",
    "model.safetensors": WEIGHTS,
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "model.onnx": b"graph",
    "flax_model.msgpack": b"flax",
    "consolidated.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"another model",
    "modeling_custom.py": b"raise SystemExit",
    "training_args.bin": b"pickle",
    ".gitattributes": b"",
}


@dataclass
class Repo:
    """A model: commits and branches, who may read it, and the faults of its server."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {FIRST: dict(CHECKPOINT)})
    branches: dict[str, str] = field(default_factory=lambda: {"main": FIRST})
    gated: bool = False
    members: set[str] = field(default_factory=set)
    # File name → how many of its next downloads stop half-way, by an orderly close or by a reset.
    cut: Counter[str] = field(default_factory=Counter)
    reset: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    status: int


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {REPO: Repo()}
        self.tokens = {"hf_member", "hf_stranger"}
        self.down = False
        self.after_resolving: Callable[[], None] = lambda: None
        self.log: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> Counter[str]:
        """How often each file's bytes were asked for, by its path in the repository."""
        found = [re.search(r"/(?:resolve|cdn)/[0-9a-f]{40}/(.+)", r.path) for r in self.log if r.method == "GET"]
        return Counter(match[1] for match in found if match)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if self.path.startswith("/api/") and not self.path.startswith("/api/models/"):
            # huggingface_hub also asks for things that have nothing to do with a model.
            return self.send_error(404)
        if self.server.down:
            return self._refuse(503, None, "down for maintenance")
        if token and token not in self.server.tokens:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve|cdn)/([^/]+)(?:/(.+))?)?", self.path
        )
        assert match, self.path
        name, what, revision, file = match.groups()
        repo = self.server.repos.get(name)
        if repo is None:
            # The hub tells nobody without an account which models exist.
            return self._refuse(404 if token else 401, "RepoNotFound" if token else None, "Repository not found")
        commit = repo.branches.get(revision or "main", revision)
        if commit not in repo.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what in ("resolve", "cdn"):
            return self._file(repo, commit, file, token, redirect=what == "resolve")
        files = repo.commits[commit]
        document: Any = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": [{"rfilename": path} for path in files],
        }
        if what == "tree":
            document = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})
        return None if what == "tree" else self.server.after_resolving()

    def _file(self, repo: Repo, commit: str, name: str, token: str | None, *, redirect: bool) -> None:
        if repo.gated and token not in repo.members:
            return self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        data = repo.commits[commit][name]
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{sha256}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if redirect and name.endswith(".safetensors"):
            # Large files lie elsewhere, as the hub's do.
            location = self.path.replace("/resolve/", "/cdn/")
            headers |= {"Location": location, "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"'}
            return self._send(302, b"", headers)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        faults = repo.cut if repo.cut[name] else repo.reset
        if self.command == "GET" and faults[name]:
            faults[name] -= 1
            return self._send_half(status, data[start:], headers, abort=faults is repo.reset)
        return self._send(status, data[start:], headers)

    def _send_half(self, status: int, body: bytes, headers: dict[str, str], *, abort: bool) -> None:
        self._head(status, len(body), headers)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if abort:
            # A reset discards what the client has not read yet: let it read the half.
            time.sleep(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, b"", headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._head(status, len(body), headers)
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.log.append(Request(self.command, self.path, self.headers.get("Range"), token, status))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Hub]:
    served = Hub()
    thread = Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def only_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Online, but 127.0.0.1 is the whole network; no token, no waiting, no connection left over from another test."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _detect_agent, _http

    connect = socket.create_connection
    elsewhere = []

    def guarded(address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
        if address[0] != "127.0.0.1":
            elsewhere.append(address)
            raise ConnectionRefusedError
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", guarded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # It asks HF_ENDPOINT, whatever endpoint it is given, which programs are AI agents.
    monkeypatch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.0)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
    assert elsewhere == []


@pytest.fixture
def fetch(server: Hub, only_this_machine: None, tmp_path: Path) -> Any:
    """`hub.fetch` from the test's server into the test's cache."""

    def call(repo_id: str = REPO, revision: str | None = None, **kwargs: Any) -> hub.HubSnapshot:
        settings = {"endpoint": server.url, "cache_dir": tmp_path / "cache", "progress": False, **kwargs}
        return hub.fetch(repo_id, revision, **settings)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["owner/name", "meta-llama/Llama-3.2-1B", "a/b", "o_o/m.2-x_y", "A1/b"])
def test_hub_ids(source: str) -> None:
    assert hub.is_hub_id(source)


@pytest.mark.parametrize(
    "source",
    ["", "bert-base-uncased", "./a/b", "../b", "/a/b", "~/b", "a/b/c", "a\\b", "a/", "/b", "a b/c", "a/b.git", "a/b..c",
     "a--b/c", "-a/b", "a/b-", ".a/b", "x" * 60 + "/" + "y" * 60, "http://a/b", "a/b\n"],
)  # fmt: skip
def test_not_hub_ids(source: str) -> None:
    assert not hub.is_hub_id(source)


def test_every_hub_id_is_one_for_huggingface_hub_too() -> None:
    from huggingface_hub.utils import validate_repo_id

    for source in ("owner/name", "meta-llama/Llama-3.2-1B", "o_o/m.2-x_y"):
        validate_repo_id(source)


def test_no_hub_id_is_a_usage_error(fetch: Any, server: Hub) -> None:
    with pytest.raises(UsageError, match="owner/name"):
        fetch("./folder")
    assert not server.log


def test_fetches_the_checkpoint_and_nothing_else(fetch: Any, server: Hub) -> None:
    server.repos[REPO].commits[FIRST] = CHECKPOINT | UNWANTED
    snapshot = fetch()
    assert (snapshot.repo_id, snapshot.revision) == (REPO, FIRST)
    assert contents(snapshot.folder) == CHECKPOINT
    assert server.downloads().keys() == CHECKPOINT.keys()
    assert not [request for request in server.log if request.method == "HEAD" and "pytorch_model" in request.path]


def test_files_come_from_the_resolved_commit_not_from_the_branch(fetch: Any, server: Hub) -> None:
    fetch(revision="main")
    files = [request.path for request in server.log if "/resolve/" in request.path or "/cdn/" in request.path]
    assert files
    assert all(FIRST in path for path in files)


def test_a_moving_branch_is_followed_and_a_commit_is_not(fetch: Any, server: Hub) -> None:
    repo = server.repos[REPO]
    assert fetch(revision="main").revision == FIRST
    repo.commits[SECOND] = CHECKPOINT | {"model.safetensors": b"new weights"}
    repo.branches["main"] = SECOND
    moved = fetch(revision="main")
    assert moved.revision == SECOND
    assert (moved.folder / "model.safetensors").read_bytes() == b"new weights"
    pinned = fetch(revision=FIRST)
    assert pinned.revision == FIRST
    assert (pinned.folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_branch_that_moves_during_the_fetch(fetch: Any, server: Hub) -> None:
    repo = server.repos[REPO]
    repo.commits[SECOND] = CHECKPOINT | {"model.safetensors": b"new weights"}
    server.after_resolving = lambda: repo.branches.update(main=SECOND)
    snapshot = fetch(revision="main")
    assert snapshot.revision == FIRST
    assert contents(snapshot.folder) == CHECKPOINT


def test_a_hub_that_goes_down_during_the_fetch_yields_no_half_checkpoint(
    fetch: Any, server: Hub, tmp_path: Path
) -> None:
    from huggingface_hub import hf_hub_download

    for name in ("config.json", "tokenizer.json"):
        hf_hub_download(REPO, name, revision=FIRST, cache_dir=tmp_path / "cache", endpoint=server.url)
    server.after_resolving = lambda: setattr(server, "down", True)
    with pytest.raises(CheckpointError, match=r"stopped before .*model\.safetensors.*again"):
        fetch()


def test_a_tag_and_no_revision(fetch: Any, server: Hub) -> None:
    server.repos[REPO].commits[SECOND] = CHECKPOINT | {"config.json": b'{"second": 1}'}
    server.repos[REPO].branches["refs/pr/1"] = SECOND
    assert fetch().revision == FIRST
    with pytest.raises(CheckpointError):
        fetch(revision="v1.0")
    server.repos[REPO].branches["v1.0"] = SECOND
    assert (fetch(revision="v1.0").folder / "config.json").read_bytes() == b'{"second": 1}'


def test_a_second_fetch_downloads_nothing(fetch: Any, server: Hub) -> None:
    first = fetch()
    before = server.downloads()
    assert fetch() == first
    assert server.downloads() == before


def test_a_cached_commit_needs_no_network(fetch: Any, server: Hub) -> None:
    first = fetch()
    server.log.clear()
    assert fetch(revision=FIRST) == first
    assert server.log == []


def test_shards_and_their_index(fetch: Any, server: Hub) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    files |= {name: name.encode() for name in shards}
    server.repos[REPO].commits[FIRST] = files | {
        "consolidated.safetensors": b"twice",
        "model.fp16.safetensors": b"half",
    }
    assert contents(fetch().folder) == files


def test_an_adapter_in_a_subfolder(fetch: Any, server: Hub) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"lora", "tokenizer.json": b"{}"}
    files = {f"checkpoint-1/{name}": data for name, data in adapter.items()} | {"README.md": b"card"}
    server.repos[REPO].commits[FIRST] = files | {
        "checkpoint-1/optimizer.pt": b"pickle",
        "checkpoint-2/x.safetensors": b"",
    }
    snapshot = fetch(subfolder="checkpoint-1/")
    assert contents(snapshot.folder) == adapter
    assert snapshot.folder.name == "checkpoint-1"
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors; checkpoint-1, checkpoint-2 would"):
        fetch()


def test_a_pickle_is_refused_unread_with_the_way_to_convert_it(fetch: Any, server: Hub) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"}
    server.repos[REPO].commits[FIRST] = files
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin.*save_pretrained\(FOLDER, safe_serialization=True\)"
    ):
        fetch()
    assert not server.downloads()


def test_weights_without_a_config_are_refused_unread(fetch: Any, server: Hub) -> None:
    server.repos[REPO].commits[FIRST] = {"model.safetensors": WEIGHTS}
    with pytest.raises(CheckpointError, match=r"neither config\.json nor adapter_config\.json"):
        fetch()
    assert not server.downloads()


def test_a_gate_without_a_token(fetch: Any, server: Hub) -> None:
    server.repos[REPO].gated = True
    with pytest.raises(CheckpointError) as caught:
        fetch()
    said = str(caught.value)
    assert "gated" in said
    assert "you have no token" in said
    assert f"accept the terms on {server.url}/{REPO}" in said
    assert "HF_TOKEN" in said
    assert "hf auth login" in said


def test_a_gate_that_has_not_let_you_in(fetch: Any, server: Hub) -> None:
    server.repos[REPO].gated = True
    with pytest.raises(CheckpointError) as caught:
        fetch(token="hf_stranger")
    said = str(caught.value)
    assert "has not been granted access (yet)" in said
    assert f"{server.url}/{REPO}" in said
    assert "you have no token" not in said


def test_a_gate_opens_for_a_member(fetch: Any, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO] = Repo(gated=True, members={"hf_member"})
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    assert contents(fetch().folder) == CHECKPOINT
    with pytest.raises(CheckpointError, match="you have no token"):
        fetch(token=False, cache_dir=fetch().folder.parents[4] / "other")


def test_a_wrong_token(fetch: Any) -> None:
    with pytest.raises(CheckpointError, match=r"does not accept your token.*HF_TOKEN"):
        fetch(token="hf_mistyped")


@pytest.mark.parametrize("token", [False, "hf_member"])
def test_no_such_repository(fetch: Any, token: str | bool) -> None:
    with pytest.raises(CheckpointError, match=r"no model 'someone/clasifier'.*spelling.*private.*\./someone/clasifier"):
        fetch("someone/clasifier", token=token)


@pytest.mark.parametrize("revision", ["nightly", "3" * 40])
def test_no_such_revision(fetch: Any, revision: str) -> None:
    with pytest.raises(CheckpointError, match=f"{REPO} has no revision '{revision}'"):
        fetch(revision=revision)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_cut_off_download_goes_on_where_it_stopped(
    fetch: Any, server: Hub, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # A chunk that has not come whole is asked for again.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    server.repos[REPO].commits[FIRST]["tokenizer.json"] = WEIGHTS + b"tokenizer"
    server.repos[REPO].cut[name] = 1
    folder = fetch().folder
    requests = [request for request in server.log if request.method == "GET" and request.path.endswith(name)]
    ranges = [request.range for request in requests if request.status in (200, 206)]
    data = server.repos[REPO].commits[FIRST][name]
    assert ranges == [None, f"bytes={len(data) // 2 // 65536 * 65536}-"]
    assert (folder / name).read_bytes() == data


def test_a_reset_connection_is_tried_again(fetch: Any, server: Hub) -> None:
    server.repos[REPO].reset["model.safetensors"] = 1
    folder = fetch().folder
    assert server.downloads()["model.safetensors"] >= 2
    assert contents(folder) == CHECKPOINT


def test_a_connection_that_always_breaks_is_an_error_and_leaves_no_checkpoint(fetch: Any, server: Hub) -> None:
    server.repos[REPO].reset["model.safetensors"] = 100
    with pytest.raises(CheckpointError, match=f"{server.url} cannot be reached"):
        fetch()
    assert server.downloads()["model.safetensors"] == hub.ATTEMPTS
    with pytest.raises(CheckpointError):
        fetch(revision=FIRST)
    server.repos[REPO].reset.clear()
    server.log.clear()
    assert contents(fetch(revision=FIRST).folder) == CHECKPOINT
    assert server.downloads() == {"model.safetensors": 1}, "the files before the break were kept"


def test_an_unreachable_hub_with_nothing_cached(fetch: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(CheckpointError, match=f"{endpoint} cannot be reached.*holds no complete copy"):
        fetch(endpoint=endpoint)


def test_an_unreachable_hub_with_a_commit_in_the_cache(fetch: Any, server: Hub) -> None:
    first = fetch()
    server.down = True
    with pytest.raises(CheckpointError, match=f"answered 503.*cache holds {FIRST}"):
        fetch(revision="main")
    assert fetch(revision=FIRST) == first
    with pytest.raises(CheckpointError, match=f"answered 503.*cache holds {FIRST}"):
        fetch(revision=SECOND)


def test_offline_mode(fetch: Any, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*no complete copy"):
        fetch()
    assert server.log == []


def test_offline_with_a_commit_that_another_program_cached(
    fetch: Any, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, hf_hub_download

    for name in ("config.json", "model.safetensors"):
        hf_hub_download(REPO, name, revision=FIRST, cache_dir=tmp_path / "cache", endpoint=server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert contents(fetch(revision=FIRST).folder).keys() == {"config.json", "model.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert contents(fetch(revision=FIRST).folder) == CHECKPOINT, "online it is completed"


def test_offline_with_a_shard_missing(fetch: Any, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_hub_download

    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, **dict.fromkeys(shards, b"weights")}
    server.repos[REPO].commits[FIRST] = files
    for name in ("config.json", "model.safetensors.index.json", shards[0]):
        hf_hub_download(REPO, name, revision=FIRST, cache_dir=tmp_path / "cache", endpoint=server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no complete copy"):
        fetch(revision=FIRST)


def test_a_mirror_that_answers_another_commit(fetch: Any, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].commits[SECOND] = dict(CHECKPOINT)
    server.repos[REPO].branches[SECOND] = FIRST
    with pytest.raises(CheckpointError, match="HF_ENDPOINT"):
        fetch(revision=SECOND)
    assert not server.downloads()


def test_nothing_is_printed_or_logged(
    fetch: Any, server: Hub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server.repos[REPO].cut["model.safetensors"] = 1
    logging.getLogger("huggingface_hub").propagate = True
    try:
        fetch()
        server.repos[REPO].gated = True
        with pytest.raises(CheckpointError):
            fetch(cache_dir=fetch().folder.parents[4] / "other")
    finally:
        logging.getLogger("huggingface_hub").propagate = False
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'samescore\[export\]'"):
        hub.fetch(REPO)


def test_the_environment_is_read_as_huggingface_hub_reads_it(server: Hub, tmp_path: Path) -> None:
    server.repos[REPO] = Repo(gated=True, members={"hf_member"})
    code = "from samescore.export.hub import fetch; s = fetch('someone/classifier'); print(s.revision); print(s.folder)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_member",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    revision, folder = done.stdout.splitlines()
    assert revision == FIRST
    assert Path(folder).is_relative_to(tmp_path / "home" / "hub")
    assert contents(Path(folder)) == CHECKPOINT
    assert {request.token for request in server.log} == {"hf_member"}


def test_samescore_export_from_the_hub(
    server: Hub, bert_checkpoint: Path, texts_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The whole command against the server: the bundle records the commit, gated repositories say what to do."""
    files = {path.name: path.read_bytes() for path in bert_checkpoint.iterdir() if path.is_file()}
    server.repos[REPO].commits[SECOND] = files
    server.repos[REPO].branches["main"] = SECOND
    server.repos["someone/gated"] = Repo(gated=True)
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }

    def export(repo: str) -> subprocess.CompletedProcess[str]:
        golden, calibration = texts_files
        command = [sys.executable, "-m", "samescore", "export", repo, "-o", str(tmp_path / "bundle")]
        options = ["--profile", "refusal", "--golden", str(golden), "--calibration", str(calibration)]
        options += ["--tokenization-texts", "500"]
        return subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    done = export(REPO)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["source"]["kind"] == "hub" and manifest["source"]["name"] == REPO
    assert manifest["source"]["revision"] == SECOND
    gated = export("someone/gated")
    assert gated.returncode == 3 and "HF_TOKEN" in gated.stderr and "Traceback" not in gated.stderr
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text()) == manifest


BASE = "owner/base"


@pytest.fixture
def adapter_on_the_hub(server: Hub, llama_base: Path, tmp_path: Path) -> dict[str, Any]:
    """REPO holds an adapter in `checkpoint-9` over a gated base; what `adapter_config.json` says."""
    folder = tiny_adapter(llama_base, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    write_adapter(server, folder, config)
    files = {path.name: path.read_bytes() for path in llama_base.iterdir() if path.is_file()}
    server.repos[BASE] = Repo({SECOND: files, FIRST: files}, {"main": SECOND}, gated=True, members={"hf_member"})
    return config


def write_adapter(server: Hub, folder: Path, config: dict[str, Any]) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files["adapter_config.json"] = json.dumps(config).encode()
    server.repos[REPO].commits[FIRST] = {f"checkpoint-9/{name}": data for name, data in files.items()}


@pytest.fixture
def open_source(fetch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`samescore.sources.open_source` on the test's server."""
    from samescore import adapted, sources

    def call(source: str = REPO, token: str | bool = False, **options: Any) -> Any:
        for module in (sources, adapted):
            monkeypatch.setattr(module, "fetch", functools.partial(fetch, token=token))
        adapter = adapted.AdapterOptions(**options)
        return sources.open_source(source, profile=None, revision=None, adapter=adapter, progress=False)

    return call


@pytest.mark.torch
def test_an_adapter_and_its_base_from_the_hub(server: Hub, adapter_on_the_hub: Any, open_source: Any) -> None:
    source, checkpoint, _ = open_source(token="hf_member", subfolder="checkpoint-9")
    assert (source.kind, source.name, source.revision) == ("hub", f"{REPO}/checkpoint-9", FIRST)
    assert (source.base.kind, source.base.name, source.base.revision) == ("hub", BASE, SECOND)
    assert checkpoint.architecture == "LlamaForSequenceClassification"
    assert source.notes[0] == f"adapter_config.json names the base {BASE} and no revision of it"


@pytest.mark.torch
def test_a_gated_base_is_named_with_both_ways_on(
    server: Hub, adapter_on_the_hub: Any, open_source: Any, llama_base: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(subfolder="checkpoint-9")
    said = str(caught.value)
    assert f"the base {BASE} of the adapter checkpoint-9" in said and f"{BASE} is gated" in said
    assert f"accept the terms on {server.url}/{BASE}" in said and "HF_TOKEN" in said and "--base FOLDER" in said
    with pytest.raises(CheckpointError, match=f"{BASE} is gated, and the account of your token.*--base FOLDER"):
        open_source(token="hf_stranger", subfolder="checkpoint-9")
    source, _, _ = open_source(subfolder="checkpoint-9", base=llama_base)
    assert (source.base.kind, source.base.name, source.base.revision) == ("folder", "base", None)


@pytest.mark.torch
def test_the_base_s_revision_is_the_one_that_the_adapter_names(
    server: Hub, adapter_on_the_hub: dict[str, Any], open_source: Any, tmp_path: Path
) -> None:
    write_adapter(server, tmp_path / "adapter", adapter_on_the_hub | {"revision": FIRST})
    server.repos["owner/other"] = Repo({SECOND: server.repos[BASE].commits[SECOND]}, {"main": SECOND})
    named, _, _ = open_source(token="hf_member", subfolder="checkpoint-9")
    assert named.base.revision == FIRST
    asked, _, _ = open_source(token="hf_member", subfolder="checkpoint-9", base="owner/other")
    assert (asked.base.name, asked.base.revision) == ("owner/other", SECOND)


@pytest.mark.torch
def test_an_adapter_that_samescore_cannot_fold_is_refused_before_its_base_is_fetched(
    server: Hub, adapter_on_the_hub: dict[str, Any], open_source: Any, tmp_path: Path
) -> None:
    write_adapter(server, tmp_path / "adapter", adapter_on_the_hub | {"use_dora": True})
    with pytest.raises(CheckpointError, match="DoRA"):
        open_source(token="hf_member", subfolder="checkpoint-9")
    assert not [request for request in server.log if BASE in request.path]


@pytest.mark.torch
def test_the_adapter_s_subfolder_is_asked_for(server: Hub, adapter_on_the_hub: Any, open_source: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"checkpoint-9 would \(name an adapter's folder with --adapter-subfolder\)"
    ):
        open_source()


def test_an_adapter_as_a_pickle(fetch: Any, server: Hub) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle", "training_args.bin": b"pickle"}
    server.repos[REPO].commits[FIRST] = files
    with pytest.raises(CheckpointError, match=r"its adapter as a pickle \(adapter_model\.bin\).*PeftModel"):
        fetch()
    assert not server.downloads()
