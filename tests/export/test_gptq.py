"""GPTQ against rounding to the nearest: what it gains, where both are the same, and what must not break it."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samescore.export.gptq import DAMPING, feedback, gptq_blocks4, gptq_columns
from samescore.export.graphs.blocks import GraphBuilder
from samescore.export.graphs.formats import make_linears
from samescore.export.quantize import BLOCK4, Blocks4, ChannelStatistics, Rescaling, quantize_blocks4, quantize_columns
from samescore.export.recipes import variant_spec
from samescore.export.weights import WeightFile
from samescore.runtime.errors import CheckpointError

ort = pytest.importorskip("onnxruntime")


def restored(blocks, inputs):
    """The weight float64 [K, N] that stored blocks stand for."""
    outputs, count = blocks.scales.shape
    steps = np.stack([blocks.packed & 15, blocks.packed >> 4], axis=-1).reshape(outputs, count, BLOCK4)
    zeros = np.stack([blocks.zeros & 15, blocks.zeros >> 4], axis=-1).reshape(outputs, -1)[:, :count]
    values = (steps.astype(np.float64) - zeros[..., None]) * blocks.scales[..., None]
    return values.reshape(outputs, -1).T[:inputs]


def loss(x, weight, blocks):
    return np.square(x @ (weight - restored(blocks, len(weight)))).sum()


def correlated(random, rows, channels):
    """Inputs [rows, channels] float64 that mostly lie in a quarter of their dimensions."""
    spread = random.normal(size=(channels // 4, channels)) * np.exp(random.normal(size=channels) / 2)
    return random.normal(size=(rows, channels // 4)) @ spread + 0.1 * random.normal(size=(rows, channels))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 96, 100, 130]))
def test_it_loses_much_less_on_correlated_inputs(seed, channels):
    """On other inputs of the same kind than those it was fitted to."""
    random = np.random.default_rng(seed)
    x = correlated(random, 2000, channels)
    fitted, other = x[:1500], x[1500:]
    weight = random.normal(size=(channels, 24)).astype(np.float32)
    gptq = gptq_blocks4(weight, (fitted.T @ fitted).astype(np.float32))
    assert loss(other, weight, gptq) < 0.5 * loss(other, weight, quantize_blocks4(weight))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 100, 130]))
def test_int8_columns_lose_much_less_too(seed, channels):
    """With the scales of the nearest rounding, inside its range."""
    random = np.random.default_rng(seed)
    x = correlated(random, 2000, channels)
    fitted, other = x[:1500], x[1500:]
    weight = random.normal(size=(channels, 24)).astype(np.float32)
    gptq, nearest = gptq_columns(weight, (fitted.T @ fitted).astype(np.float32)), quantize_columns(weight)
    np.testing.assert_array_equal(gptq[1], nearest[1])
    assert np.abs(gptq[0].astype(int)).max() <= 127
    lost, most = (
        np.square(other @ (weight - values.astype(np.float64) * scale)).sum() for values, scale in (gptq, nearest)
    )
    assert lost < 0.5 * most


@pytest.mark.parametrize("channels", [32, 70, 96])
def test_it_is_the_nearest_where_channels_have_nothing_to_do_with_each_other(channels):
    random = np.random.default_rng(1)
    weight = random.normal(size=(channels, 7)).astype(np.float32)
    gram = np.diag(np.exp(random.normal(size=channels))).astype(np.float32)
    for gptq, rounded in ((gptq_blocks4, quantize_blocks4), (gptq_columns, quantize_columns)):
        for ours, nearest in zip(gptq(weight, gram), rounded(weight), strict=True):
            np.testing.assert_array_equal(ours, nearest)


def test_the_factor_gives_the_damped_matrix_back():
    random = np.random.default_rng(2)
    x = correlated(random, 200, 40)
    gram = (x.T @ x).astype(np.float32)
    upper = np.eye(40) + feedback(gram)
    damped = gram + DAMPING[0] * np.diagonal(gram).mean() * np.eye(40)
    middle = np.linalg.inv(upper) @ damped @ np.linalg.inv(upper).T
    assert not np.tril(feedback(gram)).any()
    np.testing.assert_allclose(middle, np.diag(np.diagonal(middle)), atol=1e-4 * np.abs(middle).max())


def test_it_is_the_paper_with_its_inverse():
    """Frantar et al.'s algorithm 1 with act_order, row by row with the Cholesky factor of the inverse."""
    random = np.random.default_rng(3)
    x = correlated(random, 300, 32)
    gram = (x.T @ x).astype(np.float32)
    weight = random.normal(size=(32, 9)).astype(np.float32)
    blocks = gptq_blocks4(weight, gram)
    scale, zero = blocks.scales[:, 0].astype(np.float64), (blocks.zeros[:, 0] & 15).astype(np.float64)
    damped = gram + DAMPING[0] * np.diagonal(gram).mean() * np.eye(32)
    order = np.argsort(-np.diagonal(gram))
    inverse = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, expected = weight[order].astype(np.float64), np.empty((32, 9))
    for k in range(32):
        expected[k] = (np.clip(np.rint(left[k] / scale) + zero, 0, 15) - zero) * scale
        left[k:] -= np.outer(inverse[k, k:], (left[k] - expected[k]) / inverse[k, k])
    np.testing.assert_allclose(restored(blocks, 32)[order], expected, atol=1e-6)


