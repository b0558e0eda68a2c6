"""The `samescore` command.

Results go to stdout as JSON (tables for people where a command says so), messages and progress to stderr.

Exit codes: 0 done · 1 a gate failed or the canary refused · 2 wrong use · 3 bad bundle, checkpoint or input (with
`classify`: some lines could not be scored) · 4 a provider or package is missing · 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samescore import __version__
from samescore._progress import step
from samescore.runtime.errors import InputError, SamescoreError, UsageError

EXIT_OK, EXIT_GATE, EXIT_USE, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


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
        "4 a provider or package is missing, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"samescore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_profiles, _add_export, _add_inspect, _add_verify, _add_classify):
        add(commands)
    return parser


def _add_profiles(commands: Any) -> None:
    command = commands.add_parser("profiles", help="list the systems that samescore knows by name")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=_profiles)


def _add_export(commands: Any) -> None:
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
        help="cpu-int8, cpu-fp32, cpu-int4, cuda-fp16, cuda-int8, migraphx-fp16 or migraphx-int8; repeat for several (default: "
        "cpu-int8; cpu-fp32 for architectures without a hand-built graph)",
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
    command.add_argument("--golden", metavar="FILE", help="JSONL texts for the gate, with or without reference logits")
    command.add_argument(
        "--calibration", metavar="FILE", help="JSONL texts for activation ranges; none of the golden ones"
    )
    command.add_argument(
        "--golden-limit", metavar="N", type=int, help="use only the first N golden texts (large models, slow machines)"
    )
    command.add_argument(
        "--max-tokens", metavar="N", type=int, help="cut longer texts here (default: the profile's limit)"
    )
    command.add_argument(
        "--budget",
        metavar="B",
        help="keep parts of the network in float where a quantized variant needs it to stay inside `gate`, or inside numbers "
        "as in p99=5e-3,mean=1e-3",
    )
    command.add_argument(
        "--allow-drift", action="store_true", help="write the bundle even if a gate fails, marked as failed"
    )
    command.set_defaults(run=_export)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="show what a bundle holds")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--json", action="store_true", help="the manifest and certificate as JSON on stdout")
    command.set_defaults(run=_inspect)


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="re-check a bundle on this box")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--reference", metavar="CKPT", help="run this checkpoint folder through PyTorch again")
    command.add_argument("--base", metavar="B", help="the base of CKPT, if that is an adapter (as in export)")
    command.add_argument("--texts", metavar="FILE", help="JSONL texts instead of the bundle's golden set")
    command.add_argument("--variant", metavar="V", help="only this variant")
    command.add_argument("--provider", metavar="P", default="auto", help="auto, cpu, cuda, migraphx or rocm")
    command.add_argument("--json", action="store_true", help="every number as JSON on stdout")
    command.set_defaults(run=_verify)


def _add_classify(commands: Any) -> None:
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
    command.set_defaults(run=_classify)


def _profiles(arguments: argparse.Namespace) -> int:
    from samescore.export.profiles import PROFILES

    if arguments.json:
        _print_json([dataclasses.asdict(profile) for profile in PROFILES])
        return EXIT_OK
    for profile in PROFILES:
        state = "" if profile.available else "  (planned)"
        print(f"{profile.name:<18}{profile.source}{state}\n{'':<18}{profile.summary}")
    return EXIT_OK


def _export(arguments: argparse.Namespace) -> int:
    from samescore.calibrate.certificate import parity_table
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
        allow_drift=arguments.allow_drift,
        progress=True,
    )
    size = sum(entry.size for entry in result.manifest.files.values())
    print(parity_table(result.certificate.variants))
    for variant in result.manifest.variants:
        if "exact" in variant.recipe:
            print(f"{variant.name:<15}in float: {variant.recipe['exact']}")
    if said := _label_mass(dataclasses.asdict(result.certificate.reference)):
        print(f"label mass     {said}")
    print(f"{result.path}: {len(result.manifest.files) + 1} files, {size / 1e6:.1f} MB")
    if result.warning:
        print(f"samescore: warning: {result.warning}", file=sys.stderr)
    return EXIT_OK


def _label_mass(reference: Mapping[str, Any]) -> str | None:
    """The reference's label mass in words; None for a model with a trained head, and where it was not measured."""
    if reference["label_mass_mean"] is None:
        return None
    mean, least = reference["label_mass_mean"], reference["label_mass_min"]
    return f"mean {mean:.4f}, least {least:.4f} of the next token's probability is on the labels"


def _inspect(arguments: argparse.Namespace) -> int:
    from samescore.calibrate.certificate import CERTIFICATE_NAME
    from samescore.runtime.bundle import Bundle

    with Bundle(arguments.bundle) as bundle:
        manifest, parity = bundle.manifest, json.loads(bundle.read(CERTIFICATE_NAME))
        digest = bundle.digest
    if arguments.json:
        _print_json({"digest": digest, "manifest": dataclasses.asdict(manifest), "parity": parity})
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
    print(f"labels      {', '.join(manifest.labels)} ({manifest.activation})")
    if manifest.label_tokens:
        print(f"tokens      {', '.join(f'{token.text!r} = {token.id}' for token in manifest.label_tokens)}")
    if manifest.values:
        print(f"values      {', '.join(f'{value:g}' for value in manifest.values)} (for the expected value)")
    if said := _label_mass(parity["reference"]):
        print(f"label mass  {said}")
    for variant in manifest.variants:
        size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(f"{variant.name}/"))
        drift, verdict = (parity["variants"][variant.name][key] for key in ("drift", "verdict"))
        print(
            f"variant     {variant.name}: {variant.target}, {size / 1e6:.1f} MB; N={drift['texts']}, "
            f"max |Δp| {drift['max_abs_dp']:.1e}, p99 {drift['p99_abs_dp']:.1e}, gate {'PASS' if verdict['passed'] else 'FAIL'}"
        )
        if "exact" in variant.recipe:
            print(f"            in float: {variant.recipe['exact']}")
    return EXIT_OK


def _verify(arguments: argparse.Namespace) -> int:
    from samescore.calibrate.certificate import TABLE_LEGEND, parity_table
    from samescore.verifying import verify

    result = verify(
        arguments.bundle,
        reference=arguments.reference,
        base=arguments.base,
        texts=arguments.texts,
        variant=arguments.variant,
        provider=arguments.provider,
        progress=True,
    )
    if result.note:
        print(f"samescore: {result.note}", file=sys.stderr)
    if arguments.json:
        _print_json({"passed": result.passed, "note": result.note, **json.loads(result.certificate.to_json())})
    else:
        print(parity_table(result.certificate.variants))
        print(TABLE_LEGEND)
    return EXIT_OK if result.passed else EXIT_GATE


def _classify(arguments: argparse.Namespace) -> int:
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
    )
    failed = scored = 0
    with _input_lines(arguments) as lines, _output(arguments.output) as write, step("scored") as tick:
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


@contextmanager
def _output(path: str | None) -> Iterator[Callable[[str], Any]]:
    """A function that writes text to stdout, or to a file that appears whole or not at all."""
    if path is None:
        yield sys.stdout.write
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder; make it first, or choose another -o")
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as file:
        try:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


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
