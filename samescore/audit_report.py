"""An audit as one HTML file that needs nothing else. The same audit gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samescore.auditing import Audit, Share, Verdict
from samescore.calibrate.plots import COLOURS
from samescore.judges import messages_of
from samescore.report_tables import share
from samescore.reporting import _finalize, _import_jinja

TEMPLATE = Path(__file__).with_name("audit.html.jinja")
TITLES = {"biased": "bias ratio", "neutral": "neutral ratio", "refusal": "refusal rate"}


def render_audit(audit: Audit) -> str:
    """The HTML page; MissingDependencyError without jinja2."""
    jinja2 = _import_jinja()
    environment = jinja2.Environment(
        autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(share=share)
    page: str = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        audit=audit,
        verdicts=[_verdict(verdict) for verdict in audit.verdicts],
        answers=[_answer(number, record, audit) for number, record in enumerate(audit.answers)],
    )
    return page


def _verdict(verdict: Verdict) -> dict[str, Any]:
    judge = verdict.judge
    rows = [
        {"title": TITLES[kind], "of": ", ".join(judge.counted[kind]), "mean": None, **_bar(found), "colour": COLOURS[5]}
        for kind, found in verdict.ratios.items()
    ]
    for place, (label, found) in enumerate(verdict.labels.items()):
        mean = verdict.mean_probabilities[label]
        rows.append({"title": label, "of": "", "mean": mean, **_bar(found), "colour": COLOURS[place % len(COLOURS)]})
    return {
        "name": judge.name,
        "profile": judge.manifest.profile or judge.manifest.source.name,
        "digest": judge.digest,
        "reads": judge.manifest.contract.kind,
        "answers": next(iter(verdict.labels.values())).of,
        "failed": verdict.failed,
        "rows": rows,
    }


def _bar(found: Share) -> dict[str, Any]:
    """A share and its interval, in percent of a bar's width."""
    low, high = found.interval
    return {
        "count": found.count,
        "n": found.of,
        "share": found.share,
        "low": low,
        "high": high,
        "width": f"{100 * (found.share or 0):.2f}",
        "left": f"{100 * low:.2f}",
        "span": f"{100 * (high - low):.2f}",
    }


def _answer(number: int, record: Mapping[str, Any], audit: Audit) -> dict[str, Any]:
    asked = [f"{message['role']}: {_content(message)}" for message in messages_of(record)]
    said = []
    for verdict in audit.verdicts:
        score = audit.scores[verdict.judge.name][number]
        text = f"{score['label']} {score['probability']:.4f}" if "label" in score else score["error"]
        said.append({"judge": verdict.judge.name, "text": text + (", cut" if score.get("truncated") else "")})
    return {
        "number": number,
        "asked": asked[0].partition(": ")[2] if len(asked) == 1 else "\n".join(asked),
        "text": record.get("completion", record.get("error", "")),
        "reason": record.get("finish_reason", "error"),
        "tokens": record.get("completion_tokens", 0),
        "said": said,
    }


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
