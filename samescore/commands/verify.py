"""`samescore verify`: a bundle re-checked on this box."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from samescore.commands.output import EXIT_GATE, EXIT_OK, print_json


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("verify", help="re-check a bundle on this box")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--reference", metavar="CKPT", help="run this checkpoint folder through PyTorch again")
    command.add_argument("--base", metavar="B", help="the base of CKPT, if that is an adapter (as in export)")
    command.add_argument("--texts", metavar="FILE", help="JSONL texts instead of the bundle's golden set")
    command.add_argument("--variant", metavar="V", help="only this variant")
    command.add_argument("--provider", metavar="P", default="auto", help="auto, cpu, cuda, migraphx or rocm")
    command.add_argument(
        "--resume", action="store_true", help="go on where a verify or export of the same was interrupted, or was done"
    )
    command.add_argument("--json", action="store_true", help="every number as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.calibrate.certificate import TABLE_LEGEND, parity_table, tokenization_line
    from samescore.calibrate.generation_certificate import LEGEND, generation_table
    from samescore.verifying import VerifyResult, verify

    result = verify(
        arguments.bundle,
        reference=arguments.reference,
        base=arguments.base,
        texts=arguments.texts,
        variant=arguments.variant,
        provider=arguments.provider,
        resume=arguments.resume,
        progress=True,
    )
    if result.note:
        print(f"samescore: {result.note}", file=sys.stderr)
    if arguments.json:
        print_json({"passed": result.passed, "note": result.note, **json.loads(result.certificate.to_json())})
    elif not isinstance(result, VerifyResult):
        print(generation_table(result.certificate.variants))
        print(LEGEND)
    else:
        print(parity_table(result.certificate.variants))
        if said := tokenization_line(result.certificate.tokenization):
            print(said)
        print(TABLE_LEGEND)
    return EXIT_OK if result.passed else EXIT_GATE
