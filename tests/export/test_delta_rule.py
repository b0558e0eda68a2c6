"""The gated delta rule in plain ONNX against a float64 recurrence and against transformers; what surrounds it; its limit."""

import functools
import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from samescore.export.graphs import delta_rule
from samescore.export.graphs.delta_net import DeltaHeads, PlainDeltaNet
from samescore.export.graphs.linears import silu

from ..conftest import plain_graph

# Of the largest output of a text.
TOLERANCE = 1e-5
INPUTS = ("query", "key", "value", "decay", "beta")
# (key heads, value heads, key size, value size)
LAYOUTS = {"as many value heads": (2, 2, 16, 24), "twice as many": (2, 4, 16, 24)}
REAL_SIZE = (1, 2, 128, 128)
TOKENS = ("random", "three words", "repeated", "nearly identical")
DECAYS = {
    "none": lambda u: 0 * u,
    "weak": lambda u: -1e-4 * u,
    "usual": lambda u: -0.3 * u,
    "strong": lambda u: -100 * u,
    "mixed": lambda u: np.where(u < 0.1, -40.0, -1e-3 * u),
}
BETAS = {"near 0": lambda u: 1e-3 * u, "usual": lambda u: u, "near 1": lambda u: 1 - 1e-3 * u * (u > 0.5)}
CASES = list(itertools.product(TOKENS, DECAYS, BETAS))
# In texts without decay, every token is remembered to the end.
LONG_CASES = tuple(
    (tokens, decay, "near 1") for decay in ("none", "usual") for tokens in ("nearly identical", "random")
)


def unit(x):
    return x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)


def arrays(length, layout, cases=CASES, seed=0):
    """The five inputs, float32 [cases, length, heads, size]; decay and beta [cases, length, value heads]."""
    key_heads, value_heads, key_size, value_size = layout
    random = np.random.default_rng(seed)
    shape = (length, key_heads, key_size)
    rows = []
    for tokens, decay, beta in cases:
        word = random.standard_normal((1, key_heads, key_size))
        key = {
            "random": random.standard_normal(shape),
            "three words": random.standard_normal((3, *shape[1:]))[random.integers(0, 3, length)],
            "repeated": np.broadcast_to(word, shape),
            "nearly identical": word + 1e-3 * random.standard_normal(shape),
        }[tokens]
        uniform = random.random((2, length, value_heads))
        # Queries lean towards their token's key: an output that is all cancellation would be no scale for errors.
        query = unit(key) + unit(random.standard_normal(shape))
        rows.append(
            (
                unit(query) / np.sqrt(key_size),
                unit(key),
                random.standard_normal((length, value_heads, value_size)),
                DECAYS[decay](uniform[0]),
                BETAS[beta](uniform[1]),
            )
        )
    return [np.stack(part).astype(np.float32) for part in zip(*rows, strict=True)]


def recurrence(query, key, value, decay, beta):
    """The definition, token by token in float64: [batch, sequence, value heads, value size]."""
    repeats = value.shape[2] // key.shape[2]
    query, key = (np.repeat(x.astype(np.float64), repeats, axis=2) for x in (query, key))
    value, decay, beta = (x.astype(np.float64) for x in (value, decay, beta))
    state = np.zeros((*key.shape[::2], key.shape[3], value.shape[3]))
    outputs = np.empty(value.shape)
    for t in range(value.shape[1]):
        state *= np.exp(decay[:, t])[..., None, None]
        missing = value[:, t] - (key[:, t, :, None] @ state)[:, :, 0]
        state += key[:, t, ..., None] * (beta[:, t, :, None] * missing)[:, :, None]
        outputs[:, t] = (query[:, t, :, None] @ state)[:, :, 0]
    return outputs


@functools.cache
def example(length, layout, cases=tuple(CASES)):
    """Inputs and what the recurrence makes of them."""
    inputs = arrays(length, layout, cases)
    return inputs, recurrence(*inputs)


def session(model, *, optimised=True):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(opened, inputs):
    """The output in the shape of `value`."""
    feeds = {name: x.reshape(*x.shape[:2], -1) for name, x in zip(INPUTS, inputs, strict=True)}
    return opened.run(None, feeds)[0].reshape(inputs[2].shape)


