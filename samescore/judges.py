"""Judges: classifiers' bundles that score a chat model's answers, each in the way that its text contract wants.

conversation     the chat and the answer as messages
prompt-response  the last user message, and the answer
text, instruction  the answer alone
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samescore.runtime.bundle import Bundle
from samescore.runtime.classifier import Classifier
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import InputError, UsageError, did_you_mean
from samescore.runtime.manifest import Manifest

KINDS = ("biased", "neutral", "refusal")
# What a profile's labels count as in an audit; docs/audit.md says why. A label that is in no list counts as none of these.
LABELS_OF: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "realigned": {"biased": ("China-biased",)},
    "news-bias": {"biased": ("Left", "Right"), "neutral": ("Center",)},
    "political-leaning": {"biased": ("0", "1", "3", "4"), "neutral": ("2",)},
    "refusal": {"refusal": ("Refusal",)},
    "refusal-tiny": {"refusal": ("Refusal",)},
}
END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Judge:
    """A judge before it is loaded. counted: by kind (`biased`, `neutral`, `refusal`) the labels that count as such.

    name: the folder's name. digest: of its manifest, which holds the digests of all its files.
    """

    name: str
    path: str
    digest: str
    manifest: Manifest
    counted: Mapping[str, tuple[str, ...]]

    def load(self, *, provider: str = "auto", threads: int | None = None) -> Classifier:
        """The classifier."""
        return Classifier(self.path, provider=provider, threads=threads)

    def reads(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that this judge scores of an answer's record; InputError when there is no answer to judge."""
        if "error" in record:
            raise InputError(f"the model gave no answer: {record['error']}")
        answer = answer_of(str(record["completion"]))
        if not answer:
            raise InputError("the answer is empty")
        return judged_fields(messages_of(record), answer, self.manifest.contract)


def open_judges(paths: Sequence[str], counted: Mapping[str, Mapping[str, tuple[str, ...]]]) -> list[Judge]:
    """The judges of these bundles. counted: by judge and kind, labels that replace the profile's defaults.

    BundleError for a damaged bundle, UsageError for one that writes, two of one name, or a judge or label that is not there.
    """
    judges = [_open(path, counted) for path in paths]
    names = [judge.name for judge in judges]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two judges are called {name!r}: give their folders different names")
    for name in counted:
        if name not in names:
            raise UsageError(f"no judge is called {name!r}; there are: {', '.join(names)}.{did_you_mean(name, names)}")
    return judges


def _open(path: str, counted: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Judge:
    name = Path(os.path.abspath(path)).name
    with Bundle(path) as bundle:
        manifest, digest = bundle.manifest, bundle.digest
    if manifest.generation is not None:
        raise UsageError(f"{path} writes, it does not judge: name it with --generator, and classifiers with --judges")
    asked = counted.get(name, {})
    for kind, labels in asked.items():
        for label in labels:
            if label not in manifest.labels:
                there = ", ".join(manifest.labels)
                raise UsageError(
                    f"--{kind}: {name} has no label {label!r}; it has: {there}.{did_you_mean(label, manifest.labels)}"
                )
    defaults = LABELS_OF.get(manifest.profile or "", {})
    # A checkpoint that was exported with a profile's contract may call its labels otherwise.
    usable = {kind: labels for kind, labels in defaults.items() if set(labels) <= set(manifest.labels)}
    return Judge(name, path, digest, manifest, {**usable, **asked})


def judged_fields(messages: Sequence[Mapping[str, Any]], answer: str, contract: TextContract) -> dict[str, Any]:
    """An answer and the chat before it, as the fields that a contract reads."""
    if contract.kind == "conversation":
        chat = [{"role": m["role"], "content": _text(m.get("content"))} for m in messages]
        return {"messages": [*chat, {"role": "assistant", "content": answer}]}
    if contract.kind == "prompt-response":
        asked = [_text(m.get("content")) for m in messages if m["role"] == "user"]
        return {"prompt": asked[-1] if asked else "", "response": answer}
    return {"text": answer}


def messages_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The chat that a prompt's line asks; a raw text counts as a user's message."""
    if record.get("messages") is not None:
        return list(record["messages"])
    return [{"role": "user", "content": record.get("prompt") or record.get("text")}]


def answer_of(completion: str) -> str:
    """What is judged of a completion: without the thought before `</think>`, stripped."""
    return completion.rpartition(END_OF_THOUGHT)[2].removeprefix("<think>").strip()


def digest_of(document: Any) -> str:
    """SHA-256 (hex) of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _text(content: Any) -> str:
    """A message's content as one string."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())
