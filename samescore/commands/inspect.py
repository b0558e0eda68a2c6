"""`samescore inspect`: what a bundle holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from samescore.commands.output import EXIT_OK, label_mass, print_json

if TYPE_CHECKING:
    from samescore.runtime.manifest import Manifest


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("inspect", help="show what a bundle holds")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--json", action="store_true", help="the manifest and certificate as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.calibrate.certificate import CERTIFICATE_NAME
    from samescore.runtime.bundle import Bundle

    with Bundle(arguments.bundle) as bundle:
        manifest, parity = bundle.manifest, json.loads(bundle.read(CERTIFICATE_NAME))
        digest = bundle.digest
    if arguments.json:
        print_json({"digest": digest, "manifest": dataclasses.asdict(manifest), "parity": parity})
        return EXIT_OK
    source, contract = manifest.source, manifest.contract
    print(f"bundle      {arguments.bundle} (digest {digest[:16]}…, schema {manifest.schema_version})")
    print(f"profile     {manifest.profile or '–'}, {manifest.architecture}")
    for title, origin in (("source", source), ("base", source.base)):
        if origin is not None:
            at = f" at {origin.revision}" if origin.revision else ""
            print(f"{title:<12}{origin.kind} {origin.name}{at}")
    for note in source.notes:
        print(f"note        {note}")
    print(f"contract    {contract.kind}, {contract.max_tokens} tokens, cut {contract.truncation} {contract.ellipsis}")
    if manifest.generation is not None:
        return _generator(manifest, parity)
    print(f"labels      {', '.join(manifest.labels)} ({manifest.activation})")
    if manifest.label_tokens:
        print(f"tokens      {', '.join(f'{token.text!r} = {token.id}' for token in manifest.label_tokens)}")
    if manifest.values:
        print(f"values      {', '.join(f'{value:g}' for value in manifest.values)} (for the expected value)")
    if said := label_mass(parity["reference"]):
        print(f"label mass  {said}")
    for variant in manifest.variants:
        size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(f"{variant.name}/"))
        drift, verdict = (parity["variants"][variant.name][key] for key in ("drift", "verdict"))
        print(
            f"variant     {variant.name}: {variant.target}, {size / 1e6:.1f} MB; N={drift['texts']}, "
            f"max |Δp| {drift['max_abs_dp']:.1e}, p99 {drift['p99_abs_dp']:.1e}, gate {verdict['outcome']}"
        )
        if "parts" in variant.recipe:
            print(f"            finer: {variant.recipe['parts']}")
        if variant.recalibration:
            print(f"            recalibrated: {variant.recalibration.summary}")
    return EXIT_OK


def _generator(manifest: Manifest, parity: Any) -> int:
    """The lines of a bundle that generates text."""
    generation = manifest.generation
    assert generation is not None
    print(f"generates   text, {generation.context} tokens of context, vocabulary {generation.vocabulary}")
    print(f"chat        {generation.chat_template or 'no template'}, ends at {', '.join(map(str, generation.eos))}")
    if generation.defaults:
        print(f"sampling    {', '.join(f'{name} {value:g}' for name, value in generation.defaults.items())}")
    for variant in manifest.variants:
        size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(f"{variant.name}/"))
        outcome = parity["variants"][variant.name]["outcome"]
        print(f"variant     {variant.name}: {variant.target}, {size / 1e6:.1f} MB; against PyTorch: {outcome}")
    return EXIT_OK
