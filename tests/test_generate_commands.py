"""`samescore chat` and `samescore generate` as a user runs them."""

import contextlib
import dataclasses
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from samescore import export_generator
from samescore.cli import main
from samescore.runtime import doctor
from samescore.runtime.doctor import examine
from samescore.runtime.doctor_findings import diagnose
from samescore.runtime.generation.generator import Generator
from samescore.runtime.machine import memory

pytestmark = pytest.mark.torch
TEMPLATE = (
    "{%- for m in messages %}{{ '<|begin|>' + m.role + ': ' + m.content }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|begin|>assistant: ' }}{% endif %}"
)
QUESTIONS = ["the model refuses", "bread and salt", "我不能帮助你", "je ne peux pas", "numbers 0 1 2", "morgen früh"]


@pytest.fixture(scope="session")
def chat_bundle(language_model, tmp_path_factory):
    """A bundle of the tiny language model, float32, with a chat template that has no thinking switch."""
    folder = shutil.copytree(language_model, tmp_path_factory.mktemp("chat") / "checkpoint")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    output = tmp_path_factory.mktemp("bundle") / "chat"
    export_generator(folder, output, variants=["cpu-fp32"], max_tokens=2048)
    return output


@pytest.fixture
def prompts(tmp_path):
    """Six prompts of the three kinds, and lines that cannot be answered."""
    lines = [{"id": n, "prompt": question} for n, question in enumerate(QUESTIONS)]
    lines[1] = {"id": 1, "text": QUESTIONS[1], "error": "mine"}
    lines[2] = {"id": 2, "messages": [{"role": "user", "content": QUESTIONS[2]}]}
    lines.insert(3, {"id": "both", "prompt": "a", "text": "b"})
    file = tmp_path / "prompts.jsonl"
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + '\n\nnot json\n{"prompt": "\\ud800"}\n'
    file.write_text(text + json.dumps({"id": "long", "text": "bread " * 3000}) + "\n")
    return file


def objects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(bundle, prompts, output, *more):
    return [
        "generate",
        str(bundle),
        "-i",
        str(prompts),
        "-o",
        str(output),
        "--max-tokens",
        "12",
        "--threads",
        "1",
        *more,
    ]


def test_answers_have_the_fields_of_their_lines(chat_bundle, prompts, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    assert main(command(chat_bundle, prompts, output, "--batch", "3", "--logprobs", "2")) == 3
    answers = objects(output)
    assert [answer.get("id") for answer in answers] == [0, 1, 2, "both", 3, 4, 5, None, None, "long"]
    good = [answer for answer in answers if "completion" in answer]
    assert len(good) == 6 and all(answer["finish_reason"] in ("stop", "length") for answer in good)
    assert answers[1]["input_error"] == "mine"
    generator = Generator(chat_bundle, threads=1, cache_bytes=0)
    expected = generator.chat([{"role": "user", "content": QUESTIONS[0]}], max_tokens=12, logprobs=2)
    raw = generator.generate(QUESTIONS[1], max_tokens=12)
    assert answers[0]["completion"] == expected.text and answers[0]["prompt_tokens"] == expected.prompt_tokens
    assert answers[1]["completion"] == raw.text and answers[1]["completion_tokens"] == raw.completion_tokens
    tokens = answers[0]["logprobs"]
    assert [token["token_id"] for token in tokens] == list(expected.token_ids)
    assert tokens[0]["logprob"] == pytest.approx(expected.logprobs[0].logprob, abs=1e-4) and len(tokens[0]["top"]) == 2
    errors = {answer["line"]: answer["error"] for answer in answers if "completion" not in answer}
    assert "exactly one of" in errors[4] and "not JSON" in errors[9] and "surrogate" in errors[10]
    assert "context of 2048" in errors[11]
    said = capsys.readouterr().err
    assert "4 lines could not be answered" in said and "line 9: not JSON" in said
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--top-p", "0.9", "--seed", "7"]])
def test_an_interrupted_run_goes_on_to_the_same_bytes(chat_bundle, prompts, tmp_path, monkeypatch, capsys, sampling):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    more = ["--batch", "2", "--logprobs", "1", *sampling]
    assert main(command(chat_bundle, prompts, whole, *more)) == 3
    chat, calls = Generator.chat, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chat(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "chat", interrupted)
        assert main(command(chat_bundle, prompts, parts, *more)) == 130
    partial = tmp_path / "parts.jsonl.partial"
    kept = len(partial.read_text().splitlines()) - 1
    assert kept == 4 and not parts.exists()
    with partial.open("ab") as stream:
        stream.write(b'{"id": 5, "half a li')
    capsys.readouterr()
    assert main(command(chat_bundle, prompts, parts, *more)) == 3
    said = capsys.readouterr().err
    assert f"going on after {kept} lines" in said and "4 lines could not be answered" in said
    assert parts.read_bytes() == whole.read_bytes() and not partial.exists()


def test_other_settings_do_not_go_on(chat_bundle, prompts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "answers.jsonl"
    chat, calls = Generator.chat, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return chat(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "chat", interrupted)
        assert main(command(chat_bundle, prompts, output, "--batch", "1")) == 130
    assert main(command(chat_bundle, prompts, output, "--batch", "1", "--seed", "3")) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert main(command(chat_bundle, prompts, output, "--batch", "1", "--seed", "3", "--fresh")) == 3
    assert "going on" not in capsys.readouterr().err and len(objects(output)) == 10


def test_a_terminated_process_can_be_resumed(chat_bundle, tmp_path):
    prompts, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"bread {n}"}) + "\n" for n in range(40)))
    more = ["--batch", "1", "--max-tokens", "200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "samescore", *command(chat_bundle, prompts, output, *more)], stderr=subprocess.PIPE
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and len(partial.read_bytes().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not output.exists()
    begun = len(partial.read_bytes().splitlines()) - 1
    assert 2 <= begun < 40
    assert main(command(chat_bundle, prompts, output, *more)) == 0
    assert main(command(chat_bundle, prompts, whole, *more)) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--thinking", "on"], 2, "no thinking switch"),
        (["--temperature", "-1"], 2, "temperature must be"),
        (["--batch", "0"], 2, "--batch must be at least 1"),
        (["-i", "nowhere.jsonl"], 3, "nowhere.jsonl cannot be read"),
        (["-o", "no/folder/out.jsonl"], 2, "is no folder"),
    ],
)
def test_wrong_use_of_generate(chat_bundle, prompts, tmp_path, capsys, more, code, said):
    assert main(command(chat_bundle, prompts, tmp_path / "out.jsonl", *more)) == code
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_classifiers_do_not_generate(bert_bundle, prompts, tmp_path, capsys):
    assert main(command(bert_bundle, prompts, tmp_path / "out.jsonl")) == 2
    assert "does not generate" in capsys.readouterr().err


