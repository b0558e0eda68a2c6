import io

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
