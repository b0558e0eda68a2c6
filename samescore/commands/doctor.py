"""`samescore doctor`: what this box can run, and what stands in the way."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from typing import TYPE_CHECKING, Any

from samescore.commands.output import print_json

if TYPE_CHECKING:
    from samescore.runtime.doctor import BundleFacts, Facts, PlacedNodes, VariantFacts
    from samescore.runtime.doctor_findings import Finding

WIDTH = 110
INDENT, COLUMN = 2, 18


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "doctor",
        help="say what this box can run, and what stands in the way",
        description="Report on this box, and with BUNDLE on what the bundle does here.",
        epilog="exit codes: 0 usable, 1 the canary tripped, 3 the bundle is damaged, 4 no provider works, or not the one "
        "that was asked for",
    )
    command.add_argument("bundle", metavar="BUNDLE", nargs="?")
    command.add_argument(
        "--provider",
        metavar="P",
        default="auto",
        help="it must work: auto, cpu, cuda, migraphx, rocm, or another",
    )
    command.add_argument("--variant", metavar="V", help="load this variant of BUNDLE")
    command.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=120.0,
        help="seconds until a provider that does not answer is given up",
    )
    command.add_argument("--json", action="store_true", help="everything as one JSON document on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.runtime.doctor import examine
    from samescore.runtime.doctor_findings import diagnose, exit_code
    from samescore.runtime.errors import UsageError
    from samescore.runtime.providers import normalize_provider

    asked = normalize_provider(arguments.provider)
    if arguments.variant and not arguments.bundle:
        raise UsageError("--variant names a variant of a bundle: samescore doctor BUNDLE --variant V")
    if arguments.timeout <= 0:
        raise UsageError(f"--timeout must be above 0, got {arguments.timeout:g}")
    facts = examine(arguments.bundle, provider=asked, variant=arguments.variant, timeout=arguments.timeout)
    findings = diagnose(facts, asked)
    code = exit_code(findings)
    if arguments.json:
        found = [dataclasses.asdict(finding) for finding in findings]
        print_json({"exit_code": code, "asked": asked, "findings": found, **dataclasses.asdict(facts)})
    else:
        print(report(facts, findings))
    return code


def report(facts: Facts, findings: tuple[Finding, ...]) -> str:
    """The facts and findings for people."""
    sections = [
        ("Software", _software(facts)),
        ("Providers", _providers(facts)),
        ("CPU", _cpu(facts)),
        ("Memory", _memory(facts)),
        ("Graphics cards", _graphics(facts)),
        ("Environment", [(f"{name}={value}", "") for name, value in facts.environment.items()]),
        *([(f"Bundle {facts.bundle.path}", _bundle(facts.bundle))] if facts.bundle else []),
    ]
    text = [_section(title, rows) for title, rows in sections if rows]
    return "\n\n".join([*text, _findings(findings)])


def _software(facts: Facts) -> list[tuple[str, str]]:
    from samescore import __version__

    s = facts.software
    rows = [
        ("samescore", f"{s.samescore or __version__}, Python {s.python}, numpy {s.numpy}, tokenizers {s.tokenizers}"),
        ("system", s.system),
    ]
    installed = ", ".join(f"{name} {version}" for name, version in s.distributions.items()) or "not installed"
    reads = f"; reads IR ≤ {s.max_ir}, opset ≤ {s.max_opset}" if s.max_ir else ""
    rows.append(("ONNX Runtime", f"{installed}{reads}"))
    if s.plugins:
        rows.append(("plugins", ", ".join(f"{name} {version}" for name, version in s.plugins.items())))
    return rows


def _providers(facts: Facts) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for provider in facts.providers:
        said = {
            "ready": f"ready: computed a test product ({provider.seconds:.1f} s with the start of Python)",
            "loads": provider.message,
            "fails": f"in this build, but does not load: {', '.join(provider.missing) or provider.message}"
            + (" missing" if provider.missing else ""),
            "absent": provider.message,
        }[provider.state]
        rows.append((provider.target, said))
    known = {provider.name for provider in facts.providers}
    if others := [name for name in facts.software.providers if name not in known]:
        rows.append(("others", f"{', '.join(others)} (never by `auto`)"))
    return rows


def _cpu(facts: Facts) -> list[tuple[str, str]]:
    cpu = facts.processor
    quota = f"{cpu.limit.value:g} CPUs" if cpu.limit and cpu.limit.value else "no quota"
    said = f" ({cpu.limit.said})" if cpu.limit else ""
    int8 = {
        None: "uint8 × int8 products: not asked",
        False: "uint8 × int8 products are exact",
        True: "uint8 × int8 products clip here; samescore makes such weights uint8 when it loads them, which is exact and slower",
    }[cpu.saturates]
    return [
        ("model", cpu.model),
        ("threads", f"{cpu.threads} are used: {cpu.cores} cores, affinity {cpu.affinity}, {quota}{said}"),
        ("int8", f"{' '.join(cpu.int8_flags) or 'no special instructions'}; {int8}"),
    ]


def _memory(facts: Facts) -> list[tuple[str, str]]:
    held = facts.memory
    limit = "no cgroup"
    if held.limit:
        left = f"{_size(held.cgroup_left)} left of it" if held.cgroup_left is not None else "none"
        limit = f"{left} ({held.limit.said})"
    return [
        ("available", f"{_size(held.available)} of {_size(held.total)}"),
        ("cgroup limit", limit),
    ]


def _graphics(facts: Facts) -> list[tuple[str, str]]:
    from samescore.runtime.machine import CUDA_DRIVER

    cards = facts.graphics
    if not (cards.nvidia or cards.amd or cards.nvidia_driver or cards.rocm):
        return [("none", "no NVIDIA or AMD card, driver or ROCm is seen in /proc, /sys and /opt/rocm")]
    rows = [("NVIDIA", card) for card in cards.nvidia] + [("AMD", card) for card in cards.amd]
    if cards.nvidia_driver:
        rows.append(("NVIDIA driver", f"{cards.nvidia_driver} (CUDA 13 needs {CUDA_DRIVER} or newer)"))
    if cards.rocm:
        rows.append(("ROCm", cards.rocm))
    if cards.kfd is not None:
        rows.append(("/dev/kfd", "may be opened" if cards.kfd else "may not be opened by this user"))
    return rows


def _bundle(bundle: BundleFacts) -> list[tuple[str, str]]:
    state = "all digests match" if not bundle.damaged else f"{len(bundle.damaged)} damaged"
    rows = [("files", f"{bundle.files}, {_size(bundle.size)}, {state} (digest {bundle.digest[:16]}…)")]
    for variant in bundle.variants:
        rows.append((variant.name, _variant(variant)))
        rows += [("", f"on {placed.target}: {_placed(placed)}") for placed in variant.placed]
    if bundle.chosen:
        rows.append(("load takes", f"{bundle.chosen[0]} on {bundle.chosen[1]}"))
    elif not bundle.damaged:
        rows.append(("load takes", "nothing"))
    rows += [("", f"not {name}: {why}") for name, why in bundle.rejected.items()]
    if bundle.differs is not None:
        rows.append(("environment", "; ".join(bundle.differs) or "the one it was certified in"))
    if bundle.canary:
        rows.append(("canary", f"{bundle.canary['status']}: {bundle.canary['reason']}"))
    return rows


def _variant(variant: VariantFacts) -> str:
    return f"{variant.precision} for {variant.target}, {_size(variant.size)}, IR {variant.ir}, opset {variant.opset}"


def _placed(placed: PlacedNodes) -> str:
    from samescore.runtime.doctor_findings import counted

    if placed.problem:
        return placed.problem
    if placed.nodes is None:
        return "opens; this ONNX Runtime does not tell where nodes are"
    where = ", ".join(
        f"{count} nodes on {name.removesuffix('ExecutionProvider')}" for name, count in placed.nodes.items()
    )
    strays = f"; computing elsewhere: {counted(placed.strays)}" if placed.strays else ""
    return f"{where}{strays}"


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(_row(name, text) for name, text in rows)])


def _row(name: str, text: str) -> str:
    head = " " * INDENT + name.ljust(COLUMN - INDENT - 1) + " "
    if len(head) > COLUMN:
        return f"{head.rstrip()}  {text}".rstrip()
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * (COLUMN + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _findings(findings: tuple[Finding, ...]) -> str:
    if not findings:
        return "Findings: none"
    lines = ["Findings"]
    for number, finding in enumerate(findings, 1):
        stops = "" if not finding.code else f" [exit {finding.code}]"
        advice = [("     → ", line) for line in finding.advice.splitlines()]
        for lead, text in ((f"{number:>3}. ", finding.problem + stops), *advice):
            rest = " " * len(lead)
            lines.append(
                textwrap.fill(
                    text,
                    WIDTH,
                    initial_indent=lead,
                    subsequent_indent=rest,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
    return "\n".join(lines)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
