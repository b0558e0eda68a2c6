"""`samescore calibrate`: a correction of each variant's logits, stored where it helps."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from samescore.commands.output import EXIT_GATE, EXIT_OK, print_json

if TYPE_CHECKING:
    from samescore.calibrating import VariantCalibration


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "calibrate", help="correct each variant's logits towards the reference or labels, where held-out texts gain"
    )
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument(
        "--texts",
        metavar="FILE",
        help="JSONL texts to fit on (2/3) and to judge by (1/3), none of them golden; with reference logits or --reference, "
        "or with labels",
    )
    command.add_argument("--reference", metavar="CKPT", help="let PyTorch run this checkpoint folder over the texts")
    command.add_argument("--base", metavar="B", help="the base of CKPT, if that is an adapter (as in export)")
    command.add_argument(
        "--to", choices=("reference", "labels"), default="reference", help="what to fit to (default: reference)"
    )
    command.add_argument(
        "--method",
        choices=("temperature", "vector", "platt", "isotonic"),
        default="temperature",
        help="platt and isotonic need scikit-learn, and two labels or sigmoids (default: temperature)",
    )
    command.add_argument(
        "--variant", metavar="V", action="append", default=[], help="only this variant; repeat for several"
    )
    command.add_argument("--remove", action="store_true", help="take the correction off again")
    command.add_argument("--json", action="store_true", help="every number as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.calibrating import calibrate_bundle

    result = calibrate_bundle(
        arguments.bundle,
        texts=arguments.texts,
        reference=arguments.reference,
        base=arguments.base,
        to=arguments.to,
        method=arguments.method,
        variants=arguments.variant,
        remove=arguments.remove,
        progress=True,
    )
    if arguments.json:
        variants = {name: dataclasses.asdict(outcome) for name, outcome in result.variants.items()}
        print_json({"refused": result.refused, "variants": variants})
    else:
        print("\n".join(_table(result.variants)))
    return EXIT_GATE if result.refused else EXIT_OK


COLUMNS = {
    "KLD": "kld",
    "mean |Δp|": "mean_abs_dp",
    "p99 |Δp|": "p99_abs_dp",
    "NLL": "nll",
    "ECE": "ece",
    "Brier": "brier",
}


def _table(variants: Mapping[str, VariantCalibration]) -> Iterator[str]:
    """For people: per variant what became of it, and held-out and golden texts before and after."""
    yield f"{'':<26}{'texts':>6}{''.join(f'{name:>11}' for name in COLUMNS)}  gate"
    for name, outcome in variants.items():
        if outcome.fit is None:
            yield f"{name}: the correction is removed"
            yield _golden_row("golden, now", outcome.golden.drift) + f"  {outcome.golden.verdict.outcome}"
            continue
        found = outcome.fit.recalibration
        said = (
            "stored"
            if outcome.stored
            else f"not stored: {'refused, ' if outcome.refused else 'no gain, '}{outcome.reason}"
        )
        yield f"{name}: {found.summary}: {said}"
        yield _row("held out, before", found.texts_held_out, dataclasses.asdict(found.before))
        yield _row("held out, after", found.texts_held_out, dataclasses.asdict(found.after))
        yield _golden_row("golden, before", outcome.golden.before)
        yield _golden_row("golden, after", outcome.golden.drift) + f"  {outcome.golden.verdict.outcome}"


def _golden_row(title: str, drift: Any) -> str:
    labels = drift.labels
    scores = {"ece": labels.ece, "brier": labels.brier} if labels else {}
    return _row(title, drift.texts, {**dataclasses.asdict(drift), **scores})


def _row(title: str, texts: int, numbers: Mapping[str, Any]) -> str:
    values = (numbers.get(key) for key in COLUMNS.values())
    return f"  {title:<24}{texts:>6}" + "".join(f"{'–' if value is None else f'{value:.2e}':>11}" for value in values)
