"""Where ONNX Runtime put each node of a session, and which operators compute where nobody asked them to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# The session config entry without which ONNX Runtime keeps no record.
RECORD_ENTRY = "session.record_ep_graph_assignment_info"

# ONNX Runtime itself moves the arithmetic of dynamic shapes, a few integers, from the GPU to the CPU. Every other operator
# counts as computing, so that one that nobody thought of is reported and not overlooked.
_SHAPES = "Cast Concat Constant ConstantOfShape Gather Identity Range Reshape Shape Size Slice Squeeze Unsqueeze"
_INTEGERS = "Add Div Equal Max Min Mod Mul Sub"
BOOKKEEPING = frozenset(f"{_SHAPES} {_INTEGERS}".split())


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one session lie.

    first: the provider that ONNX Runtime lists first for the session. nodes: by provider, how many nodes of each
    operator. subgraphs: by provider, in how many pieces. Providers have ONNX Runtime's names (`CUDAExecutionProvider`).
    """

    first: str
    nodes: Mapping[str, Mapping[str, int]]
    subgraphs: Mapping[str, int]

    def count(self, provider: str) -> int:
        """How many nodes lie on a provider."""
        return sum(self.nodes.get(provider, {}).values())


def placement_of(session: Any) -> Placement | None:
    """The placement of an `onnxruntime.InferenceSession`.

    None where this ONNX Runtime keeps no such record (before 1.24 or so), or where the session was made without the
    config entry `RECORD_ENTRY` = "1".
    """
    report = getattr(session, "get_provider_graph_assignment_info", None)
    if report is None:
        return None
    try:
        pieces = report()
    except Exception:  # made without the config entry; ONNX Runtime's own exception types share no base
        return None
    nodes: dict[str, Counter[str]] = {}
    subgraphs: Counter[str] = Counter()
    for piece in pieces:
        subgraphs[piece.ep_name] += 1
        nodes.setdefault(piece.ep_name, Counter()).update(node.op_type for node in piece.get_nodes())
    return Placement(
        session.get_providers()[0], {name: dict(ops.most_common()) for name, ops in nodes.items()}, dict(subgraphs)
    )


def strays(placement: Placement, provider: str) -> dict[str, int]:
    """Operators that compute elsewhere (on the CPU) although `provider` was asked for, with their counts; most first.

    On CUDA the arithmetic of shapes may lie on the CPU; it is told by its operators (`BOOKKEEPING`), as ONNX Runtime reports no
    types. For every other provider each node counts: one that MIGraphX does not know splits the graph or sends all of it to
    the CPU.
    """
    elsewhere: Counter[str] = Counter()
    for name, operators in placement.nodes.items():
        if name != provider:
            elsewhere.update(operators)
    if provider != CUDA or not placement.count(provider):
        return dict(elsewhere.most_common())
    return {name: count for name, count in elsewhere.most_common() if name not in BOOKKEEPING}
