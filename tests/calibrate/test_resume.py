import contextlib
import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from samescore.calibrate import resume
from samescore.calibrate.progress import resumed_step
from samescore.calibrate.resume import Row, Rows, Store, cache_folder

KEY = {"what": "test"}


def ids(number):
    return np.arange(number + 1, dtype=np.int64)


def row(number):
    return Row(np.array([number / 3, -number], np.float32), number / 7)


def fill(store, numbers, key=None):
    with store.rows(key or KEY) as rows:
        for number in numbers:
            rows.keep(ids(number), row(number))


def known(store, numbers, key=None):
    with store.rows(key or KEY) as rows:
        return [number for number in numbers if rows.get(ids(number)) is not None]


def only_file(own_cache):
    (path,) = (own_cache / "logits").iterdir()
    return path


def test_rows_come_back_bit_for_bit():
    fill(Store(), range(5))
    with Store().rows(KEY) as rows:
        for number in range(5):
            found = rows.get(ids(number))
            assert found.logits.tobytes() == row(number).logits.tobytes() and found.label_mass == row(number).label_mass
        assert rows.get(ids(9)) is None
        rows.keep(ids(9), Row(np.array([np.nan, np.inf], np.float32)))
    with Store().rows(KEY) as rows:
        assert np.array_equal(rows.get(ids(9)).logits, [np.nan, np.inf], equal_nan=True)
        assert rows.get(ids(9)).label_mass is None


def test_other_keys_do_not_mix():
    fill(Store(), [1])
    assert known(Store(), [1], {**KEY, "torch": "2.14"}) == []
    assert known(Store(), [1]) == [1]


@pytest.mark.parametrize("name", ["cpu_model", "int8_flags"])
def test_another_cpu_does_not_mix(name, monkeypatch):
    fill(Store(), [1])
    monkeypatch.setattr(resume, name, lambda: "another")
    assert known(Store(), [1]) == []


@pytest.mark.parametrize("torn", [b'{"ids": "00', b'{"ids": "0", "logits": ["0x1p', b"\xff", b"\n\n[]\n{}\n"])
def test_a_torn_line_is_dropped(own_cache, torn):
    fill(Store(), [1, 2])
    path = only_file(own_cache)
    with path.open("ab") as file:
        file.write(torn)
    assert known(Store(), [1, 2, 3]) == [1, 2]
    fill(Store(), [3])
    assert known(Store(), [1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("keep", [0, 5])
def test_a_file_without_its_first_line_begins_anew(own_cache, keep):
    fill(Store(), [1])
    path = only_file(own_cache)
    path.write_bytes(path.read_bytes()[:keep])
    assert known(Store(), [1]) == []
    fill(Store(), [1])
    assert known(Store(), [1]) == [1]


def test_what_is_measured_afresh_is_kept_but_not_read(own_cache):
    fill(Store(), [1])
    size = only_file(own_cache).stat().st_size
    fresh = Store(reads=False)
    assert known(fresh, [1]) == []
    fill(fresh, [1])
    assert only_file(own_cache).stat().st_size == size  # the same row is not written twice
    with fresh.rows(KEY) as rows:
        rows.keep(ids(1), row(5))
        assert rows.get(ids(1)).label_mass == row(5).label_mass
    with Store().rows(KEY) as rows:
        assert rows.get(ids(1)).label_mass == row(5).label_mass  # the newest counts


def test_two_processes_at_once(own_cache):
    script = (
        "import sys, numpy as np\n"
        "from samescore.calibrate.resume import Row, Store\n"
        "with Store().rows({'what': 'test'}) as rows:\n"
        "    for i in range(int(sys.argv[1]), int(sys.argv[2])):\n"
        "        rows.keep(np.arange(i + 1), Row(np.array([i / 3, -i], np.float32), i / 7))\n"
    )
    ranges = [(0, 300), (300, 600), (200, 400)]
    processes = [subprocess.Popen([sys.executable, "-c", script, *map(str, bounds)]) for bounds in ranges]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert known(Store(), range(600)) == list(range(600))
    for line in only_file(own_cache).read_text().splitlines():
        assert set(json.loads(line)) in ({"key"}, {"ids", "logits", "mass"})


def test_old_files_are_removed_on_use(own_cache):
    fill(Store(), [1])
    old = only_file(own_cache)
    long_ago = time.time() - (resume.KEPT_DAYS + 1) * 86400
    os.utime(old, (long_ago, long_ago))
    fill(Store(), [1], {"what": "other"})
    assert not old.exists()
    recent = only_file(own_cache)
    almost = time.time() - (resume.KEPT_DAYS - 1) * 86400
    os.utime(recent, (almost, almost))
    assert known(Store(), [1], {"what": "other"}) == [1]
    assert time.time() - recent.stat().st_mtime < 60  # used, so it counts from now


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SAMESCORE_CACHE", str(tmp_path / "file"))
    resume._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with Store().rows(KEY) as rows:
                rows.keep(ids(1), row(1))
                assert rows.get(ids(1)) is not None
    assert len(caplog.records) == 1 and "Not a directory" in caplog.text and "SAMESCORE_CACHE" in caplog.text
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_disk_that_fills_up(own_cache, monkeypatch, caplog):
    """A line that does not fit is taken back, and the run goes on in memory."""
    fill(Store(), [1])
    before = only_file(own_cache).read_bytes()
    write = os.write
    resume._say.cache_clear()
    with Store().rows(KEY) as rows, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(os, "write", lambda file, raw: write(file, raw[:7]))
        rows.keep(ids(2), row(2))
        rows.keep(ids(3), row(3))
        assert rows.get(ids(3)) is not None
    assert only_file(own_cache).read_bytes() == before
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMESCORE_CACHE", "/a")
    assert str(cache_folder()) == "/a"
    monkeypatch.delenv("SAMESCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_folder()) == "/b/samescore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "samescore"


def test_the_title_says_what_is_known():
    said = []

    def report(title, total=None, work=None):
        said.append((title, total, work))
        return contextlib.nullcontext()

    with Rows() as rows:
        with resumed_step(report, "measuring", [ids(1), ids(2)], rows):
            pass
        rows.keep(ids(1), row(1))
        with resumed_step(report, "measuring", [ids(1), ids(2), ids(3)], rows):
            pass
    assert said == [("measuring", 2, 5), ("measuring, 1 of 3 from an earlier run", 2, 7)]