def errors(result, expected):
    """Of each row: the largest difference, relative to the row's largest expected output."""
    axes = tuple(range(1, expected.ndim))
    return np.abs(result - expected).max(axes) / np.abs(expected).max(axes)


def assert_close(result, expected, cases=CASES, tolerance=TOLERANCE):
    found = errors(result, expected)
    worst = int(found.argmax())
    assert found[worst] <= tolerance, f"{found[worst]:.1e} of the largest output: {cases[worst]}"


def built(folder, layout, max_tokens):
    key_heads, value_heads, key_size, value_size = layout
    key_width = key_heads * key_size
    widths = (key_width, key_width, value_heads * value_size, value_heads, value_heads)

    def body(g, *inputs):
        plan = delta_rule.chunk_plan(g, g.op("Shape", inputs[0], start=1, end=2), max_tokens)
        return delta_rule.plain_delta_rule(
            g,
            plan,
            *inputs,
            key_heads=key_heads,
            value_heads=value_heads,
            key_size=key_size,
            value_size=value_size,
        )

    return plain_graph(folder, dict(zip(INPUTS, widths, strict=True)), body)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def model(layout, tmp_path_factory):
    return built(tmp_path_factory.mktemp("delta_rule"), layout, 8192)


@pytest.fixture(scope="module", params=["optimised", "as written"])
def opened(request, model):
    return session(model, optimised=request.param == "optimised")


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 130])
def test_equals_the_recurrence(opened, layout, length):
    inputs, expected = example(length, layout)
    assert_close(run(opened, inputs), expected)


@pytest.mark.parametrize(
    "length", [500, 1000, pytest.param(2048, marks=pytest.mark.slow), pytest.param(8192, marks=pytest.mark.slow)]
)
def test_equals_the_recurrence_over_long_texts(opened, layout, length):
    inputs, expected = example(length, layout, LONG_CASES)
    assert_close(run(opened, inputs), expected, LONG_CASES)


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("length", [65, 500, pytest.param(8192, marks=pytest.mark.slow)])
def test_equals_the_recurrence_with_heads_of_the_real_size(tmp_path, length, optimised):
    inputs, expected = example(length, REAL_SIZE, LONG_CASES[:2])
    opened = session(built(tmp_path, REAL_SIZE, 8192), optimised=optimised)
    assert_close(run(opened, inputs), expected, LONG_CASES)


@pytest.mark.torch
@pytest.mark.parametrize("length", [1, 64, 65, 130])
@pytest.mark.parametrize("function", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_equals_transformers(model, layout, length, function):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5 import modeling_qwen3_5

    # The chunked reference subtracts sums from the chunk's start: up to 3e-5 off where decays are strong.
    cases = [case for case in CASES if case[1] not in ("strong", "mixed") or "recurrent" in function]
    inputs = arrays(length, layout, cases)
    query, key, value, decay, beta = (torch.from_numpy(x) for x in inputs)
    expected, _ = getattr(modeling_qwen3_5, function)(query * layout[2] ** 0.5, key, value, g=decay, beta=beta)
    assert_close(run(session(model), inputs), expected.numpy(), cases)


def test_small_decays_behind_a_strong_one_keep_their_digits(opened, layout):
    """Differences of sums from the chunk's start would be off by 1e-5 here."""
    cases = [("random", "weak", "near 1"), ("three words", "weak", "near 1")]
    inputs = arrays(64, layout, cases)
    inputs[3][:, 0] = -1000
    assert_close(run(opened, inputs), recurrence(*inputs), cases, tolerance=2e-6)


def test_tokens_do_not_see_those_after_them(opened, layout):
    """Right padding needs no mask, whatever stands there."""
    whole = arrays(200, layout)
    for part in (whole[0], whole[2]):
        part[:, 70:] *= 100
    alone = [part[:, :70] for part in whole]
    assert_close(run(opened, whole)[:, :70], run(opened, alone), tolerance=1e-6)


def test_rows_of_a_batch_do_not_mix(opened, layout):
    inputs = arrays(130, layout)
    together = run(opened, inputs)
    for row in range(0, len(CASES), 7):
        alone = run(opened, [part[row : row + 1] for part in inputs])
        assert_close(together[row : row + 1], alone, CASES[row:], tolerance=1e-6)


@pytest.mark.parametrize(("max_tokens", "capacity"), [(1, 64), (64, 64), (65, 128), (130, 256), (512, 512)])
@pytest.mark.parametrize("optimised", [True, False])
def test_a_text_beyond_the_limit_fails(tmp_path, max_tokens, capacity, optimised):
    """Whole chunks and a power of two of them can be read; one token more is an error, as are many."""
    layout, case = (1, 2, 8, 8), CASES[:1]
    opened = session(built(tmp_path, layout, max_tokens), optimised=optimised)
    for length in {1, max_tokens, capacity}:
        inputs = arrays(length, layout, case)
        assert_close(run(opened, inputs), recurrence(*inputs), case)
    for length in (capacity + 1, 2 * capacity, 2 * capacity + 1, 4 * capacity, 8192):
        with pytest.raises(Fail, match="cannot be reshaped"):
            run(opened, arrays(length, layout, case))


@pytest.mark.parametrize(("max_tokens", "nodes"), [(64, 60), (512, 105), (8192, 160)])
def test_the_graph_is_small_standard_and_without_control_flow(tmp_path, max_tokens, nodes):
    path = built(tmp_path, LAYOUTS["twice as many"], max_tokens)
    onnx.checker.check_model(path, full_check=True)
    loaded = onnx.load(path)
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", 20)]
    for node in loaded.graph.node:
        assert onnx.defs.has(node.op_type, 20, "") and node.domain == ""
        assert not any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)
    # Before the first Pad stands the plan, which all layers share.
    first = [node.op_type for node in loaded.graph.node].index("Pad")
    assert {node.op_type for node in loaded.graph.node[:first]} == {"Shape", "Add", "Div", "Mul", "Sub", "Concat"}
    assert len(loaded.graph.node) - first <= nodes


