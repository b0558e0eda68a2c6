"""Checkpoints from the hub, pinned to a commit. The one place that talks to it."""

from __future__ import annotations

import glob
import logging
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samescore.export.checkpoint import INDEX_NAME
from samescore.runtime.errors import CheckpointError, MissingDependencyError, SamescoreError, UsageError

# What export reads, besides the weights. Nothing here can run code.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
    "README.md",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a Trainer leaves beside the weights.
TRAINING_FILES = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
# A connection that breaks in the middle of a file costs that file; the files before it are kept.
ATTEMPTS = 3
RETRY_SECONDS = 1.0
RESOLVE_TIMEOUT_SECONDS = 15.0
RETRYABLE_STATUS = (408, 429)

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class HubSnapshot:
    """A checkpoint folder on this machine, and the hub commit (40 hex digits) that its files are of."""

    repo_id: str
    revision: str
    folder: Path


def is_hub_id(source: str) -> bool:
    """Whether `source` is written like a hub id, `owner/name`. A relative folder can be too: write that as `./a/b`."""
    return bool(
        len(source) <= 96
        and _HUB_ID.fullmatch(source)
        and ".." not in source
        and "--" not in source
        and not source.endswith(".git")
    )


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    endpoint: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> HubSnapshot:
    """Download what export needs of a checkpoint, all of one commit, into the hub's cache.

    revision: branch, tag or commit; None is the main branch. A commit that the cache holds whole needs no network; a
    branch or tag is always asked for, because it may have moved. subfolder: where in the repository the checkpoint
    lies. endpoint, token, cache_dir: in place of HF_ENDPOINT, HF_TOKEN (or `hf auth login`) and HF_HOME; `token=False`
    sends none. progress: bars on stderr when it is a terminal.

    Raises UsageError for something that is no hub id, MissingDependencyError without the extra `export`, and
    CheckpointError with the way out for everything else: no such model or revision, a gate, no network, no safetensors.
    """
    _require_hub()
    if not is_hub_id(repo_id):
        raise UsageError(f"{repo_id!r} is no hub id; those are written owner/name")
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    repository = _Repository(repo_id, revision, subfolder, endpoint, token, cache_dir)
    with _quiet():
        if repository.pinned and (folder := repository.cached(repository.pinned)):
            return HubSnapshot(repo_id, repository.pinned, folder)
        try:
            commit, names = repository.resolve()
            folder = repository.download(commit, repository.wanted(names), progress=progress)
        except SamescoreError:
            raise
        except (HTTPError, OSError, ValueError) as error:
            if not repository.pinned or not _unreachable(error):
                raise CheckpointError(repository.explain(error)) from error
            cached = repository.cached(repository.pinned, unlisted=True)
            if cached is None:
                raise CheckpointError(repository.explain(error)) from error
            return HubSnapshot(repo_id, repository.pinned, cached)
    return HubSnapshot(repo_id, commit, folder)


