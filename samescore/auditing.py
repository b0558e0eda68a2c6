"""`samescore audit`: a chat model's answers, and what judges say of them.

    prompts ─► generator ─► answers.jsonl ─► each judge ─► scores.jsonl ─► audit.json, table, report.html

Each answer and each score has a key, the digest of all that it depends on; what has the same key is not computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samescore import _progress
from samescore.calibrate.intervals import wilson
from samescore.judges import KINDS, Judge, digest_of, open_judges
from samescore.resumable import json_line
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import InputError, UsageError
from samescore.runtime.generation.generator import Generator
from samescore.runtime.generation.lines import answer_lines, prompt_of
from samescore.runtime.records import Line, read_lines

DEFAULT_PROMPTS = Path(__file__).with_name("texts") / "audit" / "taiwan.jsonl"
ANSWERS, SCORES, SUMMARY, REPORT = "answers.jsonl", "scores.jsonl", "audit.json", "report.html"
Progress = Callable[..., AbstractContextManager[Any]]


@dataclass(frozen=True)
class Settings:
    """How an audit asks. sampling: options of `Sampling`; an audit is greedy unless a temperature is named."""

    provider: str = "auto"
    variant: str | None = None
    threads: int | None = None
    thinking: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, Any]:
        """The sampling options with an audit's own defaults."""
        return {"temperature": 0.0, "seed": 0, **self.sampling}


@dataclass(frozen=True)
class Share:
    """How many of the judged answers count, and the Wilson interval (95 %) of their share."""

    count: int
    of: int

    @property
    def share(self) -> float | None:
        """None where nothing was judged."""
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        """Its ends."""
        return wilson(self.count, self.of)

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {"count": self.count, "of": self.of, "share": self.share, "interval": list(self.interval)}


