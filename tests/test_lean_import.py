"""Scoring needs numpy, tokenizers and ONNX Runtime: importing the package loads nothing heavier. And it ships whole."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "huggingface_hub",
    "safetensors",
    "ml_dtypes",
    "peft",
    "matplotlib",
    "jinja2",
    "sklearn",
}


@pytest.mark.parametrize(
    "module", ["samescore", "samescore.runtime", "samescore.cli", "samescore.comparing", "samescore.reporting"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "samescore" in loaded
    assert loaded & HEAVY == set()


def test_every_runtime_module_imports_without_the_heavy_packages() -> None:
    """As on a machine where they are not installed."""
    files = sorted((ROOT / "runtime").rglob("*.py"))
    modules = ["samescore." + ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    code = (
        f"import importlib, sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)})); "
        f"[importlib.import_module(name.removesuffix('.__init__')) for name in {modules}]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert len(modules) > 1
    assert done.returncode == 0, done.stderr


def test_the_packages_are_the_folders_that_hold_modules() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folder_of = settings["package-dir"]
    assert set(settings["packages"]) == set(folder_of)
    tops = {folder.partition("/")[0] for folder in folder_of.values()}
    found = {file.parent.relative_to(ROOT).as_posix() for top in tops for file in (ROOT / top).rglob("*.py")}
    assert found == set(folder_of.values())
    for name, folder in folder_of.items():
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} is no package"
        expected = folder.replace("/", ".")
        assert name == (expected if folder.startswith("samescore") else f"samescore.{expected}")


# The room, and the rooms that it may import.
ARROWS = {
    "runtime": {"runtime"},
    "export": {"export", "runtime"},
    "calibrate": {"calibrate", "export", "runtime"},
}


@pytest.mark.parametrize("room", ARROWS)
def test_imports_between_rooms_go_one_way(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name.partition(".")[0] == "samescore":
                    assert [*name.split("."), ""][1] in ARROWS[room], f"{path.relative_to(ROOT)} imports {name}"
