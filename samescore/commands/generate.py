"""`samescore generate`: prompts in, one JSON object with its answer per prompt out; goes on where it was interrupted."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samescore._progress import step
from samescore.commands.asking import add_model, add_sampling, sampling_of, thinking_of
from samescore.commands.output import EXIT_INPUT, EXIT_OK
from samescore.resumable import json_line, resumable
from samescore.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from samescore.runtime.generation.generator import Generator

Answers = Iterator[list[tuple[Any, dict[str, Any]]]]


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("generate", help="answer prompts; JSONL on stdout or in -o")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument(
        "-i",
        "--input",
        metavar="FILE",
        required=True,
        help="JSONL with `prompt` (one user message), `messages` (a chat) or `text` (gone on with as it is); - for stdin",
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write JSONL here instead of stdout; after an interruption the same command goes on where it was",
    )
    command.add_argument(
        "--fresh", action="store_true", help="begin anew where an interrupted run would be gone on with"
    )
    command.add_argument("--batch", metavar="N", type=int, default=8, help="prompts answered together (default: 8)")
    command.add_argument(
        "--logprobs", metavar="N", type=int, help="log probabilities of each token and of the N most probable ones"
    )
    command.add_argument(
        "--reuse",
        action="store_true",
        help="read beginnings that prompts share once: faster behind a long system prompt, but a resumed run may then differ "
        "by rounding",
    )
    add_sampling(command)
    add_model(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.runtime.generation.engine import CACHE_BYTES
    from samescore.runtime.generation.generator import Generator

    if arguments.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {arguments.batch}")
    raw = _read(arguments.input)
    generator = Generator(
        arguments.bundle,
        provider=arguments.provider,
        variant=arguments.variant,
        threads=arguments.threads,
        cache_bytes=CACHE_BYTES if arguments.reuse else 0,
    )
    if arguments.output is None:
        return _to_stdout(generator, raw, arguments)
    settings = {
        "input": hashlib.sha256(raw).hexdigest(),
        "bundle": generator.digest,
        "variant": generator.variant.name,
        "provider": generator.target,
        "batch": arguments.batch,
        "reuse": arguments.reuse,
        "thinking": arguments.thinking,
        **sampling_of(arguments),
    }
    with resumable(arguments.output, settings, group=arguments.batch, fresh=arguments.fresh) as file:
        failed = sum("error" in record for record in file.kept_records())
        for group in _answers(generator, raw, arguments, skip=file.kept):
            file.write([record for _, record in group])
            failed += _failures(group)
    return _said(failed)


def _to_stdout(generator: Generator, raw: bytes, arguments: argparse.Namespace) -> int:
    failed = 0
    for group in _answers(generator, raw, arguments, skip=0):
        sys.stdout.write("".join(json_line(record) for _, record in group))
        sys.stdout.flush()
        failed += _failures(group)
    return _said(failed)


def _answers(generator: Generator, raw: bytes, arguments: argparse.Namespace, *, skip: int) -> Answers:
    """The answers to all lines but the first `skip` ones, in groups."""
    from samescore.runtime.generation.lines import answer_lines
    from samescore.runtime.records import read_lines

    lines = read_lines(io.BytesIO(raw), jsonl=True)
    total = sum(1 for line in io.BytesIO(raw) if line.strip())
    with step("answered", max(0, total - skip)) as tick:
        yield from answer_lines(
            generator,
            islice(lines, skip, None),
            batch=arguments.batch,
            thinking=thinking_of(arguments),
            progress=tick,
            **sampling_of(arguments),
        )


def _failures(group: Sequence[tuple[Any, dict[str, Any]]]) -> int:
    """How many lines of a group have no answer; each is told."""
    failed = 0
    for line, record in group:
        if "error" in record:
            failed += 1
            print(f"samescore: line {line.number}: {record['error']}", file=sys.stderr)
    return failed


def _said(failed: int) -> int:
    if failed:
        print(f"samescore: {failed} lines could not be answered", file=sys.stderr)
    return EXIT_INPUT if failed else EXIT_OK


def _read(name: str) -> bytes:
    """The whole input: prompts are small beside what answering them takes, and its digest tells whether it has changed."""
    if name == "-":
        return sys.stdin.buffer.read()
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{path} cannot be read: it is {'a folder' if path.is_dir() else 'not there'}")
    return path.read_bytes()
