"""`samescore chat`: talk to a bundle in a terminal, or feed it lines."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from samescore.commands.asking import add_model, add_sampling, sampling_of, thinking_of
from samescore.commands.output import EXIT_INPUT, EXIT_OK
from samescore.runtime.errors import GenerationError, InputError

if TYPE_CHECKING:
    from samescore.runtime.generation.generator import Generator

HELP = "/reset forgets the chat, /exit or Ctrl-D ends, Ctrl-C stops an answer"
COMMANDS = ("/reset", "/exit", "/help")


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser("chat", help="talk to a bundle that writes, in this terminal")
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument("--system", metavar="TEXT", help="a system message that the chat begins with")
    add_sampling(command)
    add_model(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.runtime.generation.generator import Generator

    generator = Generator(
        arguments.bundle, provider=arguments.provider, variant=arguments.variant, threads=arguments.threads
    )
    chat = Chat(generator, arguments.system, thinking_of(arguments), sampling_of(arguments))
    chat.check()
    terminal = sys.stdin.isatty()
    _tolerate_bytes()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and has a history)
        print(HELP, file=sys.stderr)
    failed = False
    for line in _typed(Interrupts(chat.cancel)) if terminal else sys.stdin:
        text = line.strip()
        if not text:
            continue
        if text == "/exit":
            break
        if line.startswith("/"):
            _obey(text, chat)
            continue
        try:
            chat.ask(text)
        except (InputError, GenerationError) as error:
            print(f"samescore: {error}", file=sys.stderr)
            failed = True
    return EXIT_INPUT if failed and not terminal else EXIT_OK


class Chat:
    """The messages so far, and the next answer on stdout as it comes."""

    def __init__(self, generator: Generator, system: str | None, thinking: bool | None, sampling: dict[str, Any]):
        self.generator, self.thinking, self.sampling = generator, thinking, sampling
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._begin]
        self.cancel = threading.Event()

    def check(self) -> None:
        """UsageError or InputError now, for what would fail at every message."""
        self._stream([*self._begin, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [*self._begin]

    def ask(self, text: str) -> None:
        """Print the answer to a message. One that was stopped stays in the chat as far as it came; one that failed does not."""
        self.cancel.clear()
        asked = [*self.messages, {"role": "user", "content": text}]
        answer, reason = "", None
        try:
            for piece in self._stream(asked):
                answer, reason = answer + piece.text, piece.finish_reason
                sys.stdout.write(_shown(piece.text))
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if reason == "length":
            print("samescore: the answer was cut (--max-tokens, or the context is full: /reset)", file=sys.stderr)
        if reason == "cancelled":
            print("samescore: stopped", file=sys.stderr)
        if answer:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[Any]:
        return self.generator.stream(messages, thinking=self.thinking, cancel=self.cancel, **self.sampling)


def _obey(text: str, chat: Chat) -> None:
    if text == "/reset":
        chat.reset()
        print("samescore: the chat begins anew", file=sys.stderr)
    elif text == "/help":
        print(HELP, file=sys.stderr)
    else:
        known = ", ".join(COMMANDS)
        print(
            f"samescore: no command {text!r}; there are {known}. A space before it makes it a message", file=sys.stderr
        )


class Interrupts:
    """What Ctrl-C means in a terminal: it stops an answer, or drops the line that is being typed; it never ends the program."""

    def __init__(self, cancel: threading.Event):
        self._cancel, self.typing = cancel, False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle SIGINT."""
        if self.typing:
            self.typing = False
            raise KeyboardInterrupt
        # Looked at between two tokens: a session is never left in the middle of a run.
        self._cancel.set()


def _typed(interrupts: Interrupts) -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        while True:
            try:
                interrupts.typing = True
                line = input("> ")
                interrupts.typing = False
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return
            yield line
    finally:
        signal.signal(signal.SIGINT, before)


def _shown(text: str) -> str:
    """On a terminal, control characters of an answer are shown and not obeyed."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else f"⟨U+{ord(c):04X}⟩" for c in text)


def _tolerate_bytes() -> None:
    """Bytes that are no UTF-8 become U+FFFD instead of an end of the program."""
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
