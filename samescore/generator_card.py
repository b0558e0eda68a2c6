"""The README.md of a bundle that generates text."""

from __future__ import annotations

from collections.abc import Mapping

from samescore.calibrate.generation_certificate import greedy_line, perplexity_line
from samescore.card import megabytes, origin_of
from samescore.export.profiles import Profile
from samescore.generation_gate import GenerationCertificate
from samescore.runtime.manifest import FileEntry, Generation, Manifest


def generator_card(
    manifest: Manifest, certificate: GenerationCertificate, files: Mapping[str, FileEntry], facts: Profile | None
) -> str:
    """Markdown: what the bundle is, where it comes from, what is known of its exactness, and how to use it."""
    generation, source = manifest.generation, manifest.source
    assert generation is not None
    variants = "\n".join(
        f"| `{v.name}` | {v.target} | {v.precision} | {megabytes(files, v.name)} | {v.recipe['linear']} linear layers, "
        f"{v.recipe['embedding']} embedding and head; smoothing {v.recipe['smoothing']} | "
        f"{_outcome(certificate, v.name)} |"
        for v in manifest.variants
    )
    return f"""# {manifest.profile or source.name}, a samescore bundle

{manifest.architecture}, exported by samescore {manifest.samescore_version} from {origin_of(source)}
(checkpoint digest `{source.sha256}`).

It generates text: prompt and answer together up to {generation.context} tokens, of a vocabulary of {generation.vocabulary}.
{_chat(generation)}

| variant | for | precision | size | recipe | against PyTorch |
|---|---|---|---|---|---|
{variants}

{_evidence(certificate)}

## Licence and limits

Licence of the source: {facts.licence if facts else "see the source"}. Its own card, with its intended use and its limits, is
in `SOURCE_CARD.md` where the source had one. Nothing here says that what the source writes is right.
"""


def _outcome(certificate: GenerationCertificate, variant: str) -> str:
    parity = certificate.variants[variant]
    return "; ".join([parity.outcome.lower() if parity.outcome != "FAIL" else "FAILED", *parity.failures])


def _evidence(certificate: GenerationCertificate) -> str:
    if certificate.measured:
        return _numbers(certificate)
    return (
        "What is **not measured** was not held against PyTorch: nothing is known of how exactly that variant writes what the "
        "source would."
    )


def _numbers(certificate: GenerationCertificate) -> str:
    """The table of a measured bundle."""
    rows, lines = [], []
    for name, parity in certificate.variants.items():
        drift = parity.drift
        if drift is None:
            continue
        for along, one in (("answers", drift.answers), ("texts", drift.texts)):
            rows.append(
                f"| `{name}` | {along} | {one.sequences} | {one.positions} | {one.mean_kld:.2e} ({one.mean_kld_low:.1e} to "
                f"{one.mean_kld_high:.1e}) | {one.max_kld:.1e} | {one.p99_abs_dp:.1e} | {one.same:.2%} ({one.same_low:.2%} to "
                f"{one.same_high:.2%}) |"
            )
        lines.append(f"- `{name}`: {greedy_line(drift)}; {perplexity_line(drift)}.")
    reference = certificate.reference
    noise = ""
    if reference is not None and reference.bf16_answers_kld is not None and reference.bf16_texts_kld is not None:
        noise = (
            f"\n\nThe source's own bfloat16 run has a mean KLD of {reference.bf16_answers_kld:.2e} on answers and "
            f"{reference.bf16_texts_kld:.2e} on texts."
        )
    table = "\n".join(rows)
    return f"""Each next token's distribution against PyTorch float32, along PyTorch's own greedy answers and along real texts
(95 % intervals; all numbers are in `parity.json`):

| variant | along | sequences | tokens | mean KLD | largest KLD | p99 of Δp | same likeliest token |
|---|---|---|---|---|---|---|---|
{table}

{chr(10).join(lines)}{noise}

`samescore verify` measures again on your box, without PyTorch."""


def _chat(generation: Generation) -> str:
    named = ", ".join(f"{name} {value:g}" for name, value in generation.defaults.items())
    template = (
        f"Messages become text through the source's own template, `{generation.chat_template}`."
        if generation.chat_template
        else "The source has no chat template: it continues texts."
    )
    return f"{template} The source's sampling: {named or 'none named, so the likeliest token'}."