def test_lines_that_are_no_terminal(chat_bundle):
    result = subprocess.run(
        [sys.executable, "-m", "samescore", "chat", str(chat_bundle), "--max-tokens", "8", "--system", "bread"],
        input="the model\n/reset\n/nothing\n\nthe model\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "the chat begins anew" in result.stderr and "no command '/nothing'" in result.stderr
    messages = [{"role": "system", "content": "bread"}, {"role": "user", "content": "the model"}]
    answer = Generator(chat_bundle).chat(messages, max_tokens=8).text
    assert result.stdout == f"{answer}\n{answer}\n"  # the same question after a reset has the same answer


# The command line with at least 20 ms per token, so that there is an answer to stop.
SLOWLY = """
import sys, time
from samescore.cli import main
from samescore.runtime import doctor
from samescore.runtime.doctor import examine
from samescore.runtime.doctor_findings import diagnose
from samescore.runtime.generation.engine import Engine
step = Engine.step
Engine.step = lambda *arguments: (time.sleep(0.02), step(*arguments))[1]
sys.exit(main())
"""


class Terminal:
    """A real process on a pseudo-terminal."""

    def __init__(self, *arguments):
        pid, self.master = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", SLOWLY, *arguments])
        self.pid, self.seen, self.at = pid, "", 0

    def until(self, text, seconds=60):
        """Read until the text has come, behind what the last call waited for."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self.at :]:
            assert time.monotonic() < deadline, f"waited for {text!r}, saw {self.seen!r}"
            self.more()
        self.at = self.seen.index(text, self.at) + len(text)

    def more(self):
        """Read what has come, if anything has."""
        if select.select([self.master], [], [], 0.2)[0]:
            self.seen += os.read(self.master, 4096).decode("utf-8", "replace")

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        """The exit code."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.master, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("it did not end")


def test_ctrl_c_stops_the_answer_and_not_the_program(chat_bundle):
    generator = Generator(chat_bundle, threads=1)
    asked = [(question, [{"role": "user", "content": question}]) for question in QUESTIONS]
    question = next(q for q, chat in asked if generator.chat(chat, max_tokens=300).finish_reason == "length")
    terminal = Terminal("chat", str(chat_bundle), "--max-tokens", "1900", "--threads", "1")
    terminal.until("> ")
    terminal.type("bread\x03")  # Ctrl-C at the prompt drops the line
    terminal.until("> ")
    terminal.type(question + "\r")
    terminal.until("\r\n")  # its own echo; the answer streams from here
    begun = len(terminal.seen)
    while len(terminal.seen) < begun + 10:
        terminal.more()
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.type("/reset\r")
    terminal.until("begins anew")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_the_doctor_opens_it(chat_bundle):
    facts = examine(chat_bundle)
    bundle = facts.bundle
    assert bundle.generates and bundle.chosen == ("cpu-fp32", "cpu") and bundle.rejected == {}
    assert bundle.problem is None and bundle.canary is None
    assert not [finding for finding in diagnose(facts) if finding.code]


def test_the_doctor_without_memory_names_the_right_command(chat_bundle, monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: dataclasses.replace(memory(), mem_available=1000))
    advice = [finding.advice for finding in diagnose(examine(chat_bundle))]
    assert any(line.startswith(f"samescore generate {chat_bundle} ") for line in advice)


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "BUNDLE", "BUNDLE"],
        ["report", "BUNDLE", "-o", "page.html"],
        ["calibrate", "BUNDLE", "--texts", "texts.jsonl"],
        ["warmup", "BUNDLE"],
        ["classify", "BUNDLE", "-i", "texts.jsonl"],
    ],
)
def test_what_is_for_classifiers_says_so(chat_bundle, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "bread"}) + "\n")
    before = (chat_bundle / "bundle.json").read_bytes()
    assert main([str(chat_bundle) if part == "BUNDLE" else part for part in command]) == 2
    assert "holds a model that generates text" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists() and (chat_bundle / "bundle.json").read_bytes() == before
