"""mypy --strict over the installed layout: `python tests/types.py`.

mypy does not follow setuptools' package-dir, so the rooms are linked into a temporary `samescore/` as a wheel would have them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "export", "calibrate")


def main() -> int:
    """The exit code of mypy."""
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "samescore"
        package.mkdir()
        for file in [*(ROOT / "samescore").glob("*.py"), ROOT / "samescore" / "py.typed"]:
            (package / file.name).symlink_to(file)
        (package / "commands").symlink_to(ROOT / "samescore" / "commands")
        for room in ROOMS:
            (package / room).symlink_to(ROOT / room)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "samescore"]
        environment = {**os.environ, "MYPYPATH": temporary}
        return subprocess.run(command, cwd=temporary, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
