"""`samescore compare`: two variants, precisions or versions of a model, held against each other."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from samescore.commands.output import EXIT_GATE, EXIT_OK, print_json

if TYPE_CHECKING:
    from samescore.comparing import CompareResult

# Flips shown in the table; --json has them all.
SHOWN_FLIPS = 20


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("compare", help="hold a bundle's scores against another's; exit 1 beyond a tolerance")
    command.add_argument("bundle_a", metavar="BUNDLE_A", help="the baseline")
    command.add_argument("bundle_b", metavar="BUNDLE_B", help="what is to replace it; may be the same folder")
    command.add_argument("--variant-a", metavar="V", help="a variant of A (default: the provider's first)")
    command.add_argument("--variant-b", metavar="V", help="a variant of B (default: as A's, else the provider's first)")
    command.add_argument("--texts", metavar="FILE", help="JSONL texts instead of A's golden set")
    command.add_argument(
        "--tolerance",
        metavar="T",
        help="fp32, fp16, int8, int4, or max=…,p99=…,mean=…,agreement=… (default: the looser of the two precisions)",
    )
    command.add_argument("--provider", metavar="P", default="auto", help="auto, cpu, cuda, migraphx or rocm")
    command.add_argument("--json", action="store_true", help="every number as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.comparing import compare

    result = compare(
        arguments.bundle_a,
        arguments.bundle_b,
        variant_a=arguments.variant_a,
        variant_b=arguments.variant_b,
        texts=arguments.texts,
        tolerance=arguments.tolerance,
        provider=arguments.provider,
        progress=True,
    )
    for note in result.notes:
        print(f"samescore: {note}", file=sys.stderr)
    if arguments.json:
        print_json(result.to_dict())
    else:
        print(comparison_table(result))
    return EXIT_OK if result.passed else EXIT_GATE


def comparison_table(result: CompareResult) -> str:
    """For people: who was compared, one row of numbers, what failed, and the flips."""
    d = result.drift
    lines = [
        f"{name}  {side.path}: {side.variant} on {side.target} (digest {side.digest[:16]}…)"
        for name, side in (("A", result.a), ("B", result.b))
    ]
    numbers = f"{'max |Δp|':>10}{'p99 |Δp|':>10}{'mean |Δp|':>11}{'KLD':>9}"
    lines.append(f"{'texts':>6}{'other ids':>11}{numbers}{'same label':>20}  tolerance {result.tolerance_name}")
    kld = f"{d.kld:.1e}" if d.kld is not None else "–"
    agreement = f"{d.agreement:.2%} ≥ {d.agreement_low:.2%}"
    lines.append(
        f"{d.texts:>6}{result.other_ids:>11}{d.max_abs_dp:>10.1e}{d.p99_abs_dp:>10.1e}{d.mean_abs_dp:>11.1e}{kld:>9}"
        f"{agreement:>20}  {result.verdict.outcome}"
    )
    lines.extend(f"  {failure}" for failure in (*result.verdict.failures, *result.verdict.notes))
    if result.identical:
        lines.append("identical: every probability is the same, bit for bit")
    for name, quality in (("A", result.quality_a), ("B", result.quality_b)):
        if quality is not None:
            lines.append(
                f"{name}  accuracy {quality.accuracy:.2%}, ECE {quality.ece:.4f}, Brier {quality.brier:.4f} "
                f"({quality.texts} texts with labels)"
            )
    lines.extend(_flips(result))
    lines.append(
        "Δp: largest difference of a text's probabilities, B from A. same label: share of texts, 95 % lower bound."
    )
    return "\n".join(lines)


def _flips(result: CompareResult) -> list[str]:
    if not result.flips:
        return []
    lines = [f"{len(result.flips)} flipped labels (texts counted from 0; margin: top probability minus the second)"]
    lines += [
        f"  text {flip.text}: {flip.label_a} (margin {flip.margin_a:.3f}) → {flip.label_b} (margin {flip.margin_b:.3f})"
        for flip in result.flips[:SHOWN_FLIPS]
    ]
    if len(result.flips) > SHOWN_FLIPS:
        lines.append(f"  … and {len(result.flips) - SHOWN_FLIPS} more: --json")
    return lines