class _Repository:
    """One revision of one repository: where it is on the hub and in the cache."""

    def __init__(
        self,
        repo_id: str,
        revision: str | None,
        subfolder: str | None,
        endpoint: str | None,
        token: str | bool | None,
        cache_dir: str | Path | None,
    ):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.file_download import repo_folder_name

        self.repo_id = repo_id
        self.revision = revision
        self.pinned = revision if revision and _COMMIT.fullmatch(revision) else None
        self._prefix = f"{subfolder.strip('/')}/" if subfolder and subfolder.strip("/") else ""
        self._token = token
        self._cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
        self._snapshots = self._cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots"
        self._api = HfApi(endpoint=endpoint, token=token, library_name="samescore")
        self._page = f"{self._api.endpoint}/{repo_id}"

    def resolve(self) -> tuple[str, list[str]]:
        """The commit that the revision means now, and the names of its files. Raises what huggingface_hub raises."""
        info = self._api.model_info(self.repo_id, revision=self.revision, timeout=RESOLVE_TIMEOUT_SECONDS)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit) or commit != (self.pinned or commit):
            raise CheckpointError(
                f"{self._api.endpoint} answered commit {commit!r} for revision {self.revision or 'main'!r} of "
                f"{self.repo_id}: that is no hub, or a broken mirror of one. Check HF_ENDPOINT"
            )
        return commit, [sibling.rfilename for sibling in info.siblings or []]

    def wanted(self, names: Iterable[str]) -> list[str]:
        """The files to download, out of all names in the repository.

        CheckpointError when there are no weights in safetensors, or nothing that describes them.
        """
        names = list(names)
        here = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        here = [name for name in here if "/" not in name]
        weights = _weights(here)
        if not weights:
            raise CheckpointError(self._no_weights(names, here))
        texts = [name for name in here if name in TEXT_FILES or re.fullmatch(r"tokenizer\w*\.json", name)]
        if "config.json" not in texts and "adapter_config.json" not in texts:
            raise CheckpointError(
                f"{self._where()} is no checkpoint: it holds neither config.json nor adapter_config.json"
            )
        return [self._prefix + name for name in (*texts, *weights)]

    def download(self, commit: str, wanted: list[str], *, progress: bool) -> Path:
        """Those files at that commit; the checkpoint folder. Raises what huggingface_hub raises."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

        for attempts_left in reversed(range(ATTEMPTS)):
            try:
                snapshot_download(
                    self.repo_id,
                    revision=commit,
                    allow_patterns=[glob.escape(name) for name in wanted],
                    cache_dir=self._cache,
                    endpoint=self._api.endpoint,
                    token=self._token,
                    tqdm_class=None if progress else _silent_bar(),
                )
                break
            except HTTPError as error:
                if isinstance(error, HfHubHTTPError) or not attempts_left:
                    raise
                time.sleep(RETRY_SECONDS)
        # When the hub stops answering half-way, huggingface_hub returns what an earlier download left here.
        missing = [name for name in wanted if not (self._snapshots / commit / name).is_file()]
        if missing:
            raise CheckpointError(
                f"the download of {self.repo_id} stopped before {', '.join(missing)}. Run it again: what came is kept"
            )
        return self._folder(commit)

    def cached(self, commit: str, *, unlisted: bool = False) -> Path | None:
        """The checkpoint folder if the cache holds the commit whole, else None.

        Whole means every file that export wants of the commit's listing. `unlisted`: without a listing (another program
        downloaded it), be content with a description and all weights.
        """
        names = self._listing(commit)
        if names is None:
            root = self._snapshots / commit
            if not unlisted or not root.is_dir():
                return None
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        try:
            wanted = self.wanted(names)
        except CheckpointError:
            return None
        whole = all((self._snapshots / commit / name).is_file() for name in wanted)
        return self._folder(commit) if whole and _has_all_shards(self._folder(commit)) else None

    def explain(self, error: Exception) -> str:
        """What happened and what to do about it."""
        from huggingface_hub.errors import (
            DisabledRepoError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        error = _cause(error)
        if _unreachable(error):
            return self._explain_unreachable(error)
        if not isinstance(error, HfHubHTTPError):
            return f"{self.repo_id} could not be downloaded from {self._api.endpoint}: {_first_line(error)}"
        status = error.response.status_code
        if isinstance(error, GatedRepoError):
            return self._explain_gate(error, status)
        if isinstance(error, DisabledRepoError):
            return f"the hub has disabled {self.repo_id}; {self._page} says why"
        if isinstance(error, RevisionNotFoundError):
            return (
                f"{self.repo_id} has no revision {self.revision!r}. Its branches, tags and commits are on {self._page}"
            )
        if status == 401 and _sent_token(error):
            return f"the hub does not accept your token: {_NEW_TOKEN}"
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            return (
                f"{self._api.endpoint} shows no model {self.repo_id!r}: check the spelling. If it is private, "
                f"{_LOG_IN} that may read it. If you mean a folder, write ./{self.repo_id}"
            )
        if status == 403:
            return f"your token may not read {self.repo_id}: give it the permission, or use another one"
        return f"{self._api.endpoint} answered {status} for {self.repo_id}: {_first_line(error)}"

    def _explain_gate(self, error: Any, status: int) -> str:
        if status == 403:
            return (
                f"{self.repo_id} is gated, and the account of your token has not been granted access (yet): accept "
                f"the terms on {self._page} with that account and wait for the approval. A fine-grained token also "
                "needs the permission to read gated repositories"
            )
        if _sent_token(error):
            return f"{self.repo_id} is gated, and the hub does not accept your token: {_NEW_TOKEN}"
        return (
            f"{self.repo_id} is gated, and you have no token: accept the terms on {self._page}, then {_LOG_IN} of "
            "the account that accepted them"
        )

    def _explain_unreachable(self, error: Exception) -> str:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        what = f"{self.repo_id} at {self.revision or 'main'}"
        if isinstance(error, OfflineModeIsEnabled):
            said = f"HF_HUB_OFFLINE is set, so {what} cannot be looked up"
        elif isinstance(error, HfHubHTTPError):
            said = f"{self._api.endpoint} answered {error.response.status_code} for {what}: try again later"
        else:
            said = f"{self._api.endpoint} cannot be reached for {what} ({_first_line(error)}): check the network"
        commits = self._cached_commits()
        if not commits:
            return f"{said}. The cache {self._cache} holds no complete copy"
        return f"{said}. The cache holds {' and '.join(commits)}: as the revision, a commit needs no network"

    def _no_weights(self, names: list[str], here: list[str]) -> str:
        pickles = [name for name in here if name.endswith(PICKLE_SUFFIXES) and name not in TRAINING_FILES]
        if pickles == ["adapter_model.bin"]:
            return (
                f"{self._where()} holds its adapter as a pickle (adapter_model.bin), which can run code when it is read. "
                f"Convert it where you trust it: PeftModel.from_pretrained(MODEL, {self.repo_id!r}).save_pretrained(FOLDER, "
                "safe_serialization=True), then export FOLDER"
            )
        if pickles:
            return (
                f"{self._where()} holds its weights as a pickle ({', '.join(pickles)}), which can run code when it "
                "is read. Convert it where you trust it: AutoModelForSequenceClassification.from_pretrained"
                f"({self.repo_id!r}).save_pretrained(FOLDER, safe_serialization=True), AutoTokenizer.from_pretrained"
                f"({self.repo_id!r}).save_pretrained(FOLDER), then export FOLDER"
            )
        folders = sorted({name.rpartition("/")[0] for name in names if name.endswith(".safetensors")} - {""})
        elsewhere = f"; {', '.join(folders)} would" if folders else ""
        if any(f"{folder}/adapter_config.json" in names for folder in folders):
            elsewhere += " (name an adapter's folder with --adapter-subfolder)"
        return f"{self._where()} holds no *.safetensors{elsewhere}"

    def _where(self) -> str:
        return f"{self.repo_id}/{self._prefix}".rstrip("/")

    def _folder(self, commit: str) -> Path:
        return self._snapshots / commit / self._prefix

    def _listing(self, commit: str) -> list[str] | None:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            files = get_cached_repo_tree(self.repo_id, revision=commit, cache_dir=self._cache)
        except CachedRepoTreeNotFoundError:
            return None
        return [file.path for file in files]

    def _cached_commits(self) -> list[str]:
        found = [path.name for path in self._snapshots.glob("*") if _COMMIT.fullmatch(path.name)]
        return sorted(commit for commit in found if self.cached(commit, unlisted=True))


_LOG_IN = "set HF_TOKEN (or run `hf auth login`) to a token"
_NEW_TOKEN = "set HF_TOKEN (or run `hf auth login`) to a valid one; it may be mistyped, expired or revoked"


def _weights(names: list[str]) -> list[str]:
    """The safetensors to read, once: the whole model, else its shards with their index, else all there are."""
    tensors = [name for name in names if name.endswith(".safetensors")]
    adapters = [name for name in tensors if name.startswith("adapter_model")]
    shards = [name for name in tensors if _SHARD.fullmatch(name)]
    if "model.safetensors" in tensors:
        return ["model.safetensors", *adapters]
    if INDEX_NAME in names:
        return [INDEX_NAME, *(shards or tensors)] if tensors else []
    return tensors


def _has_all_shards(folder: Path) -> bool:
    """Whether every file that an index in the folder names is there."""
    index = folder / INDEX_NAME
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return True
    named = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text(encoding="utf-8")))
    return all((folder / name).is_file() for name in named)


def _require_hub() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"the hub needs {error.name}: pip install 'samescore[export]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines of huggingface_hub: what matters is raised as an error."""
    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_logging.set_verbosity(level)


def _silent_bar() -> Any:
    from huggingface_hub import utils

    bar: Any = utils.tqdm  # type: ignore[attr-defined]

    class SilentBar(bar):  # type: ignore[misc]
        """A progress bar that draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar


def _cause(error: Exception) -> Exception:
    """What made huggingface_hub say that a file is not in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer (yet): no network, offline mode, overload, an outage."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in RETRYABLE_STATUS
    return isinstance(error, HTTPError | ConnectionError)


def _sent_token(error: Any) -> bool:
    return "authorization" in error.response.request.headers


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
