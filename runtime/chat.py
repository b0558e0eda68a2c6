"""Chats to token ids: the checkpoint's own template in a sandbox, and no way from a message's content to a control token.

    messages ─► what would become a control token inside them is marked ─► template ─► text ─► split at marks ─► token ids

The template's own control tokens stay whole; those that somebody wrote are split after their first character, and each part
is tokenized as the plain text that it is. Content without control tokens is tokenized in one string with the template, as
transformers does, so its ids are the same, merges across borders included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from samescore.runtime.contract import without_surrogates
from samescore.runtime.errors import BundleError, InputError, MissingDependencyError, UsageError

ROLES = ("system", "developer", "user", "assistant", "tool")
# A Unicode noncharacter: no text for interchange holds it, so it is dropped from contents.
MARK = "\U0010ffff"

Message = Mapping[str, Any]
Ids = npt.NDArray[np.int64]


class PromptEncoder:
    """A tokenizer that reads prompts. Thread-safe. BundleError when tokenizer.json cannot be read."""

    def __init__(self, tokenizer_json: bytes):
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read by the tokenizers library: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # Characters that a tokenizer does not know become these; they control nothing.
        unknown = {self.tokenizer.token_to_id("<unk>"), self.tokenizer.token_to_id("[UNK]")}
        added = self.tokenizer.get_added_tokens_decoder()
        self._added = frozenset(added) - unknown
        self._special = frozenset(number for number, token in added.items() if token.special) - unknown
        self._newline = self._plain("\n")

    def text(self, text: str, *, special_tokens: bool = False) -> Ids:
        """Ids int64 [sequence] of a text, with what the tokenizer puts around every text (BOS).

        special_tokens: read control tokens inside the text as such; by default they are text like any other. InputError
        when it is not Unicode.
        """
        without_surrogates(text)
        parts = self.split(text if special_tokens else self.mark(text))
        if not self.tokenizer.num_special_tokens_to_add(False):
            return np.array(parts, np.int64)
        around = list(self.tokenizer.encode("a", add_special_tokens=True).ids)
        inner = self._plain("a")
        start = next(i for i in range(len(around)) if around[i : i + len(inner)] == inner)
        return np.array(around[:start] + parts + around[start + len(inner) :], np.int64)

    def mark(self, text: str, *, special_only: bool = False) -> str:
        """The text with a mark inside everything that the tokenizer would turn into a control token.

        special_only: leave those added tokens alone that are not special, such as `<think>`.
        """
        text = text.replace(MARK, "")
        tokens = self._special if special_only else self._added
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in tokens]
        for start, end in reversed(spans):
            if end - start < 2:
                raise InputError(f"character {start} of the text is a control token: {text[start:end]!r}")
            text = f"{text[: start + 1]}{MARK}{text[start + 1 :]}"
        return text

    def split(self, marked: str) -> list[int]:
        """Ids of a text whose marks keep what is left of them apart from what is right of them."""
        first, *rest = marked.split(MARK)
        ids = self._plain(first)
        for part in filter(None, rest):
            # Behind a newline, a tokenizer puts no space in front, as it may at the beginning of a text.
            behind = self._plain("\n" + part)
            size = len(self._newline)
            ids += behind[size:] if behind[:size] == self._newline else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


class ChatTemplate:
    """A checkpoint's chat template, rendered as transformers' `apply_chat_template` does.

    tokens: the strings that templates know as `bos_token`, `eos_token` and so on. BundleError when it is no template,
    MissingDependencyError without jinja2.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        self._jinja = _import_jinja()
        self._tokens = dict(tokens)
        try:
            environment = _environment(self._jinja)
            self._template = environment.from_string(source)
            self.variables = frozenset(self._jinja.meta.find_undeclared_variables(environment.parse(source)))
        except self._jinja.TemplateError as error:
            raise BundleError(f"the bundle's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Message], *, answer: bool = True, **variables: Any) -> str:
        """The text of messages; `answer`: up to where the model's answer begins. InputError when the template refuses."""
        try:
            return str(
                self._template.render(
                    **{**self._tokens, "tools": None, "documents": None, **variables},
                    messages=messages,
                    add_generation_prompt=answer,
                )
            )
        except self._jinja.TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"the chat template cannot render these messages: {error!r}") from error


