"""Where compiled programs lie, and what decides that."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from samescore.runtime import cache
from samescore.runtime.batches import Bucket
from samescore.runtime.cache import (
    alone_in,
    file_digests,
    plan_path,
    program_folder,
    program_key,
    read_plan,
    versions,
    write_plan,
)
from samescore.runtime.errors import ProviderError
from samescore.runtime.manifest import FileEntry

FILES = {"migraphx-fp16/model.onnx": "a" * 64, "migraphx-fp16/model.onnx.data": "b" * 64}
SHAPE = Bucket(8, 128)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMESCORE_CACHE", str(tmp_path))
    for name in [name for name in os.environ if "MIGRAPHX" in name]:
        monkeypatch.delenv(name)
    return tmp_path


def test_everything_that_decides_a_program_is_in_its_key():
    made_by = {"onnxruntime-migraphx": "1.27.1", "rocm": "7.2.4"}
    keys = [
        program_key(FILES, SHAPE, {}, made_by),
        program_key({**FILES, "migraphx-fp16/model.onnx.data": "c" * 64}, SHAPE, {}, made_by),
        program_key({**FILES, "migraphx-fp16/model.onnx": "c" * 64}, SHAPE, {}, made_by),
        program_key(FILES, Bucket(128, 8), {}, made_by),
        program_key(FILES, SHAPE, {"migraphx_fp16_enable": "1"}, made_by),
        program_key(FILES, SHAPE, {}, {**made_by, "onnxruntime-migraphx": "1.27.2"}),
        program_key(FILES, SHAPE, {}, {**made_by, "rocm": "7.2.5"}),
    ]
    assert len(set(keys)) == len(keys) and all(len(key) == 64 for key in keys)
    assert program_key(dict(reversed(FILES.items())), SHAPE, {}, dict(reversed(made_by.items()))) == keys[0]


def test_versions_are_what_is_installed(monkeypatch, tmp_path):
    before = versions()
    assert before["onnxruntime"].count(".") == 2 and "rocm" not in before
    (tmp_path / ".info").mkdir()
    (tmp_path / ".info" / "version").write_text("7.2.4-93\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmigraphx_c.so.3.0.70204").touch()
    (tmp_path / "lib" / "libmigraphx_c.so.3").symlink_to("libmigraphx_c.so.3.0.70204")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setenv("MIGRAPHX_DISABLE_MLIR", "1")
    monkeypatch.setenv("ORT_MIGRAPHX_FP16_ENABLE", "1")
    found = versions()
    assert found["rocm"] == "7.2.4-93" and found["libmigraphx"] == "libmigraphx_c.so.3.0.70204"
    assert found["MIGRAPHX_DISABLE_MLIR"] == found["ORT_MIGRAPHX_FP16_ENABLE"] == "1"


def test_digests_are_the_manifests(bert_bundle):
    from samescore.runtime import Bundle

    with Bundle(bert_bundle) as bundle:
        manifest, variant = bundle.manifest, bundle.manifest.variant("migraphx-fp16")
    found = file_digests(manifest, variant)
    assert set(found) == {"migraphx-fp16/model.onnx", "migraphx-fp16/model.onnx.data"}
    data = variant.data[0]
    other = replace(manifest, files={**manifest.files, data: FileEntry(manifest.files[data].size, "0" * 64)})
    assert file_digests(other, variant) == {**found, data: "0" * 64}


def test_a_folder_of_ones_own(own_cache):
    folder = program_folder(FILES, SHAPE, {})
    assert folder.parent == own_cache / "migraphx" and folder.stat().st_mode & 0o777 == 0o700
    assert program_folder(FILES, SHAPE, {}) == folder != program_folder(FILES, Bucket(1, 128), {})
    folder.chmod(0o777)
    with pytest.raises(ProviderError, match="can be written by others.*SAMESCORE_CACHE"):
        program_folder(FILES, SHAPE, {})


def test_a_folder_that_cannot_be_made_says_what_to_set(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAMESCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ProviderError, match="Set SAMESCORE_CACHE to one that you can write"):
        program_folder(FILES, SHAPE, {})


def test_a_second_process_waits(own_cache):
    """Asked of a real one: it gets the lock when the first lets go."""
    folder = program_folder(FILES, SHAPE, {})
    script = (
        "import sys, pathlib\nfrom samescore.runtime.cache import alone_in\nprint('up', flush=True)\n"
        "with alone_in(pathlib.Path(sys.argv[1])):\n    print((pathlib.Path(sys.argv[1]) / 'made').read_text())"
    )
    with alone_in(folder):
        second = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "up\n"
        (folder / "made").write_text("by the first")
    assert second.communicate(timeout=60)[0] == "by the first\n" and second.returncode == 0


def test_plans_are_kept_per_file(own_cache, monkeypatch, caplog):
    path = plan_path("migraphx", FILES)
    assert path.parent == own_cache / "migraphx" / "plans" and read_plan(path) is None
    write_plan(path, [Bucket(8, 128), Bucket(1, 512)])
    assert read_plan(path) == (Bucket(8, 128), Bucket(1, 512)) and os.listdir(path.parent) == [path.name]
    assert plan_path("migraphx", {**FILES, "migraphx-fp16/model.onnx": "c" * 64}) != path
    assert not caplog.records
    for broken in (
        "",
        "[]",
        "{",
        json.dumps({"schema_version": 2, "buckets": ["1x5"]}),
        '{"schema_version": 1, "buckets": ["x"]}',
    ):
        path.write_text(broken)
        caplog.clear()
        assert read_plan(path) is None
        assert "passed over" in caplog.text


def test_a_plan_that_cannot_be_written_leaves_nothing(own_cache, monkeypatch):
    path = plan_path("migraphx", FILES)
    write_plan(path, [SHAPE])
    monkeypatch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_plan(path, [Bucket(1, 1)])
    assert os.listdir(path.parent) == [path.name] and read_plan(path) == (SHAPE,)
