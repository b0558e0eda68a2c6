"""`samescore profiles`: the systems it knows by name."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from samescore.commands.output import EXIT_OK, print_json


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("profiles", help="list the systems that samescore knows by name")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.export.profiles import PROFILES

    if arguments.json:
        print_json([dataclasses.asdict(profile) for profile in PROFILES])
        return EXIT_OK
    for profile in PROFILES:
        state = "" if profile.available else "  (planned)"
        print(f"{profile.name:<18}{profile.source}{state}\n{'':<18}{profile.summary}")
    return EXIT_OK
