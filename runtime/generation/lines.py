"""Files of prompts: lines in, answers out, one object per line, in order; bad lines are reported.

Lines are taken in groups of `batch` from the file's beginning. What else stands in its group may decide, by rounding, between
two tokens that are nearly as probable; so a run that begins again at a group's border answers as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from samescore.runtime.errors import GenerationError, InputError
from samescore.runtime.generation.answer import Completion
from samescore.runtime.generation.generator import Generator
from samescore.runtime.records import Line

PROMPT_FIELDS = ("prompt", "messages", "text")
OUTPUT_FIELDS = frozenset(
    {"completion", "finish_reason", "prompt_tokens", "completion_tokens", "logprobs", "error", "line"}
)


def prompt_of(fields: Mapping[str, Any]) -> str | list[Mapping[str, Any]]:
    """What a line asks: a raw text (`text`), or a chat (`messages`, or `prompt` as its one user message).

    InputError when it holds none of them or several, or one of the wrong type.
    """
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        found = ", ".join(fields) or "nothing"
        raise InputError(f"a line needs exactly one of `prompt`, `messages` or `text`; this one has: {found}")
    value = fields[given[0]]
    if given[0] == "messages":
        if not isinstance(value, list):
            raise InputError(f"`messages` must be a list of {{role, content}}, got {type(value).__name__}")
        return value
    if not isinstance(value, str):
        raise InputError(f"`{given[0]}` must be a string, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"`{given[0]}` is empty")
    return value if given[0] == "text" else [{"role": "user", "content": value}]


def answer_lines(
    generator: Generator,
    lines: Iterable[Line],
    *,
    batch: int = 1,
    thinking: bool | None = None,
    progress: Callable[[], None] | None = None,
    **sampling: Any,
) -> Iterator[list[tuple[Line, dict[str, Any]]]]:
    """Each group of `batch` lines with its output objects: a line's own fields plus the answer's, or `error` and `line`.

    A field of the input that has the name of an output field is kept as `input_<name>`. UsageError when the bundle cannot do
    what is asked of every line: no chat template, no thinking switch, a sampling option out of its range.
    """
    generator.sampling(**sampling)
    iterator = iter(lines)
    while group := list(islice(iterator, batch)):
        asked: dict[int, Any] = {}
        outcomes: dict[int, Completion | Exception] = {}
        for place, line in enumerate(group):
            try:
                asked[place] = _checked(generator, line, thinking, sampling)
            except InputError as error:
                outcomes[place] = error
        outcomes |= _answers(generator, asked, thinking, sampling)
        if progress is not None:
            for _ in group:
                progress()
        yield [(line, output_record(line, outcomes[place])) for place, line in enumerate(group)]


def output_record(line: Line, outcome: Completion | Exception) -> dict[str, Any]:
    """The output object of one line."""
    record = {(f"input_{key}" if key in OUTPUT_FIELDS else key): value for key, value in line.fields.items()}
    if not isinstance(outcome, Completion):
        return record | {"error": str(outcome), "line": line.number}
    record |= {
        "completion": outcome.text,
        "finish_reason": outcome.finish_reason,
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
    }
    if outcome.logprobs is not None:
        record["logprobs"] = [
            {"token_id": token.token_id, "logprob": token.logprob, "top": [list(pair) for pair in token.top]}
            for token in outcome.logprobs
        ]
    return record


def _checked(generator: Generator, line: Line, thinking: bool | None, sampling: Mapping[str, Any]) -> Any:
    """The line's prompt, if it can be read and leaves room for an answer."""
    if line.error is not None:
        raise InputError(line.error)
    prompt = prompt_of(line.fields)
    # A stream checks its prompt at once, and reads it only when it is asked for its first piece.
    generator.stream(prompt, thinking=thinking if isinstance(prompt, list) else None, **sampling)
    return prompt


def _answers(
    generator: Generator, asked: Mapping[int, Any], thinking: bool | None, sampling: Mapping[str, Any]
) -> dict[int, Completion | Exception]:
    """The answers to checked prompts by their places: texts together and chats together."""
    outcomes: dict[int, Completion | Exception] = {}
    for places in (
        [place for place, prompt in asked.items() if isinstance(prompt, str)],
        [place for place, prompt in asked.items() if not isinstance(prompt, str)],
    ):
        prompts = [asked[place] for place in places]
        try:
            outcomes |= zip(places, _together(generator, prompts, thinking, sampling), strict=True)
        except GenerationError:
            # One of them has no numbers: alone, the others have theirs.
            for place, prompt in zip(places, prompts, strict=True):
                try:
                    (outcomes[place],) = _together(generator, [prompt], thinking, sampling)
                except GenerationError as error:
                    outcomes[place] = error
    return outcomes


def _together(
    generator: Generator, prompts: Sequence[Any], thinking: bool | None, sampling: Mapping[str, Any]
) -> list[Completion]:
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return generator.generate(list(prompts), batch=len(prompts), **sampling)
    answers: list[Completion] = generator.chat(list(prompts), thinking=thinking, batch=len(prompts), **sampling)
    return answers
