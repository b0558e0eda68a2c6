"""`samescore report`: a bundle's evidence as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from samescore.commands.output import EXIT_OK, output
from samescore.runtime.errors import UsageError


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("report", help="a bundle's evidence as one HTML page, with figures")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="the .html file to write")
    command.add_argument("--force", action="store_true", help="replace the file if it exists")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.reporting import render_report

    target = Path(arguments.output)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name a file in it: -o {target / 'report.html'}")
    if target.exists() and not arguments.force:
        raise UsageError(f"{target} exists; replace it with --force, or name another file with -o")
    with output(arguments.output) as write:
        page = render_report(arguments.bundle)
        write(page)
    print(f"samescore: {target}, {len(page.encode()) / 1e3:.0f} kB", file=sys.stderr)
    return EXIT_OK
