"""The residual stream inside a finished graph file: its stable value names, and how to read it out.

    hidden.<i>   before layer i (so after layer i - 1; hidden.0 is the embedding, the last one what the head reads)
    mixed.<i>    inside layer i, behind its token mixer (attention or linear attention) and before its feed-forward

Naming a value costs nothing at run time. Where a layer is computed for the pooled token alone, so are its values.
"""

from __future__ import annotations

import re

HIDDEN = re.compile(r"(hidden|mixed)\.([0-9]+)")


def hidden_name(index: int) -> str:
    """The residual stream before layer `index`."""
    return f"hidden.{index}"


def mixed_name(index: int) -> str:
    """The residual stream in layer `index`, behind its token mixer."""
    return f"mixed.{index}"


def with_hidden_outputs(graph: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A graph file's bytes with the residual stream as further outputs, and their names in the order of the network.

    No names for a graph that does not have them (the generic route, or an older bundle).
    """
    import onnx

    model = onnx.load_model_from_string(graph)
    made = {name for node in model.graph.node for name in node.output}
    names = sorted((name for name in made if HIDDEN.fullmatch(name)), key=_place)
    outputs = {value.name for value in model.graph.output}
    # A name alone will do: ONNX Runtime infers the type.
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    return model.SerializeToString(), tuple(names)


def _place(name: str) -> tuple[int, bool]:
    kind, _, index = name.partition(".")
    return int(index), kind == "mixed"
