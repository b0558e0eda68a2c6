"""Arguments of the commands that ask a bundle for text: which variant, and how tokens are chosen."""

from __future__ import annotations

import argparse
from typing import Any

# Of the command line, under the names that `Sampling` has for them.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "logprobs")


def add_model(command: argparse.ArgumentParser) -> None:
    """--provider, --variant, --threads."""
    command.add_argument("--provider", metavar="P", default="auto", help="auto, cpu or cuda")
    command.add_argument("--variant", metavar="V", help="a variant's name (default: the provider's first)")
    command.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: what this process may use)")


def add_sampling(
    command: argparse.ArgumentParser, *, defaults: str = "the checkpoint's generation_config.json"
) -> None:
    """--temperature, --top-p, --top-k, --min-p, --max-tokens, --seed, --stop, --thinking."""
    group = command.add_argument_group("sampling", f"what is not named comes from {defaults}")
    group.add_argument("--temperature", metavar="T", type=float, help="0 takes the most probable token each time")
    group.add_argument("--top-p", metavar="P", type=float, help="1 is off")
    group.add_argument("--top-k", metavar="K", type=int, help="0 is off")
    group.add_argument("--min-p", metavar="P", type=float, help="0 is off")
    group.add_argument("--max-tokens", metavar="N", type=int, help="the most tokens of an answer (default: 512)")
    group.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answers")
    group.add_argument("--stop", metavar="TEXT", action="append", help="ends an answer; may be repeated")
    group.add_argument(
        "--thinking", choices=("on", "off"), help="whether the model thinks first, where its template has that switch"
    )


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were named."""
    options = {name: getattr(arguments, name, None) for name in SAMPLING}
    return {name: value for name, value in options.items() if value is not None}


def thinking_of(arguments: argparse.Namespace) -> bool | None:
    """--thinking as the Generator takes it."""
    return None if arguments.thinking is None else bool(arguments.thinking == "on")
