"""Products in every number format, against numpy."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from samescore.calibrate.stages import read_model
from samescore.export.graphs.blocks import GraphBuilder
from samescore.export.graphs.formats import make_linears
from samescore.export.graphs.linears import GatedWeights
from samescore.export.quantize import ChannelStatistics, quantize_columns
from samescore.export.recipes import FINER, variant_spec
from samescore.export.weights import WeightFile
from samescore.runtime.errors import UsageError
from samescore.runtime.session import Session

RECIPE = variant_spec("cpu-int8").recipe
K, N, ROWS = 96, 40, 7


def run(folder, number_format, emit, x, statistics=None, **recipe):
    """The output of a graph that `emit(linears, x)` makes, on rows x."""
    weights = WeightFile(folder / "model.onnx.data")
    recipe = replace(RECIPE, linear=number_format, smoothing=statistics is not None, **recipe)
    g = GraphBuilder(weights, recipe)
    rows = g.input("x", ir.DataType.FLOAT, ["rows", x.shape[1]])
    g.output(emit(make_linears(g, statistics=statistics), rows), "y", ir.DataType.FLOAT, ["rows", None])
    model = g.model("product")
    weights.close()
    ir.save(model, folder / "model.onnx")
    return Session(read_model(folder), "cpu", intra_op_threads=1).run_outputs(["y"], {"x": x})[0]


def numbers(seed=0):
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(ROWS, K)).astype(np.float32)
    x[:, 5] *= 30  # an outlier channel, as trained models have them
    return x, chance.normal(size=(K, N)).astype(np.float32), chance.normal(size=N).astype(np.float32)


def error(y, exact):
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def statistics_of(x):
    return {"site": ChannelStatistics(x.min(axis=0), x.max(axis=0), x.mean(axis=0))}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    # float32 sums of 24-bit products are the floor: 15-bit numbers leave some 1e-4 beside an outlier of 30.
    ("number_format", "least", "most"),
    [("int8-row", 1e-3, 5e-2), ("int8-row-a16", 1e-3, 2e-2), ("int16-row", 0, 3e-4), ("float32", 0, 1e-6)],
)
def test_the_error_of_a_product(tmp_path, number_format, least, most, calibrated):
    x, weight, bias = numbers()
    y = run(
        tmp_path, number_format, lambda f, r: f(r, "site", weight, bias), x, statistics_of(x) if calibrated else None
    )
    assert least <= error(y, x.astype(np.float64) @ weight + bias) <= most


@pytest.mark.parametrize("number_format", ["int8-row", "int8-row-a16"])
@pytest.mark.parametrize("layer", ["linear", "gated", "slices"])
def test_gptq_rounds_by_what_is_multiplied(tmp_path, number_format, layer):
    """Centred, smoothed, in slices of sorted channels: each has the Gram matrix of the inputs as they are then."""
    chance = np.random.default_rng(4)
    x = (chance.normal(size=(400, K // 4)) @ chance.normal(size=(K // 4, K)) + 3).astype(np.float32)
    weights = [chance.normal(size=shape).astype(np.float32) for shape in ((K, 2 * K), (K, 2 * K), (2 * K, N))]
    weights[0] /= 10
    wide = x.astype(np.float64)
    a = wide @ weights[0]
    hidden = a / (1 + np.exp(-a)) * (wide @ weights[1])
    statistics = {
        site: ChannelStatistics(*(f(rows, axis=0).astype(np.float32) for f in (np.min, np.max, np.mean)), gram)
        for site, rows in (("site", x), ("mlp.gate_up", x), ("mlp.down_proj", hidden))
        for gram in [(rows.T @ rows / len(rows)).astype(np.float32)]
    }
    found = {}
    for rounding in ("nearest", "gptq"):
        folder = tmp_path / rounding
        folder.mkdir()
        emit, exact = (lambda f, r: f(r, "site", weights[0])), a
        if layer != "linear":
            emit, exact = (lambda f, r: f.gated(r, "mlp", GatedWeights(*weights), None)), hidden @ weights[2]
        options = {"slices": 3 if layer == "slices" else 1, "rounding": rounding, "rounded_rows": True}
        found[rounding] = error(run(folder, number_format, emit, x, statistics, **options), exact)
    assert found["gptq"] < (0.6 if number_format == "int8-row-a16" else 0.95) * found["nearest"]


def test_two_digits_leave_nothing_of_the_activations_error(tmp_path):
    x, weight, _ = numbers()
    values, scale = quantize_columns(weight)
    y = run(tmp_path, "int8-row-a16", lambda f, r: f(r, "site", weight), x)
    assert error(y, x.astype(np.float64) @ (values * scale)) < 1e-4


@pytest.mark.parametrize(("number_format", "most"), [("int8-row", 2e-2), ("int8-row-a16", 6e-3), ("int16-row", 3e-4)])
def test_after_a_gelu(tmp_path, number_format, most):
    x, weight, bias = numbers(1)
    x = np.maximum(x, -0.17)
    y = run(tmp_path, number_format, lambda f, r: f(r, "site", weight, bias, after_gelu=True), x, statistics_of(x))
    assert error(y, x.astype(np.float64) @ weight + bias) < most


@pytest.mark.parametrize(("number_format", "most"), [("int8-row", 4e-2), ("int8-row-a16", 2e-2), ("int16-row", 3e-4)])
def test_gated(tmp_path, number_format, most):
    chance = np.random.default_rng(2)
    x = chance.normal(size=(ROWS, K)).astype(np.float32)
    gate, up = (chance.normal(size=(K, 2 * K)).astype(np.float32) / 10 for _ in "ab")
    down = chance.normal(size=(2 * K, N)).astype(np.float32)
    y = run(tmp_path, number_format, lambda f, r: f.gated(r, "mlp", GatedWeights(gate, up, down), None), x)
    wide = x.astype(np.float64)
    a = wide @ gate
    assert error(y, (a / (1 + np.exp(-a)) * (wide @ up)) @ down) < most


def test_rows_of_zeros(tmp_path):
    x, weight, bias = numbers()
    x[2] = 0
    y = run(tmp_path, "int16-row", lambda f, r: f(r, "site", weight, bias), x)
    np.testing.assert_allclose(y[2], bias, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(tmp_path):
    """Both digits of all rows go through one product."""
    x, weight, _ = numbers()
    together = run(tmp_path, "int16-row", lambda f, r: f(r, "site", weight), x)
    (tmp_path / "alone").mkdir()
    alone = run(tmp_path / "alone", "int16-row", lambda f, r: f(r, "site", weight), x[3:4])
    np.testing.assert_array_equal(alone[0], together[3])


def test_each_part_has_the_format_that_was_chosen(tmp_path):
    x, weight, bias = numbers()

    y = run(tmp_path, "int8-row", lambda f, r: _sum(f, r, weight, bias), x, choices=(("fine", "int16-row"),))
    exact = x.astype(np.float64) @ weight + bias
    (tmp_path / "coarse").mkdir()
    coarse = run(tmp_path / "coarse", "int8-row", lambda f, r: f(r, "other.site", weight, bias), x)
    # What the fine part adds it takes off again: int8's own error is left.
    np.testing.assert_allclose(y - exact, (coarse - exact), atol=2e-3)


def _sum(linears, rows, weight, bias):
    """fine + other - fine."""
    g = linears.g
    fine = linears(rows, "fine.site", weight, bias)
    return g.op(
        "Sub", g.op("Add", fine, linears(rows, "other.site", weight, bias)), linears(rows, "fine.b", weight, bias)
    )


def test_recipes_as_text():
    recipe = RECIPE.choosing({"layer.1": "int16-row", "embed": "float16"})
    assert recipe.to_text() == "layer.1=int16-row embed=float16"
    assert RECIPE.with_text({"parts": recipe.to_text()}) == recipe
    assert RECIPE.with_text({}) == RECIPE
    assert recipe.format_of("layer.1.mlp") == "int16-row" and recipe.format_of("layer.11.mlp") == "int8-row"
    assert recipe.format_of("embed.weight", recipe.embedding) == "float16"
    with pytest.raises(UsageError, match="layer.1 can be int8-row, int8-row-a16, int16-row"):
        RECIPE.with_text({"parts": "layer.1=int4-blocks"})


def test_every_finer_format_can_be_made(tmp_path):
    x, weight, bias = numbers()
    for name in {option for options in FINER.values() for option in options} - {"float16"}:
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, name, lambda f, r: f(r, "site", weight, bias), x).shape == (ROWS, N)