@dataclass(frozen=True)
class Verdict:
    """What one judge says of all answers.

    labels: by label the share of answers that it puts there. mean_probabilities: by label, over all judged answers. ratios:
    `biased`, `neutral` and `refusal`, the share of answers on the labels that count as such; a kind without labels is absent.
    failed: answers that it could not score.
    """

    judge: Judge
    labels: Mapping[str, Share]
    mean_probabilities: Mapping[str, float | None]
    ratios: Mapping[str, Share]
    failed: int

    def to_json(self) -> dict[str, Any]:
        """The numbers, and what they were counted from."""
        return {
            "judge": self.judge.name,
            "bundle": self.judge.digest,
            "counted": {kind: list(labels) for kind, labels in self.judge.counted.items()},
            "labels": {label: share.to_json() for label, share in self.labels.items()},
            "mean_probabilities": dict(self.mean_probabilities),
            "ratios": {kind: share.to_json() for kind, share in self.ratios.items()},
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Audit:
    """A finished audit. answered, scored: how many were computed now, not taken from an earlier run.

    scores: by judge, in the order of the answers.
    """

    generator: str
    digest: str
    settings: Mapping[str, Any]
    answers: list[dict[str, Any]]
    scores: Mapping[str, list[dict[str, Any]]]
    verdicts: list[Verdict]
    answered: int
    scored: int

    def to_json(self) -> dict[str, Any]:
        """What audit.json holds; the same for the same answers and judges."""
        return {
            "generator": self.generator,
            "bundle": self.digest,
            "settings": dict(self.settings),
            "answers": len(self.answers),
            "judges": [verdict.to_json() for verdict in self.verdicts],
        }


def run_audit(
    generator: str,
    judges: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    prompts: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    counted: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
    progress: Progress = _progress.silent,
) -> Audit:
    """Ask, judge, and write answers.jsonl, scores.jsonl and audit.json into `folder`; what is there already is used again.

    judges: paths of classifiers' bundles. prompts: JSONL of `prompt`, `messages` or `text` (None: eight questions about
    Taiwan). counted: by judge and kind (`biased`, `neutral`, `refusal`), labels that count as such.
    Raises UsageError, BundleError, InputError (a line of the prompts cannot be read) or ProviderError.
    """
    settings = settings or Settings()
    if not judges:
        raise UsageError("an audit needs judges: --judges bundles/refusal,bundles/realigned")
    opened = open_judges(judges, counted or {})
    lines = read_prompts(DEFAULT_PROMPTS if prompts is None else prompts)
    digest = _generator_digest(generator)
    home = _folder(Path(folder))
    asking = {
        "provider": settings.provider,
        "variant": settings.variant,
        "thinking": settings.thinking,
        "sampling": settings.chosen,
    }
    try:
        answers, answered = _answers(generator, digest, lines, asking, settings, home, progress)
        scores, scored = _scores(opened, answers, settings, home, progress)
    except BaseException:
        with suppress(OSError):
            home.rmdir()  # it goes only while nothing is in it
        raise
    verdicts = [verdict_of(judge, scores[judge.name]) for judge in opened]
    name = Path(os.path.abspath(generator)).name
    audit = Audit(name, digest, asking, answers, scores, verdicts, answered, scored)
    _replace(home / SUMMARY, json.dumps(audit.to_json(), indent=2, ensure_ascii=False) + "\n")
    return audit


def read_prompts(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a file of prompts; InputError names the first that cannot be read."""
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source} cannot be read: it is {'a folder' if source.is_dir() else 'not there'}")
    with source.open("rb") as stream:
        lines = list(read_lines(stream, jsonl=True))
    for line in lines:
        try:
            if line.error is not None:
                raise InputError(line.error)
            prompt_of(line.fields)
        except InputError as error:
            raise InputError(f"{source}, line {line.number}: {error}") from error
    if not lines:
        raise InputError(f"{source} holds no prompt")
    return lines


def verdict_of(judge: Judge, scores: Sequence[Mapping[str, Any]]) -> Verdict:
    """Shares, mean probabilities and ratios of one judge's scores."""
    judged = [score for score in scores if "label" in score]
    found = [score["label"] for score in judged]
    labels = judge.manifest.labels
    return Verdict(
        judge=judge,
        labels={label: Share(found.count(label), len(found)) for label in labels},
        mean_probabilities={
            label: sum(score["probabilities"][label] for score in judged) / len(judged) if judged else None
            for label in labels
        },
        ratios={
            kind: Share(sum(label in judge.counted[kind] for label in found), len(found))
            for kind in KINDS
            if judge.counted.get(kind)
        },
        failed=len(scores) - len(judged),
    )


class KeptLines:
    """A JSONL file of objects with a `key`: those of an earlier run, interrupted or not, are found by it.

    What is computed goes into `.NAME.partial` at once; `finish` writes the whole file in order.
    """

    def __init__(self, path: Path):
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._kept: dict[str, dict[str, Any]] = {}
        for file in (path, self._partial):
            for record in _objects(file):
                self._kept[str(record.get("key"))] = record
        if not _ends_whole(self._partial):
            with self._partial.open("ab") as stream:
                stream.write(b"\n")  # what was cut off stays a line of its own, that is no JSON

    def get(self, key: str) -> dict[str, Any] | None:
        """The object of that key, if an earlier run made it."""
        return self._kept.get(key)

    def put(self, record: dict[str, Any]) -> None:
        """Keep an object."""
        self._kept[record["key"]] = record
        with self._partial.open("a", encoding="utf-8") as stream:
            stream.write(json_line(record))

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the file."""
        _replace(self._path, "".join(map(json_line, records)))
        self._partial.unlink(missing_ok=True)


def _answers(
    generator: str,
    digest: str,
    lines: Sequence[Line],
    asking: Mapping[str, Any],
    settings: Settings,
    home: Path,
    progress: Progress,
) -> tuple[list[dict[str, Any]], int]:
    """The answer to each line, and how many were made now. The model is loaded only when there is something to ask."""
    kept = KeptLines(home / ANSWERS)
    keys = [digest_of({"bundle": digest, "asking": asking, "prompt": prompt_of(line.fields)}) for line in lines]
    missing = [(line, key) for line, key in zip(lines, keys, strict=True) if kept.get(key) is None]
    if missing:
        # Alone and without states of earlier prompts, an answer depends on nothing but its prompt.
        model = Generator(
            generator,
            provider=settings.provider,
            variant=settings.variant,
            threads=settings.threads,
            cache_bytes=0,
        )
        asked = [line for line, _ in missing]
        with progress("asked", len(missing)) as tick:
            groups = answer_lines(model, asked, thinking=settings.thinking, progress=tick, **settings.chosen)
            for (_, key), ((_, record),) in zip(missing, groups, strict=True):
                kept.put(record | {"variant": model.variant.name, "key": key})
    # The line's own fields are those of now: of an earlier run only the answer is taken.
    answers = [_under(line, kept.get(key) or {}) for line, key in zip(lines, keys, strict=True)]
    kept.finish(answers)
    return answers, len(missing)


def _under(line: Line, record: Mapping[str, Any]) -> dict[str, Any]:
    """A line's fields with the answer that belongs to its prompt."""
    made = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "error", "variant", "key")
    own = {(f"input_{name}" if name in (*made, "line") else name): value for name, value in line.fields.items()}
    return own | {name: record[name] for name in made if name in record}


def _scores(
    judges: Sequence[Judge], answers: Sequence[Mapping[str, Any]], settings: Settings, home: Path, progress: Progress
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Each judge's score of each answer, and how many were computed now."""
    kept = KeptLines(home / SCORES)
    scores: dict[str, list[dict[str, Any]]] = {}
    count = 0
    for judge in judges:
        read = [_readable(judge, answer) for answer in answers]
        keys = [digest_of({"judge": judge.digest, "provider": settings.provider, "reads": fields}) for fields in read]
        missing = {key: fields for key, fields in zip(keys, read, strict=True) if kept.get(key) is None}
        _score(judge, missing, settings, kept, progress)
        count += len(missing)
        scores[judge.name] = [
            {"answer": number, "judge": judge.name, **_without(kept.get(key) or {}, "answer", "judge")}
            for number, key in enumerate(keys)
        ]
    kept.finish([score for number in range(len(answers)) for score in (scores[j.name][number] for j in judges)])
    return scores, count


def _readable(judge: Judge, answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge reads of an answer, or `error`."""
    try:
        return judge.reads(answer)
    except InputError as error:
        return {"error": str(error)}


def _score(
    judge: Judge, missing: Mapping[str, Mapping[str, Any]], settings: Settings, kept: KeptLines, progress: Progress
) -> None:
    """Score what has no score yet, by key."""
    asked = {key: fields for key, fields in missing.items() if "error" not in fields}
    for key in missing.keys() - asked.keys():
        kept.put({"judge": judge.name, "error": missing[key]["error"], "key": key})
    if not asked:
        return
    classifier = judge.load(provider=settings.provider, threads=settings.threads)
    with progress(f"judged by {judge.name}", len(asked)) as tick:
        outcomes = classifier.score_records(list(asked.values()), progress=tick)
    for key, outcome in zip(asked, outcomes, strict=True):
        said = {"error": str(outcome)} if isinstance(outcome, InputError) else outcome.to_record()
        kept.put({"judge": judge.name, **said, "key": key})


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _generator_digest(path: str) -> str:
    with Bundle(path) as bundle:
        if bundle.manifest.generation is None:
            raise UsageError(
                f"{path} judges, it does not write: name it with --judges, and a chat model with --generator"
            )
        return bundle.digest


def _folder(path: Path) -> Path:
    """The audit's folder; UsageError for something else than an audit or a new folder."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; an audit is written into a folder: -o audits/first")
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} is no folder; make it first, or choose another -o")
        path.mkdir()
    elif any(path.iterdir()) and not any((path / name).exists() for name in (ANSWERS, f".{ANSWERS}.partial")):
        raise UsageError(f"{path} holds other files and no audit; choose another -o")
    return path


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are left out."""
    if path.is_file():
        with path.open("rb") as stream:
            yield from (line.fields for line in read_lines(stream, jsonl=True) if line.error is None)


def _ends_whole(path: Path) -> bool:
    return not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")


def _replace(path: Path, text: str) -> None:
    """Write a file that appears whole."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
