"""The `samescore` command.

Results go to stdout as JSON (tables for people where a command says so), messages and progress to stderr.

Exit codes: 0 done · 1 a gate failed or the canary refused · 2 wrong use · 3 bad bundle, checkpoint or input (with
`classify`: some lines could not be scored) · 4 a provider or package is missing or does not work · 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from samescore import __version__
from samescore.commands import (
    audit,
    calibrate,
    chat,
    classify,
    compare,
    doctor,
    export,
    generate,
    inspect,
    profiles,
    report,
    verify,
    warmup,
)
from samescore.commands.output import EXIT_INPUT, EXIT_INTERRUPTED, EXIT_OK
from samescore.runtime.errors import SamescoreError

COMMANDS = (
    profiles,
    export,
    inspect,
    verify,
    calibrate,
    compare,
    report,
    classify,
    chat,
    generate,
    audit,
    warmup,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    _log_to_stderr()
    signal.signal(signal.SIGTERM, _raise_exit)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except SamescoreError as error:
        print(f"samescore: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("samescore: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        print(f"samescore: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return EXIT_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="samescore",
        description="Export Hugging Face classifiers to ONNX once, run them anywhere without PyTorch, "
        "and prove that the score is the same.",
        epilog="exit codes: 0 done, 1 a gate failed or the canary refused, 2 wrong use, 3 bad bundle, checkpoint or input, "
        "4 a provider or package is missing or does not work, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"samescore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _log_to_stderr() -> None:
    logger = logging.getLogger("samescore")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("samescore: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _raise_exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
