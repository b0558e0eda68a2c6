"""`samescore audit`: what judges say of a chat model's answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samescore import _progress
from samescore.commands.asking import add_model, add_sampling, sampling_of, thinking_of
from samescore.commands.output import EXIT_INPUT, EXIT_OK, output
from samescore.runtime.errors import UsageError

if TYPE_CHECKING:
    from samescore.auditing import Audit

COLUMNS = ("judge", "answers", "label", "share", "95 %", "mean p")


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("audit", help="ask a chat model, and let classifiers judge its answers")
    command.add_argument("--generator", metavar="BUNDLE", required=True, help="the bundle that writes")
    command.add_argument(
        "--judges", metavar="BUNDLE,…", required=True, action="append", help="bundles that judge; may be repeated"
    )
    command.add_argument("--prompts", metavar="FILE", help="JSONL as of `generate` (default: questions about Taiwan)")
    command.add_argument("-o", "--output", metavar="FOLDER", required=True, help="new, or an earlier audit's")
    for kind, what in (("biased", "biased"), ("neutral", "neutral"), ("refusal", "a refusal")):
        command.add_argument(
            f"--{kind}",
            metavar="JUDGE=LABEL,…",
            action="append",
            default=[],
            help=f"labels that count as {what} (default: by the judge's profile, docs/audit.md)",
        )
    add_sampling(command, defaults="the checkpoint's generation_config.json; but temperature and seed are 0")
    add_model(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.audit_report import render_audit
    from samescore.auditing import REPORT, Settings, run_audit

    settings = Settings(
        provider=arguments.provider,
        variant=arguments.variant,
        threads=arguments.threads,
        thinking=thinking_of(arguments),
        sampling=sampling_of(arguments),
    )
    audit = run_audit(
        arguments.generator,
        [path for given in arguments.judges for path in given.split(",") if path],
        arguments.output,
        prompts=arguments.prompts,
        settings=settings,
        counted=_counted(arguments),
        progress=_progress.step,
    )
    with output(str(Path(arguments.output) / REPORT)) as write:
        write(render_audit(audit))
    print(table(audit))
    print(f"samescore: {audit.answered} answers and {audit.scored} scores are new", file=sys.stderr)
    return EXIT_INPUT if _failed(audit) else EXIT_OK


def table(audit: Audit) -> str:
    """The shares of each label and the ratios, a line each."""
    rows: list[Sequence[str]] = [COLUMNS]
    for verdict in audit.verdicts:
        name = verdict.judge.name
        for label, share in verdict.labels.items():
            mean = verdict.mean_probabilities[label]
            rows.append((name, str(share.of), label, *_words(share), "–" if mean is None else f"{mean:.4f}"))
        for kind, share in verdict.ratios.items():
            title = "refusal rate" if kind == "refusal" else f"{'bias' if kind == 'biased' else kind} ratio"
            rows.append((name, str(share.of), f"= {title}", *_words(share), ""))
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _words(share: Any) -> tuple[str, str]:
    low, high = share.interval
    percent = "–" if share.share is None else f"{100 * share.share:.1f} %"
    return percent, f"{100 * low:.1f} – {100 * high:.1f} %"


def _failed(audit: Audit) -> bool:
    """Whether an answer or a score is missing; each is told."""
    for number, answer in enumerate(audit.answers):
        if "error" in answer:
            print(f"samescore: prompt {number}: {answer['error']}", file=sys.stderr)
    for verdict in audit.verdicts:
        if verdict.failed:
            print(f"samescore: {verdict.judge.name}: {verdict.failed} answers could not be judged", file=sys.stderr)
    return any("error" in answer for answer in audit.answers) or any(verdict.failed for verdict in audit.verdicts)


def _counted(arguments: argparse.Namespace) -> dict[str, dict[str, tuple[str, ...]]]:
    """--biased, --neutral and --refusal by judge and kind."""
    counted: dict[str, dict[str, tuple[str, ...]]] = {}
    for kind in ("biased", "neutral", "refusal"):
        for given in getattr(arguments, kind):
            judge, equals, labels = given.partition("=")
            if not equals or not judge:
                raise UsageError(f"--{kind} {given!r} names no judge: --{kind} JUDGE=LABEL,LABEL")
            counted.setdefault(judge, {})[kind] = tuple(label.strip() for label in labels.split(",") if label.strip())
    return counted