def values(folder, x, body):
    """What `body` makes of x [batch, sequence, width]."""
    return session(plain_graph(folder, {"x": x.shape[-1]}, body)).run(None, {"x": x})[0]


def test_softplus_neither_overflows_nor_loses_small_results(tmp_path):
    x = np.concatenate([np.linspace(-85, 100, 5000), [-1e4, 0.0, 1e4, 1e30]]).astype(np.float32).reshape(1, -1, 1)
    expected = np.logaddexp(0, x.astype(np.float64))
    result = values(tmp_path, x, delta_rule.softplus)
    np.testing.assert_allclose(result, expected, rtol=5e-7, atol=1e-37)


def delta_net(g, x, kernel=4):
    """Of 6 channels: one query, one key and four values."""
    heads = DeltaHeads(key_heads=1, value_heads=4, key_size=1, value_size=1, kernel=kernel)
    return PlainDeltaNet(g, heads, g.op("Shape", x, start=1, end=2), 64)


def test_gates(tmp_path):
    random = np.random.default_rng(2)
    x = (10 * random.standard_normal((2, 30, 4))).astype(np.float32)
    rate = -np.exp(random.uniform(-4, 3, 4)).astype(np.float32)
    bias = random.uniform(-4, 3, 4).astype(np.float32)

    def body(g, x):
        return g.op("Concat", *delta_net(g, x).gates(x, g.weight("bias", bias), g.weight("rate", rate), x), axis=-1)

    decay, beta = np.split(values(tmp_path, x, body), 2, axis=-1)
    np.testing.assert_allclose(decay, rate * np.logaddexp(0, (x + bias).astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(beta, 1 / (1 + np.exp(-x.astype(np.float64))), atol=2e-7)


@pytest.mark.torch
def test_convolution_and_activation_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn

    random = np.random.default_rng(2)
    weight = random.standard_normal((6, 1, 4)).astype(np.float32)
    for length in (1, 3, 4, 50):
        x = random.standard_normal((2, 6, length)).astype(np.float32)
        expected = causal_conv1d_fn(torch.from_numpy(x), torch.from_numpy(weight[:, 0]), activation="silu")

        def body(g, rows):
            convolved = delta_net(g, rows).convolve(rows, g.weight("conv1d", weight), 0)
            return g.op("Transpose", silu(g, convolved), perm=[0, 2, 1])

        result = values(tmp_path / str(length), np.ascontiguousarray(x.transpose(0, 2, 1)), body)
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-6)