class ChatEncoder:
    """Messages to ids with one template and one tokenizer."""

    def __init__(self, encoder: PromptEncoder, template: ChatTemplate):
        self.encoder, self.template = encoder, template

    def encode(
        self, messages: Sequence[Message], *, thinking: bool | None = None, variables: Mapping[str, Any] | None = None
    ) -> tuple[Ids, int]:
        """Ids int64 [sequence] of a chat up to its answer, and how many of them the next turn's chat will share.

        thinking: the template's `enable_thinking`, None leaves the choice to it. variables: more of its variables
        (`tools`, …). InputError for messages of the wrong shape, UsageError for a switch that the template does not have.
        """
        given = dict(variables or {})
        if thinking is not None:
            if "enable_thinking" not in self.template.variables:
                raise UsageError(
                    "this bundle's chat template has no thinking switch (`enable_thinking`): leave thinking out"
                )
            given["enable_thinking"] = thinking
        marked = [self._marked_message(message) for message in check_messages(messages)]
        given = {name: self._marked(value, special_only=False) for name, value in given.items()}
        ids = self.encoder.split(self.template.render(marked, answer=True, **given))
        history = self.encoder.split(self.template.render(marked, answer=False, **given))
        shared = next(
            (n for n, (a, b) in enumerate(zip(ids, history, strict=False)) if a != b), min(len(ids), len(history))
        )
        return np.array(ids, np.int64), shared

    def _marked_message(self, message: Message) -> dict[str, Any]:
        # A model's own answer comes back with its tags (`<think>`, `<tool_call>`), which templates look for.
        special_only = message["role"] == "assistant"
        return {name: self._marked(value, special_only=special_only) for name, value in message.items()}

    def _marked(self, value: Any, *, special_only: bool) -> Any:
        """Strings marked, containers rebuilt: a template is given plain data only, nothing with methods of its own."""
        if isinstance(value, str):
            return self.encoder.mark(without_surrogates(str(value)), special_only=special_only)
        if isinstance(value, Mapping):
            pairs = [(self._marked(str(key), special_only=False), item) for key, item in value.items()]
            return {key: self._marked(item, special_only=special_only) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self._marked(item, special_only=special_only) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"messages and template variables are JSON values; this is a {type(value).__name__}")


def check_messages(messages: Any) -> list[Message]:
    """The messages, if they are a non-empty list of `{role, content}`; InputError names the first that is not."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"expected a list of {{role, content}}, got {type(messages).__name__}")
    if not messages:
        raise InputError("the chat is empty: `messages` needs at least one {role, content}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} is not an object with a string `role` and a string `content`")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise InputError(f"message {number} has role {role!r}; roles are {', '.join(ROLES)}")
        calls_only = role == "assistant" and content is None and message.get("tool_calls")
        if not (isinstance(content, str) or _is_text_parts(content) or calls_only):
            raise InputError(
                f"message {number} has no text: `content` must be a string or a list of {{'type': 'text', 'text': …}}"
            )
    return list(messages)


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _import_jinja() -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.meta
        import jinja2.sandbox
    except ImportError as error:
        raise MissingDependencyError("chat templates need jinja2: pip install 'samescore[chat]'") from error
    return jinja2


def _environment(jinja: Any) -> Any:
    """The sandbox that transformers renders templates in: the same filters, globals, tags and white space."""

    class Generation(jinja.ext.Extension):  # type: ignore[misc]
        """`{% generation %}…{% endgeneration %}` marks answers for training; here it is its content."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            """The statements between the tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja.TemplateError(message)

    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which prompts do not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
