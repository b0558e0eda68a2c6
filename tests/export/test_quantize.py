import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from samescore.export.quantize import (
    ChannelStatistics,
    quantize_blocks8,
    quantize_columns,
    quantize_rows,
    smoothing_scales,
)

matrices = hnp.arrays(np.float32, (5, 3), elements=st.floats(-1e4, 1e4, width=32))


@given(matrices)
def test_columns_are_within_half_a_step(weight):
    values, scale = quantize_columns(weight)
    assert values.dtype == np.int8 and scale.shape == (3,) and values.min() >= -127
    assert (np.abs(values * scale - weight) <= scale * 0.5001 + 1e-30).all()


@given(matrices)
def test_rows_are_within_half_a_step(table):
    values, scale = quantize_rows(table)
    assert scale.shape == (5, 1)
    assert (np.abs(values * scale - table) <= scale * 0.5001 + 1e-30).all()


def test_a_zero_column_stays_zero():
    values, scale = quantize_columns(np.zeros((4, 2), np.float32))
    assert not values.any() and (scale == 1).all()


def test_smoothing_moves_outliers_to_the_weights():
    activations = np.array([1.0, 100.0, 1.0, 0.0], np.float32)
    weights = np.array([1.0, 1.0, 1.0, 1.0], np.float32)
    scales = smoothing_scales(activations, weights, 0.5)
    assert np.isclose(scales[1] / scales[0], 10)
    assert scales[3] == 1
    assert np.isclose(np.log(scales[:3]).mean(), 0, atol=1e-6)
    np.testing.assert_allclose(smoothing_scales(activations, weights, 0.0)[:3], 1, rtol=1e-6)


def test_spread_is_the_distance_from_the_mean():
    statistics = ChannelStatistics(
        low=np.array([-1.0, 4.0], np.float32),
        high=np.array([3.0, 6.0], np.float32),
        mean=np.array([0.0, 5.5], np.float32),
    )
    assert statistics.spread.tolist() == [3.0, 1.5]


@pytest.mark.parametrize(("inputs", "size"), [(384, 128), (192, 64), (96, 32), (48, 16), (40, 16)])
def test_int8_blocks_keep_every_weight_within_half_a_step(inputs, size):
    weight = np.random.default_rng(0).normal(size=(inputs, 9)).astype(np.float32)
    weight[:size, 4] = 0
    packed, scales = quantize_blocks8(weight)
    assert packed.shape == (9, -(-inputs // size), size) and scales.shape == packed.shape[:2]
    restored = ((packed.astype(np.float32) - 128) * scales[..., None]).reshape(9, -1).T
    step = np.repeat(scales, size, axis=1).T
    assert np.all(np.abs(restored[:inputs] - weight) <= step[:inputs] / 2 + 1e-6)
    assert not restored[inputs:].any() and not restored[:size, 4].any()
    assert packed.min() >= 1
