"""Names of compiled programs, as the real MIGraphX provider chooses them, and the folders that keep them apart.

Nothing is compiled: the stand-in for MIGraphX writes an empty file where a program is saved, and says which it saves or loads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import variant_spec

from ..conftest import tiny_bert
from .providers import Provider, build_stubs
from .test_placement import migraphx, pytestmark  # noqa: F401  (a fixture and marks)

ROOT = Path(__file__).parents[2]
# The wheel's ONNX Runtime stands beside the one that is installed, and nothing can be run.
OPEN = """
import sys
from samescore.runtime import opening, padded, providers
from samescore.runtime.batches import parse_buckets
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.session import Session
providers.installed_distributions = lambda: ["onnxruntime-migraphx"]
padded.run_once = lambda session, bucket: None
from samescore.calibrate.stages import read_model
from pathlib import Path
if sys.argv[4]:  # what ONNX Runtime does where samescore does not refuse it
    opening._refuse_environment = lambda options: None
model, files, shared = read_model(Path(sys.argv[1])), {"model.onnx.data": sys.argv[2]}, sys.argv[4]
for bucket in parse_buckets(sys.argv[3]):
    if shared:
        Session(model, "migraphx", intra_op_threads=1, dimensions={"batch": bucket.batch, "sequence": bucket.sequence},
                options={"migraphx_model_cache_dir": shared})
    else:
        padded.open_buckets(model, "migraphx", [bucket], files, threads=1)
"""


class Programs:
    """Opens models with the wheel's provider, and tells which programs were saved and loaded."""

    def __init__(self, provider: Provider, stubs: Path, cache: Path):
        self.provider, self.stubs, self.cache = provider, stubs, cache
        stubs.mkdir()
        build_stubs(provider.package / "onnxruntime" / "capi", stubs)

    def open(
        self, model: Path, digest: str, buckets: str, *, shared: Path | None = None, **environment: str
    ) -> list[tuple[str, Path]]:
        """`(save or load, file)` in order."""
        found = {
            **{name: value for name, value in os.environ.items() if "MIGRAPHX" not in name},
            "LD_LIBRARY_PATH": str(self.stubs),
            "PYTHONPATH": str(self.provider.package),
            "SAMESCORE_CACHE": str(self.cache),
            **environment,
        }
        command = [sys.executable, "-c", OPEN, str(model), digest, buckets, str(shared or "")]
        done = subprocess.run(command, env=found, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return [(kind, Path(name)) for kind, name in re.findall(r"^migraphx_(save|load) (.*)$", done.stderr, re.M)]


@pytest.fixture
def programs(migraphx, tmp_path):  # noqa: F811
    return Programs(migraphx, tmp_path / "stubs", tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape, the second with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    found = []
    for name in ("one", "other"):
        checkpoint = tiny_bert(folder / f"{name}-checkpoint")
        if name == "other":
            file = checkpoint / "model.safetensors"
            changed = {key: value + 1e-2 * torch.randn_like(value) for key, value in load_file(file).items()}
            save_file(changed, file, metadata={"format": "pt"})
        (folder / name).mkdir()
        build_graph(Checkpoint(checkpoint), variant_spec("migraphx-fp16").recipe, folder / name)
        found.append(folder / name)
    assert (found[0] / "model.onnx.data").read_bytes() != (found[1] / "model.onnx.data").read_bytes()
    return found


def test_each_bucket_is_compiled_when_it_is_opened_and_loaded_the_next_time(programs, models):
    first = programs.open(models[0], "a" * 64, "4x16,1x64")
    assert [kind for kind, _ in first] == ["save", "save"] and len({path for _, path in first}) == 2
    assert programs.open(models[0], "a" * 64, "4x16,1x64") == [("load", path) for _, path in first]
    assert [kind for kind, _ in programs.open(models[0], "a" * 64, "2x16")] == ["save"]


def test_onnxruntime_takes_another_models_program_where_they_share_a_folder(programs, models, tmp_path):
    """Why each program has a folder of its own: names hash nothing of the weights."""
    shared = tmp_path / "shared"
    shared.mkdir()
    ((saved, name),) = programs.open(models[0], "a" * 64, "4x16", shared=shared)
    assert saved == "save" and name.parent == shared
    assert programs.open(models[1], "b" * 64, "4x16", shared=shared) == [("load", name)], "the first one's weights"


def test_folders_keyed_by_weights_keep_them_apart(programs, models):
    ((first, one),) = programs.open(models[0], "a" * 64, "4x16")
    ((second, other),) = programs.open(models[1], "b" * 64, "4x16")
    assert first == second == "save"
    assert one.name == other.name and one.parent != other.parent
    assert one.parent.parent == other.parent.parent == programs.cache / "migraphx"


def test_the_environments_folder_would_win_over_the_option(programs, models, tmp_path):
    shared, asked = tmp_path / "shared", tmp_path / "asked"
    shared.mkdir()
    asked.mkdir()
    ((_, name),) = programs.open(models[0], "", "4x16", shared=asked, ORT_MIGRAPHX_MODEL_CACHE_PATH=str(shared))
    assert name.parent == shared
    with pytest.raises(AssertionError, match="unset ORT_MIGRAPHX_MODEL_CACHE_PATH"):
        programs.open(models[0], "a" * 64, "4x16", ORT_MIGRAPHX_MODEL_CACHE_PATH=str(shared))
