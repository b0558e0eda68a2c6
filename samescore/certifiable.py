"""Whether this box can run the gate of a variant."""

from __future__ import annotations

from collections.abc import Sequence

from samescore.export.recipes import VariantSpec
from samescore.runtime.doctor import computes
from samescore.runtime.errors import ProviderError
from samescore.runtime.providers import available_targets


def check_certifiable(specs: Sequence[VariantSpec]) -> None:
    """ProviderError for a variant whose gate this box's ONNX Runtime cannot run; it names one that any box can certify."""
    for spec in specs:
        if spec.certified_on == "cpu":
            continue
        offered = available_targets()
        if spec.certified_on in offered and computes(spec.certified_on):
            continue
        instead = "" if spec.instead is None else f", or take {spec.instead}, which any box can certify"
        raise ProviderError(
            f"{spec.name} holds an operator that ONNX Runtime has no CPU kernel for, so its gate must run on "
            f"{spec.certified_on}, which does not compute here (this ONNX Runtime offers {', '.join(offered)}): no bundle "
            f"is written without its evidence. Export it on a box with samescore[{spec.certified_on}]{instead}"
        )
