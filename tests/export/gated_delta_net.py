"""com.microsoft GatedDeltaNet from standard operators, written from its schema (ONNX Runtime 1.31.1), for a CPU to run.

ONNX Runtime has no CPU kernel of it. What runs in its place checks how our graphs are wired to the operator that the schema
describes: layouts, which heads share a key, what the decay is, where the state's axes lie. It says nothing of CUDA's kernels:
neither that they do what the schema says nor how exact they are.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

    query, key [batch, sequence, key heads, key size], value [batch, sequence, value heads, value size] (rank 4, float16);
    decay (logarithm), beta [batch, sequence, value heads]; initial_state [batch, value heads, value size, key size].
    A key head is shared by value heads / key heads neighbouring value heads.
"""

from pathlib import Path

import onnx
from onnx import parser

DOMAIN = "samescore.test"
FUNCTION = """
<domain: "samescore.test", opset_import: ["" : 21]>
GatedDeltaNet (query, key, value, decay, beta, initial_state) => (output)
{
    key_heads = Shape <start = 2, end = 3> (key)
    value_heads = Shape <start = 2, end = 3> (value)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    heads = Squeeze (value_heads)
    range = Range (zero, heads, one)
    before = Mul (range, key_heads)
    shared = Div (before, value_heads)
    query32 = Cast <to = 1> (query)
    key32 = Cast <to = 1> (key)
    value32 = Cast <to = 1> (value)
    queries = Gather <axis = 2> (query32, shared)
    keys = Gather <axis = 2> (key32, shared)
    last, outputs = Scan <num_scan_inputs = 5, scan_input_axes = [1, 1, 1, 1, 1], scan_output_axes = [1],
        body = step (float[b, h, v, k] before_state, float[b, h, k] q, float[b, h, k] x, float[b, h, v] y,
                     float[b, h] g, float[b, h] rate) => (float[b, h, v, k] after_state, float[b, h, v] read)
        {
            minus_one = Constant <value_ints = [-1]> ()
            both = Constant <value_ints = [2, 3]> ()
            kept = Exp (g)
            kept4 = Unsqueeze (kept, both)
            decayed = Mul (before_state, kept4)
            column = Unsqueeze (x, minus_one)
            known4 = MatMul (decayed, column)
            known = Squeeze (known4, minus_one)
            news = Sub (y, known)
            rate3 = Unsqueeze (rate, minus_one)
            written = Mul (news, rate3)
            written4 = Unsqueeze (written, minus_one)
            two = Constant <value_ints = [2]> ()
            row = Unsqueeze (x, two)
            change = MatMul (written4, row)
            after_state = Add (decayed, change)
            asked = Unsqueeze (q, minus_one)
            read4 = MatMul (after_state, asked)
            read = Squeeze (read4, minus_one)
        }
    > (initial_state, queries, keys, value32, decay, beta)
    scale = Constant <value_float = SCALE> ()
    scaled = Mul (outputs, scale)
    output = CastLike (scaled, query)
}
"""


def emulate(folder: Path) -> int:
    """Replace every GatedDeltaNet of `folder/model.onnx` by the function above; how many there were.

    AssertionError for a use of the operator that the function does not describe.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "GatedDeltaNet"]
    scales = set()
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        scales.add(attributes.pop("scale"))
        assert attributes == {"update_rule": b"gated_delta"} and node.domain == "com.microsoft"
        query, key, value, packing, decay, beta, state = node.input
        assert packing == "" and len(node.output) == 1
        del node.input[:], node.attribute[:]
        node.input.extend([query, key, value, decay, beta, state])
        node.domain = DOMAIN
    (scale,) = scales
    assert scale != 0  # which would stand for 1 / sqrt(key size)
    model.functions.append(parser.parse_function(FUNCTION.replace("SCALE", f"{scale:.9f}")))
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / "model.onnx"))
    return len(nodes)
