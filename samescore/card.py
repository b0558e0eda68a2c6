"""The bundle's README.md: a model card a person can read."""

from __future__ import annotations

from collections.abc import Mapping

from samescore.calibrate.certificate import TABLE_LEGEND, Certificate, parity_table
from samescore.export.profiles import Profile
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
        f"| `{v.name}` | {v.target} | {v.precision} | {_megabytes(files, v.name)} | {v.recipe['linear']} linear layers, "
        f"{v.recipe['embedding']} embedding; smoothing {v.recipe['smoothing']}; {v.recipe['graph']} |"
        for v in manifest.variants
    )
    cut = (
        f"the middle of a longer text is replaced by `{contract.ellipsis}`"
        if contract.truncation == "middle"
        else "a longer text is cut at the end"
    )
    reads, example = _READS[contract.kind]
    verdict = "passed" if all(p.verdict.passed for p in certificate.variants.values()) else "FAILED"
    licence = facts.licence if facts else "see the source"
    return f"""# {manifest.profile or source.name}, a samescore bundle

{manifest.architecture}, exported by samescore {manifest.samescore_version} from {_origin(source)}
(checkpoint digest `{source.sha256}`).{_on_base(source, notes)}

It reads {reads}; {contract.max_tokens} tokens, {cut}. It says: {", ".join(manifest.labels)} ({manifest.activation}).

| variant | for | precision | size | recipe |
|---|---|---|---|---|
{variants}

## How exact

Every variant was held against PyTorch {reference.torch} (transformers {reference.transformers}, {reference.dtype}) on the
same token ids of the {next(iter(certificate.variants.values())).drift.texts} texts in `golden.jsonl`. The gate {verdict}.

```
{parity_table(certificate.variants)}
```

{TABLE_LEGEND} Every number, interval and flip is in `parity.json`. Measured with ONNX Runtime
{environment["onnxruntime"]} on {environment["cpu"]} (CPU provider), {environment["threads"]} threads. Check it on your own
box, without PyTorch: `samescore verify BUNDLE`.

## Use

```python
from samescore import load
classifier = load("BUNDLE")
print({example})
```

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
    "text": ("a text", 'classifier("…")'),
}


def _origin(source: Source | BaseSource) -> str:
    revision = f" at commit `{source.revision}`" if source.revision else ""
    return f"{source.kind} `{source.name}`{revision}"


def _on_base(source: Source, notes: str) -> str:
    if source.base is None:
        return ""
    return f" It is a LoRA adapter on the base\n{_origin(source.base)} (digest `{source.base.sha256}`), folded in.\n{notes}"


def _megabytes(files: Mapping[str, FileEntry], variant: str) -> str:
    size = sum(entry.size for name, entry in files.items() if name.startswith(f"{variant}/"))
    return f"{size / 1e6:.1f} MB"
