"""The bundle's README.md: a model card a person can read."""

from __future__ import annotations

from collections.abc import Mapping

from samescore.calibrate.certificate import TABLE_LEGEND, Certificate, parity_table
from samescore.calibrate.next_token import mass_warning
from samescore.export.profiles import Profile
from samescore.export.recipes import variant_spec
from samescore.runtime.manifest import BaseSource, FileEntry, Manifest, Source


def model_card(
    manifest: Manifest, certificate: Certificate, files: Mapping[str, FileEntry], facts: Profile | None
) -> str:
    """Markdown: what the bundle is, where it comes from, how exact it is, and how to use it."""
    source = manifest.source
    notes = "".join(f"\n- {note}" for note in source.notes)
    reference, contract = certificate.reference, manifest.contract
    environment = certificate.environment
    variants = "\n".join(
        f"| `{v.name}` | {v.target} | {v.precision} | {megabytes(files, v.name)} | {v.recipe['linear']} linear layers, "
        f"{v.recipe['embedding']} embedding; smoothing {v.recipe['smoothing']}; {v.recipe['graph']} |"
        for v in manifest.variants
    )
    cut = {
        "middle": f"the middle of a longer text is replaced by `{contract.ellipsis}`",
        "right": "a longer text is cut at the end",
        "article": "a longer article is cut at its end, the prompt around it never",
    }[contract.truncation]
    reads, example = _READS[contract.kind]
    provider = _measured_on(manifest)
    verdict = "passed" if all(p.verdict.passed for p in certificate.variants.values()) else "FAILED"
    licence = facts.licence if facts else "see the source"
    return f"""# {manifest.profile or source.name}, a samescore bundle

{manifest.architecture}, exported by samescore {manifest.samescore_version} from {origin_of(source)}
(checkpoint digest `{source.sha256}`).{_on_base(source, notes)}

It reads {reads}; {contract.max_tokens} tokens, {cut}. It says: {", ".join(manifest.labels)} ({manifest.activation}).
{_label_tokens(manifest, certificate)}
| variant | for | precision | size | recipe |
|---|---|---|---|---|
{variants}

## How exact

Every variant was held against PyTorch {reference.torch} (transformers {reference.transformers}, {reference.dtype}) on the
same token ids of the {next(iter(certificate.variants.values())).drift.texts} texts of its golden set (`golden.jsonl.gz`; of a
large set the first whole, the others by digest). The gate {verdict}.

```
{parity_table(certificate.variants)}
```

{TABLE_LEGEND} Every number, interval and flip is in `parity.json`. Measured with ONNX Runtime
{environment["onnxruntime"]} on {environment["cpu"]} ({provider}), {environment["threads"]} threads. Check it on your own
box, without PyTorch: `samescore verify BUNDLE`.
{_recalibrations(manifest, certificate)}
## Use

```python
from samescore import load
classifier = load("BUNDLE")
print({example})
```
{_fields(manifest)}

## Licence and limits

Licence of the source: {licence}. Its own card, with its intended use and its limits, is in `SOURCE_CARD.md` where the source
had one. Parity says that this bundle scores as the source does; it does not say that the source is right.
"""


# What a contract reads, and a call that shows it.
_READS = {
    "conversation": (
        "a conversation: `<|user|>…<|assistant|>…`, or a list of `{role, content}`",
        'classifier("<|user|>…<|assistant|>…")',
    ),
    "prompt-response": (
        "a prompt and a response (`{prompt, response}`)",
        'classifier.score("prompt", ["response", "another response"])',
    ),
    "instruction": ("an article (`text`), which it puts into a prompt", 'classifier("…")'),
    "text": ("a text", 'classifier("…")'),
}


def _label_tokens(manifest: Manifest, certificate: Certificate) -> str:
    """How a language model's labels are read, with its prompt; nothing for a trained head."""
    if not manifest.label_tokens:
        return ""
    tokens = ", ".join(f"`{token.text}` (id {token.id})" for token in manifest.label_tokens)
    reference, contract = certificate.reference, manifest.contract
    mass = (
        f"Over the golden texts PyTorch gives these tokens {reference.label_mass_mean:.4f} of the probability of the whole "
        f"vocabulary (mean; least {reference.label_mass_min:.4f}): near 1, the model answers with a label."
        if reference.label_mass_mean is not None
        else "What the whole vocabulary's softmax gives to these tokens was not measured."
    )
    warned = mass_warning(reference.label_mass_mean, manifest.labels)
    warning = f" **Warning:** {warned}." if warned else ""
    prompt = f"\n\nThe prompt:\n\n```\n{contract.template}\n```" if contract.kind == "instruction" else ""
    return (
        f"\nIt is a language model read as a classifier: the logits are those of the next token after the text, of {tokens}; "
        f"the probabilities are their softmax. {mass}{warning}{prompt}\n"
    )


def _recalibrations(manifest: Manifest, certificate: Certificate) -> str:
    """Which variants' logits are corrected and how that was fitted; nothing where none is."""
    lines = [
        f"- `{v.name}`: {v.recalibration.summary}. Golden texts without it: max Δp {before.max_abs_dp:.1e}, p99 "
        f"{before.p99_abs_dp:.1e}, mean {before.mean_abs_dp:.1e}."
        for v in manifest.variants
        if v.recalibration and (before := certificate.variants[v.name].before)
    ]
    if not lines:
        return ""
    return (
        '\nProbabilities are computed from corrected logits (`.logits` stays raw; `load("BUNDLE", raw=True)` and '
        "`classify --raw` leave the\ncorrection out). The table is measured after the correction:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _measured_on(manifest: Manifest) -> str:
    """The providers that the gate ran the variants on."""
    targets = {variant.name: variant_spec(variant.name).certified_on for variant in manifest.variants}
    elsewhere = [f"{name} on {target}" for name, target in targets.items() if target != "cpu"]
    return "; ".join(["CPU provider"] * (len(elsewhere) < len(targets)) + elsewhere)


def _fields(manifest: Manifest) -> str:
    """What a prediction holds beyond label, probabilities and logits."""
    if manifest.activation != "softmax":
        return ""
    values = "" if manifest.values is None else f", values {', '.join(f'{value:g}' for value in manifest.values)}"
    expected = f"; `.expected_value` is the mean label (sum p · value{values})" if values else ""
    return f"\n`.entropy` is that of the probabilities in nats (0: sure){expected}.\n"


def origin_of(source: Source | BaseSource) -> str:
    """A source in words."""
    revision = f" at commit `{source.revision}`" if source.revision else ""
    return f"{source.kind} `{source.name}`{revision}"


def _on_base(source: Source, notes: str) -> str:
    if source.base is None:
        return ""
    return f" It is a LoRA adapter on the base\n{origin_of(source.base)} (digest `{source.base.sha256}`), folded in.\n{notes}"


def megabytes(files: Mapping[str, FileEntry], variant: str) -> str:
    """What a variant's files hold together."""
    size = sum(entry.size for name, entry in files.items() if name.startswith(f"{variant}/"))
    return f"{size / 1e6:.1f} MB"
