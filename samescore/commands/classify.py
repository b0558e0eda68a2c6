"""`samescore classify`: texts in, one JSON object per text out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samescore._progress import step
from samescore.commands.output import EXIT_INPUT, EXIT_OK, output
from samescore.runtime.errors import InputError, UsageError


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("classify", help="score texts; JSONL on stdout or in -o")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("text", metavar="TEXT", nargs="*", help="texts to score")
    command.add_argument(
        "-i", "--input", metavar="FILE", help="a .jsonl or .txt file (one text per line), or - for stdin"
    )
    command.add_argument("-o", "--output", metavar="FILE", help="write JSONL here instead of stdout")
    command.add_argument("--format", choices=("jsonl", "text"), help="of the input (default: by its name; - is jsonl)")
    command.add_argument("--provider", metavar="P", default="auto", help="auto, cpu, cuda, migraphx or rocm")
    command.add_argument("--variant", metavar="V", help="a variant's name (default: the provider's first)")
    command.add_argument(
        "--workers", metavar="N", type=int, help="texts scored at the same time (default: one per CPU)"
    )
    command.add_argument(
        "--max-tokens", metavar="N", type=int, help="cut longer texts here instead of the bundle's limit"
    )
    command.add_argument(
        "--canary",
        choices=("flag", "refuse", "off"),
        default="flag",
        help="score some golden texts first: `flag` warns where this box gives other numbers than the certified ones (default; "
        "only on another CPU, provider or ONNX Runtime), `refuse` always checks and stops",
    )
    command.add_argument("--low-memory", action="store_true", help="keep weights in the page cache; somewhat slower")
    command.add_argument(
        "--allow-role-tokens", action="store_true", help="leave role tokens inside message contents as they are"
    )
    command.add_argument("--raw", action="store_true", help="probabilities without the variant's recalibration")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.runtime.classifier import Classifier
    from samescore.runtime.records import Line, dump_records, score_lines
    from samescore.runtime.threads import available_threads

    if bool(arguments.text) == bool(arguments.input):
        raise UsageError(
            "name texts to score, or a file with -i FILE (not both): samescore classify BUNDLE -i texts.jsonl"
        )
    workers = arguments.workers
    if workers is None and arguments.input:
        workers = available_threads()
    classifier = Classifier(
        arguments.bundle,
        provider=arguments.provider,
        variant=arguments.variant,
        workers=workers,
        max_tokens=arguments.max_tokens,
        low_memory=arguments.low_memory,
        canary=arguments.canary,
        raw=arguments.raw,
    )
    failed = scored = 0
    with _input_lines(arguments) as lines, output(arguments.output) as write, step("scored") as tick:
        texts = (Line(number, {"text": text}, None) for number, text in enumerate(arguments.text, start=1))
        for line, record in score_lines(
            classifier, lines or texts, allow_role_tokens=arguments.allow_role_tokens, progress=tick
        ):
            write(dump_records([record]))
            scored += 1
            if "error" in record and "label" not in record:
                failed += 1
                print(f"samescore: line {line.number}: {record['error']}", file=sys.stderr)
    if failed:
        print(f"samescore: {failed} of {scored} lines could not be scored", file=sys.stderr)
    return EXIT_INPUT if failed else EXIT_OK


@contextmanager
def _input_lines(arguments: argparse.Namespace) -> Iterator[Iterator[Any] | None]:
    """The lines of -i, or None when the texts are on the command line."""
    from samescore.runtime.records import read_lines

    if not arguments.input:
        yield None
        return
    jsonl = _input_format(arguments.input, arguments.format) == "jsonl"
    if arguments.input == "-":
        yield read_lines(sys.stdin.buffer, jsonl=jsonl)
        return
    path = Path(arguments.input)
    if not path.exists() or path.is_dir():
        raise InputError(f"{path} cannot be read: it is {'a folder' if path.is_dir() else 'not there'}")
    with path.open("rb") as stream:
        yield read_lines(stream, jsonl=jsonl)


def _input_format(name: str, asked: str | None) -> str:
    by_suffix = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text"}
    chosen = asked or ("jsonl" if name == "-" else by_suffix.get(Path(name).suffix.lower()))
    if chosen is None:
        raise UsageError(f"{name}: neither .jsonl nor .txt; say which with --format jsonl or --format text")
    return chosen
