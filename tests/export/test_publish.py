import os
import signal
import subprocess
import sys
import time

import pytest

from samescore.export import publish as module
from samescore.export.publish import file_entries, publish, staging_folder
from samescore.runtime.errors import UsageError


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_bundle_appears_whole(tmp_path):
    target = tmp_path / "inner" / "bundle"
    with staging_folder(target) as staging:
        write(staging, bundle_json="{}", a_txt="a")
        assert not target.exists()
        publish(staging, target)
    assert names(target) == ["a.txt", "bundle.json"]
    assert names(target.parent) == ["bundle"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_bundle_is_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    target = tmp_path / "bundle"
    for version in ("old", "new"):
        with staging_folder(target) as staging:
            write(staging, **{"bundle_json": "{}", f"{version}_txt": version})
            publish(staging, target)
    assert names(target) == ["bundle.json", "new.txt"]
    assert names(tmp_path) == ["bundle"]


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "bundle"
    with staging_folder(target) as staging:
        write(staging, bundle_json="{}")
        publish(staging, target)
    with pytest.raises(RuntimeError), staging_folder(target) as staging:
        write(staging, half_txt="half")
        raise RuntimeError
    assert names(target) == ["bundle.json"] and names(tmp_path) == ["bundle"]


def test_what_is_not_a_bundle_is_never_replaced(tmp_path):
    target = tmp_path / "photos"
    target.mkdir()
    write(target, cat_jpg="miau")
    with pytest.raises(UsageError, match="is not a bundle"), staging_folder(target):
        pass
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is not a bundle"), staging_folder(file):
        pass
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not a bundle"), staging_folder(link):
        pass
    assert names(target) == ["cat.jpg"]


def test_an_empty_folder_is_filled(tmp_path):
    target = tmp_path / "empty"
    target.mkdir()
    with staging_folder(target) as staging:
        write(staging, bundle_json="{}")
        publish(staging, target)
    assert names(target) == ["bundle.json"]


KILLED = """
import signal, sys, time
from pathlib import Path
from samescore.export.publish import staging_folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background may ignore it
with staging_folder(Path(sys.argv[1])) as staging:
    (staging / "half.txt").write_text("half")
    print("staged", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tmp_path, how):
    target = tmp_path / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"staged\n"
    with staging_folder(target):
        assert len(names(tmp_path)) == 2, "a living export's staging folder must be left alone"
    process.send_signal(how)
    process.wait(timeout=20)
    process.stdout.close()
    assert not target.exists()
    assert len(names(tmp_path)) == (1 if how == signal.SIGKILL else 0)
    with staging_folder(target) as staging:
        write(staging, bundle_json="{}")
        publish(staging, target)
    assert names(tmp_path) == ["bundle"]


def test_entries(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "x.bin").write_bytes(b"abc")
    entry = file_entries(tmp_path)["inner/x.bin"]
    assert entry.size == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_published_folders_can_be_read_by_others(tmp_path):
    target = tmp_path / "bundle"
    with staging_folder(target) as staging:
        write(staging, bundle_json="{}")
        publish(staging, target)
    assert os.stat(target).st_mode & 0o777 == 0o755
    assert time.time() - os.stat(target).st_mtime < 60
