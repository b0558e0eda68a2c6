"""Text contracts: how what a caller hands in becomes the one string that a profile's tokenizer sees.

A contract is data (it is stored in the manifest) plus the pure functions below. Nothing here touches a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from samescore.runtime.errors import InputError, UsageError

ROLES = ("system", "user", "assistant")
ROLE_TOKEN = re.compile(r"<\|(?:system|user|assistant)\|>")


@dataclass(frozen=True)
class TextContract:
    """How text reaches the model.

    kind: `conversation` takes a role-token string (`<|user|>…<|assistant|>…`) or a list of `{role, content}` messages;
      `prompt-response` takes a prompt and a response and puts them into `template` (`{prompt}` and then `{response}`,
      once each), or the string that this makes; `instruction` takes an article, strips it and puts it into `template`
      (`{text}`, once); `text` takes a string as it is.
    max_tokens: the limit, special tokens included. model_limit: how far a caller may raise it; None: not at all.
    truncation: `middle` replaces the middle of a long text by `ellipsis`; `right` keeps the first tokens, as
      `truncation=True` of a Hugging Face tokenizer does; `article` keeps the template whole and the article's first
      tokens.
    """

    kind: Literal["conversation", "prompt-response", "instruction", "text"]
    max_tokens: int
    truncation: Literal["middle", "right", "article"]
    ellipsis: str
    template: str = ""
    model_limit: int | None = None

    @property
    def fields(self) -> tuple[tuple[str, ...], ...]:
        """The JSON fields that an input line may hold its text in, as alternatives."""
        if self.kind == "conversation":
            return (("text",), ("messages",))
        return (("text",), ("prompt", "response")) if self.kind == "prompt-response" else (("text",),)

    def with_max_tokens(self, max_tokens: int | None) -> TextContract:
        """The same with another limit (None: its own); UsageError beyond what the model can read."""
        if max_tokens is None:
            return self
        most = self.model_limit or self.max_tokens
        if not 1 <= max_tokens <= most:
            raise UsageError(f"max_tokens must be from 1 to {most} for this model, got {max_tokens}")
        return replace(self, max_tokens=max_tokens)


def text_of_record(record: Mapping[str, Any], contract: TextContract, *, allow_role_tokens: bool = False) -> str:
    """What `render` makes of one JSON object; InputError when it holds no text, two, or an empty one."""
    given = {name for names in contract.fields for name in names if record.get(name) is not None}
    chosen = next((names for names in contract.fields if given == set(names)), None)
    if chosen is None:
        wanted = " or ".join(" and ".join(f"`{name}`" for name in names) for names in contract.fields)
        found = ", ".join(map(str, record)) or "nothing"
        raise InputError(f"a line needs exactly one of {wanted}; this one has: {found}")
    item = record[chosen[0]] if len(chosen) == 1 else {name: record[name] for name in chosen}
    return render(item, contract, allow_role_tokens=allow_role_tokens)


def render(item: Any, contract: TextContract, *, allow_role_tokens: bool = False) -> str:
    """The contract's string for a text, a list of messages (conversation) or `{prompt, response}` (prompt-response).

    For an `instruction` it is the stripped article alone: where it is cut is counted in tokens, so the encoder fills the
    template (`around_article`).
    """
    if isinstance(item, str):
        text = item.strip() if contract.kind == "instruction" else item
    elif contract.kind == "conversation" and isinstance(item, Sequence) and not isinstance(item, bytes):
        text = render_messages(item, allow_role_tokens=allow_role_tokens)
    elif contract.kind == "prompt-response" and isinstance(item, Mapping):
        text = render_response(item.get("prompt"), item.get("response"), contract)
    else:
        raise InputError(f"expected {_EXPECTED[contract.kind]}, got {type(item).__name__}")
    if not text.strip():
        raise InputError("the text is empty")
    return without_surrogates(text)


_EXPECTED = {
    "conversation": "a string or a list of {role, content}",
    "prompt-response": "a string or an object {prompt, response}",
    "instruction": "a string",
    "text": "a string",
}


def render_response(prompt: Any, response: Any, contract: TextContract) -> str:
    """The contract's template with a prompt and a response; an empty prompt is allowed, an empty response is not."""
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str):
            raise InputError(f"`{name}` must be a string, got {type(value).__name__}")
    if not response.strip():
        raise InputError("the response is empty")
    before, _, rest = contract.template.partition("{prompt}")
    between, _, after = rest.partition("{response}")
    return f"{before}{prompt}{between}{response}{after}"


def around_article(contract: TextContract) -> tuple[str, str]:
    """What an instruction's template says before the article and after it."""
    before, _, after = contract.template.partition("{text}")
    return before, after


def template_error(contract: TextContract) -> str | None:
    """What is wrong with the contract's template, or None: one place for each thing that is put into it, in order."""
    wanted = {"prompt-response": ("{prompt}", "{response}"), "instruction": ("{text}",)}.get(contract.kind, ())
    template = contract.template
    places = [template.find(place) for place in wanted]
    if all(template.count(place) == 1 for place in wanted) and places == sorted(places):
        return None
    return f"{template!r} does not hold {' and then '.join(wanted)}, once{' each' if len(wanted) > 1 else ''}"


def render_messages(messages: Sequence[Any], *, allow_role_tokens: bool = False) -> str:
    """`<|role|>content` for each message, with nothing between them.

    A role token inside a message's content would open a turn that nobody spoke, so `<|user|>` there becomes `< |user|>`
    unless `allow_role_tokens` is set.
    """
    if not messages:
        raise InputError("the conversation is empty: `messages` needs at least one {role, content}")
    parts = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise InputError(f"message {number} is not an object with a string `role` and a string `content`")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"message {number} has role {role!r}; roles are {', '.join(ROLES)}")
        content = message["content"]
        parts.append(f"<|{role}|>" + (content if allow_role_tokens else escape_role_tokens(content)))
    if not any(message["content"].strip() for message in messages):
        raise InputError("the conversation is empty: every message's content is blank")
    return "".join(parts)


def escape_role_tokens(text: str) -> str:
    """`text` with each role token broken by a space, so that it reads the same and opens no turn."""
    return ROLE_TOKEN.sub(lambda match: "< " + match.group()[1:], text)


def without_surrogates(text: str) -> str:
    """Refuse lone surrogates (JSON's "\\ud800"): no UTF-8 text holds them and tokenizers cannot read them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds a lone surrogate at character {error.start}; it is not valid Unicode"
        ) from None
    return text


def join_around_middle(text: str, head_end: int, tail_start: int, contract: TextContract) -> str:
    """`text[:head_end] + ellipsis + text[tail_start:]`, never cutting a role token in two.

    Where the cut swallows the role token of the turn that the tail belongs to, the token is put back after the
    ellipsis: a tail without its speaker would read as the words of whoever spoke before the cut.
    """
    if contract.kind != "conversation":
        return text[:head_end] + contract.ellipsis + text[tail_start:]
    speaker = ""
    for match in ROLE_TOKEN.finditer(text):
        if match.start() < head_end < match.end():
            head_end = match.start()
        if match.start() < tail_start < match.end():
            tail_start = match.start()
        if head_end <= match.start() < tail_start:
            speaker = match.group()
        if match.start() == tail_start:
            speaker = ""
    return text[:head_end] + contract.ellipsis + speaker + text[tail_start:]
