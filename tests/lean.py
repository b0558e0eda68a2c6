"""Another ONNX Runtime than the installed one, in a process of its own: what samescore's runtime needs, and nothing else.

The installed ONNX Runtime must not be there at all: two of them are an error, by metadata.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import tokenizers

ROOT = Path(__file__).parents[1]
NEEDS = ("numpy", "numpy.libs", "tokenizers")
# Loads a bundle and scores texts; prints one line of JSON, `error` with the class of what was raised.
SCORE = """
import json, logging, sys
import samescore
logging.basicConfig(stream=sys.stderr)
request = json.loads(sys.argv[1])
try:
    classifier = samescore.load(request["bundle"], threads=1, canary="off", **request["options"])
    rows = [list(p.logits) for p in classifier.score(request["texts"])] if request["texts"] else []
    import onnxruntime
    session = next(iter(classifier._readers.values())).session
    answer = {"logits": rows, "target": classifier.target, "variant": classifier.variant.name, "version": onnxruntime.__version__,
              "nodes": session.placement and session.placement.nodes, "first": session._session.get_providers()[0],
              "options": session._session.get_provider_options()}
except Exception as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print("\\n" + json.dumps(answer))
"""
# Makes a session and runs nothing; prints one line of JSON.
OPEN = """
import json, sys
from samescore.runtime.bundle import Bundle
from samescore.runtime.session import Session
request = json.loads(sys.argv[1])
with Bundle(request["bundle"]) as bundle:
    model = bundle.model(bundle.manifest.variant(request["variant"]))
session = Session(model, request["target"], intra_op_threads=1)
print("\\n" + json.dumps({"nodes": session.placement and session.placement.nodes, "first": session._session.get_providers()[0]}))
"""


def site(folder: Path) -> Path:
    """A folder for PYTHONPATH with samescore, laid out as when installed, and its dependencies but ONNX Runtime."""
    rooms = folder / "samescore"
    rooms.mkdir(parents=True)
    for part in (ROOT / "samescore").iterdir():
        (rooms / part.name).symlink_to(part)
    (rooms / "runtime").symlink_to(ROOT / "runtime")
    for name, module in zip(NEEDS, (numpy, numpy, tokenizers), strict=True):
        (folder / name).symlink_to(Path(str(module.__file__)).parents[1] / name)
    return folder


def run(script: str, *arguments: str, paths: list[Path], libraries: Path | None = None, **environment: str) -> str:
    """Standard output, then standard error, of a script with only `paths` to import from."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    clean |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    if libraries is not None:
        clean["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-S", "-P", "-c", script, *arguments]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def open_session(bundle: Path, variant: str, target: str, *, paths: list[Path], libraries: Path | None = None) -> Any:
    """`nodes` by provider, and the `first` provider, of a variant's session there."""
    request = json.dumps({"bundle": str(bundle), "variant": variant, "target": target})
    return answer(run(OPEN, request, paths=paths, libraries=libraries))


def score(
    bundle: Path,
    texts: list[Any],
    options: dict[str, Any],
    *,
    paths: list[Path],
    libraries: Path | None = None,
    **env: str,
) -> dict[str, Any]:
    """What `samescore.load(bundle, **options).score(texts)` gives there: `logits`, or `error` and `message`; and `log`."""
    request = json.dumps({"bundle": str(bundle), "texts": texts, "options": options})
    said = run(SCORE, request, paths=paths, libraries=libraries, **env)
    return {**answer(said), "log": said}


def answer(said: str) -> dict[str, Any]:
    """The line of JSON in what a script said."""
    found: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith('{"')))
    return found