def test_dead_channels_and_too_few_texts():
    random = np.random.default_rng(4)
    x = random.normal(size=(10, 96))
    x[:, [3, 40, 41]] = 0
    weight = random.normal(size=(96, 12)).astype(np.float32)
    gptq = gptq_blocks4(weight, (x.T @ x).astype(np.float32))
    assert loss(x, weight, gptq) < 0.2 * loss(x, weight, quantize_blocks4(weight))
    error = np.abs(restored(gptq, 96) - weight)[[3, 40, 41]]
    assert (error <= gptq.scales.max() * 1.01).all()


def test_a_layer_that_no_text_reaches_is_rounded_to_the_nearest():
    weight = np.random.default_rng(5).normal(size=(64, 5)).astype(np.float32)
    for ours, nearest in zip(
        gptq_blocks4(weight, np.zeros((64, 64), np.float32)), quantize_blocks4(weight), strict=True
    ):
        np.testing.assert_array_equal(ours, nearest)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_the_gram_matrix_does_not_matter(scale):
    random = np.random.default_rng(6)
    x = correlated(random, 400, 64)
    weight = random.normal(size=(64, 6)).astype(np.float32)
    gram = x.T @ x
    first, again = (gptq_blocks4(weight, (gram * s).astype(np.float32)) for s in (1.0, scale))
    assert loss(x, weight, again) == pytest.approx(loss(x, weight, first), rel=0.02)
    for ours, other in zip(gptq_blocks4(weight, gram.astype(np.float32)), first, strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("channels", [32, 40, 96, 100])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_onnx_runtime_reads_the_blocks_as_we_mean_them(channels, rounding, tmp_path):
    """Steps, scales and zero points of every block, also where K is no multiple of 32 and where blocks are odd in number."""
    random = np.random.default_rng(7)
    x = correlated(random, 300, channels)
    weight = (random.normal(size=(channels, 10)) + 0.5).astype(np.float32)
    weight[:, 3] = np.abs(weight[:, 3])
    weight[:, 4] = 0
    weight[:32, 5] = 0
    blocks = quantize_blocks4(weight) if rounding == "nearest" else gptq_blocks4(weight, (x.T @ x).astype(np.float32))
    assert not restored(blocks, channels)[:, 4].any()
    assert len(np.unique(blocks.zeros)) > 1
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    stored = [
        numpy_helper.from_array(array, name) for array, name in zip(blocks, ("packed", "scales", "zeros"), strict=True)
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "packed", "scales", "zeros"], ["y"], domain="com.microsoft",
        K=channels, N=10, bits=4, block_size=BLOCK4, accuracy_level=1,
    )  # fmt: skip
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", float32, [None, channels])],
        [helper.make_tensor_value_info("y", float32, [None, 10])],
        stored,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.eye(channels, dtype=np.float32)})
    np.testing.assert_allclose(got, restored(blocks, channels), atol=1e-5)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_layer_uses_the_gram_matrix_of_what_it_multiplies(rescaled, tmp_path):
    """Statistics are of the input as it was; where its producer divides channels by scales, so are the matrix's."""
    random = np.random.default_rng(9)
    x = correlated(random, 600, 96).astype(np.float32)
    weight = random.normal(size=(96, 24)).astype(np.float32)
    scale = np.exp(random.normal(size=96)).astype(np.float32)
    rescaling = Rescaling(np.zeros_like(scale), scale) if rescaled else None
    rows = x / scale if rescaled else x
    gram = x.T @ x / np.float32(len(x))
    found = {}
    for rounding in ("nearest", "gptq"):
        folder = tmp_path / rounding
        folder.mkdir()
        weights = WeightFile(folder / "model.onnx.data")
        g = GraphBuilder(weights, replace(variant_spec("cpu-int4").recipe, rounding=rounding))
        statistics = {"site": ChannelStatistics(x.min(axis=0), x.max(axis=0), x.mean(axis=0), gram)}
        value = g.input("x", ir.DataType.FLOAT, ["rows", 96])
        make_linears(g, statistics=statistics)(value, "site", weight, name="layer", rescaled=rescaling)
        weights.close()
        ir.save(g.model("product"), folder / "model.onnx")
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(folder / "model.onnx").graph.initializer}
        blocks = Blocks4(*(stored[f"layer.weight{suffix}"] for suffix in ("", ".scale", ".zero")))
        found[rounding] = loss(rows, weight * rescaling.scale[:, None] if rescaled else weight, blocks)
    assert found["gptq"] < 0.5 * found["nearest"]


def test_a_matrix_that_rounding_made_indefinite():
    """Two channels that are the same but for float32 sums; not numbers are refused."""
    weight = np.random.default_rng(10).normal(size=(2, 5)).astype(np.float32)
    gram = np.array([[1, 1.02], [1.02, 1]], np.float32)
    factor = feedback(gram)
    np.testing.assert_allclose(factor, [[0, 1.02 / 1.1], [0, 0]], rtol=1e-6)
    assert np.isfinite(restored(gptq_blocks4(weight, gram), 2)).all()
    with pytest.raises(CheckpointError, match="calibration texts are too large or not finite"):
        feedback(gram * np.float32(np.inf))
