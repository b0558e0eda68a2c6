"""`samescore export`: a checkpoint into a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal

from samescore.commands.output import EXIT_OK, label_mass
from samescore.runtime.manifest import Manifest


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("export", help="turn a checkpoint into a bundle whose variants passed their gate")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a profile's name, a checkpoint folder, or a hub id (owner/name); the checkpoint may be a LoRA adapter",
    )
    command.add_argument("-o", "--output", metavar="BUNDLE", required=True, help="the bundle folder to write")
    command.add_argument(
        "--profile", metavar="P", help="whose text contract and texts to use (see `samescore profiles`)"
    )
    command.add_argument(
        "--variant",
        metavar="V",
        action="append",
        default=[],
        help="cpu-int8, cpu-fp32, cpu-int4, cuda-fp16, cuda-int8, cuda-fp16-chunked, migraphx-fp16 or migraphx-int8; repeat "
        "for several (default: cpu-int8; cpu-fp32 for architectures without a hand-built graph)",
    )
    command.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub source")
    command.add_argument(
        "--adapter-subfolder", metavar="DIR", help="where below SOURCE the adapter lies, as in checkpoint-500"
    )
    command.add_argument(
        "--base", metavar="B", help="folder or hub id of the adapter's base (default: the one that the adapter names)"
    )
    command.add_argument(
        "--label-tokens",
        metavar="T,T",
        help="SOURCE is a language model: score what it gives to these tokens as the next one, as in 0,1,2,3,4 or Yes,No "
        "(one token each; white space counts)",
    )
    command.add_argument(
        "--task",
        choices=("classify", "generate"),
        help="generate: SOURCE is a language model; its bundle generates text (default: classify, or the profile's task)",
    )
    _add_measuring(command)
    command.add_argument(
        "--fresh",
        action="store_true",
        help="measure every text anew, also those that an interrupted or earlier run did",
    )
    command.set_defaults(run=run)


def _add_measuring(command: argparse.ArgumentParser) -> None:
    """What the gate reads, and what it allows."""
    command.add_argument("--golden", metavar="FILE", help="JSONL texts for the gate, with or without reference logits")
    command.add_argument(
        "--calibration", metavar="FILE", help="JSONL texts for activation ranges; none of the golden ones"
    )
    command.add_argument(
        "--golden-limit",
        metavar="N",
        type=_limit,
        help="use only the first N golden texts, or `all` (default: all of --golden, the profile's number of those that ship); "
        "of --task generate: answer so many prompts (default: 200; 0: measure nothing)",
    )
    command.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        help="cut longer texts here; of --task generate, the most tokens of prompt and answer (default: the profile's limit)",
    )
    command.add_argument(
        "--budget",
        metavar="B",
        help="how much a quantized variant may drift on the calibration texts: gate (default), none, or some of max=1e-2,"
        "p99=5e-3,mean=1e-3,agreement=0.995; parts of the network get finer number formats where it needs them to stay inside",
    )
    command.add_argument(
        "--recipe", metavar="BUNDLE", help="take the formats of that bundle's variants instead of searching"
    )
    command.add_argument(
        "--allow-drift",
        action="store_true",
        help="write the bundle even if a gate fails, marked as failed; the default budget is then none",
    )
    command.add_argument(
        "--tokenization-texts",
        metavar="N",
        type=int,
        help="compare token ids with the Hugging Face tokenizer's on N strings made of the texts (default: 100000; 0: none)",
    )


def _limit(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or `all`, not {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    if _task(arguments) == "generate":
        return _generate(arguments)
    from samescore.calibrate.certificate import parity_table, tokenization_line
    from samescore.exporting import export_bundle

    result = export_bundle(
        arguments.source,
        arguments.output,
        profile=arguments.profile,
        variants=arguments.variant,
        revision=arguments.revision,
        adapter_subfolder=arguments.adapter_subfolder,
        base=arguments.base,
        label_tokens=arguments.label_tokens.split(",") if arguments.label_tokens is not None else (),
        golden=arguments.golden,
        calibration=arguments.calibration,
        max_tokens=arguments.max_tokens,
        golden_limit=arguments.golden_limit,
        budget=arguments.budget,
        recipe=arguments.recipe,
        allow_drift=arguments.allow_drift,
        tokenization_texts=arguments.tokenization_texts,
        fresh=arguments.fresh,
        progress=True,
    )
    size = sum(entry.size for entry in result.manifest.files.values())
    print(parity_table(result.certificate.variants))
    if said := tokenization_line(result.certificate.tokenization):
        print(said)
    _say_finer(result.manifest, result.times)
    if said := label_mass(dataclasses.asdict(result.certificate.reference)):
        print(f"label mass     {said}")
    print(f"{result.path}: {len(result.manifest.files) + 1} files, {size / 1e6:.1f} MB")
    if result.warning:
        print(f"samescore: warning: {result.warning}", file=sys.stderr)
    return EXIT_OK


def _say_finer(manifest: Manifest, times: Mapping[str, float]) -> None:
    """A line for each variant with parts in finer formats. times: over the plain recipe's, of those that were searched."""
    for variant in manifest.variants:
        if parts := variant.recipe.get("parts"):
            time = times.get(variant.name)
            cost = f" ({time:.1f} x the plain recipe's products, by table)" if time else ""
            print(f"{variant.name:<15}{len(parts.split())} parts finer{cost}: {parts}")


# Arguments that say how a classifier is read or measured.
_OF_CLASSIFIERS = ("adapter_subfolder", "base", "label_tokens")


def _task(arguments: argparse.Namespace) -> str:
    """What was asked for; else what the profile is for."""
    from samescore.export.profiles import find_profile

    if arguments.task is not None:
        return str(arguments.task)
    facts = find_profile(arguments.profile or "") or find_profile(arguments.source)
    return facts.task if facts else "classify"


def _generate(arguments: argparse.Namespace) -> int:
    from samescore.calibrate.generation_certificate import generation_table
    from samescore.generating import export_generator
    from samescore.runtime.errors import UsageError

    for name in (*_OF_CLASSIFIERS, "tokenization_texts"):
        if getattr(arguments, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for classifiers, and this bundle will generate text: leave it away"
            )
    result = export_generator(
        arguments.source,
        arguments.output,
        profile=arguments.profile,
        variants=arguments.variant,
        revision=arguments.revision,
        calibration=arguments.calibration,
        max_tokens=arguments.max_tokens,
        golden=arguments.golden,
        golden_limit=sys.maxsize if arguments.golden_limit == "all" else arguments.golden_limit,
        budget=arguments.budget,
        recipe=arguments.recipe,
        allow_drift=arguments.allow_drift,
        progress=True,
    )
    print(generation_table(result.certificate.variants))
    _say_finer(result.manifest, result.times)
    size = sum(entry.size for entry in result.manifest.files.values())
    print(f"{result.path}: {len(result.manifest.files) + 1} files, {size / 1e6:.1f} MB")
    if not result.certificate.measured:
        print("samescore: warning: not measured against PyTorch; parity.json says so", file=sys.stderr)
    return EXIT_OK
