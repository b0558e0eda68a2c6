"""What several benchmarks share: processes that answer JSON lines, peers' environments, models made once, names asked for."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS, VENVS = HERE / "peers", HERE.parent / ".cache" / "venvs"


class Worker:
    """A contender's process: `script` with `arguments`. RuntimeError when it does not answer or answers with an error."""

    def __init__(self, python: Path, script: Path, arguments: list[str], environment: dict[str, str], log: Path):
        started = time.perf_counter()
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )
        self.startup = self._reply()
        self.startup["start_s"] = time.perf_counter() - started

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing reply says so, with the end of the log
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"the process ended with {code}: {last_line(self.log)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def cpu_seconds(self) -> float:
        """CPU time used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process: it stops when its stdin ends."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()


class Workshop:
    """Models in a work folder, each made by a command once for each key."""

    def __init__(self, work: Path):
        self.work = work
        self.built: dict[str, dict[str, Any]] = {}
        work.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, key: str, command: list[str]) -> Path:
        """The model's folder, where `command … --output FOLDER` makes it unless it is there with the same key."""
        folder, stamp = self.work / name, self.work / name / "built.json"
        if stamp.is_file() and (found := json.loads(stamp.read_text()))["key"] == key:
            self.built[name] = found["cost"]
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        say(f"making {name}")
        log = self.work / f"{name}.log"
        with log.open("w") as errors:
            done = subprocess.run([*command, "--output", str(folder)], stdout=subprocess.PIPE, stderr=errors, text=True)
        if done.returncode:
            raise RuntimeError(f"making {name} ended with {done.returncode}: {last_line(log)}")
        self.built[name] = json.loads(done.stdout.splitlines()[-1])
        stamp.write_text(json.dumps({"key": key, "cost": self.built[name]}))
        return folder


def checkpoint_key(checkpoint: Path, calibration: list[list[int]], more: Sequence[Any] = ()) -> str:
    """What models made of a checkpoint depend on: its files' sizes and times, the calibration's ids, and more."""
    files = [*sorted(checkpoint.glob("*.safetensors")), checkpoint / "config.json"]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([stamps, calibration, *more]).encode()).hexdigest()


def peer_python(name: str) -> Path:
    """The interpreter of a peer's own environment, which is made when it is missing or its requirements changed."""
    requirements = PEERS / f"{name}.txt"
    python, stamp = VENVS / name / "bin" / "python", VENVS / name / "requirements.txt"
    wanted = requirements.read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        say(f"installing benchmarks/peers/{name}.txt into an environment of its own")
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(VENVS / name)],
            [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)],
        ):
            environment = {**os.environ, "PEERS": str(PEERS)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"no environment for {name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        stamp.write_text(wanted)
    return python


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument's type: some of these names, comma-separated."""

    def parsed(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return found

    return parsed


def last_line(log: Path) -> str:
    """How a process ended, as far as it says."""
    return (log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"])[0][:300]


def say(message: str) -> None:
    """Progress, for people."""
    print(message, file=sys.stderr, flush=True)
