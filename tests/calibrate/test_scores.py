import io
import zipfile

import numpy as np
import pytest

from samescore.calibrate.scores import read_scores, write_scores
from samescore.runtime.errors import BundleError


def test_round_trip_is_lossless_and_repeats():
    scores = {
        "cpu-int8": np.array([[1e-30, np.nan], [3, -np.inf]], np.float32),
        "bfloat16": np.zeros((2, 2), np.float32),
    }
    raw = write_scores(scores)
    assert raw == write_scores(scores)
    found = read_scores(raw)
    assert list(found) == ["cpu-int8", "bfloat16"]
    np.testing.assert_array_equal(found["cpu-int8"], scores["cpu-int8"])


def test_what_is_no_scores_file():
    with pytest.raises(BundleError, match="cannot be read"):
        read_scores(b"not a zip")
    stream = io.BytesIO()
    np.savez(stream, x=np.array([{}], dtype=object))
    with pytest.raises(BundleError, match="cannot be read"):
        read_scores(stream.getvalue())
    stream = io.BytesIO()
    np.savez(stream, x=np.zeros(3, np.float32))
    with pytest.raises(BundleError, match="not float32"):
        read_scores(stream.getvalue())


def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr("samescore.calibrate.scores.SCORES_LIMIT", 1000)
    with pytest.raises(BundleError, match="unpacks to more than 1000 bytes"):
        read_scores(write_scores({"cpu-int8": np.zeros((1000, 2), np.float32)}))


def test_a_header_that_lies():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, archive.open("x.npy", "w") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(BundleError, match="cannot be read"):
        read_scores(stream.getvalue())
