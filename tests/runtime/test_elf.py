"""The dynamic section of real shared libraries."""

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from samescore.runtime.elf import read_shared_library
from samescore.runtime.errors import BundleError

CAPI = Path(onnxruntime.__file__).parent / "capi"


def library(path, *options):
    """A library without code, linked as the options say."""
    command = ["gcc", "-shared", "-nostdlib", "-Wl,--no-as-needed", f"-Wl,-soname,{path.name}", "-o", str(path)]
    subprocess.run([*command, "-x", "c", "/dev/null", "-x", "none", *map(str, options)], check=True)
    return path


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_same_libraries_as_readelf_says():
    libraries = sorted(CAPI.glob("*.so*"))
    assert libraries
    for path in libraries:
        said = subprocess.run(["readelf", "-dW", path], check=True, capture_output=True, text=True).stdout
        needed = [line.partition("[")[2].rstrip("]") for line in said.splitlines() if "(NEEDED)" in line]
        assert list(read_shared_library(path).needed) == needed


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_needed_and_search_path(tmp_path):
    other = library(tmp_path / "libdoesnotexist.so.9")
    path = library(tmp_path / "libx.so", other, "-Wl,-rpath,$ORIGIN/../lib:/opt/vendor/lib")
    found = read_shared_library(path)
    assert found.needed == ("libdoesnotexist.so.9",)
    assert found.search == (f"{tmp_path}/../lib", "/opt/vendor/lib")
    assert read_shared_library(other).needed == ()


def test_no_library(tmp_path):
    path = tmp_path / "x.so"
    for content in (b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(90)):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="no 64-bit"):
            read_shared_library(path)
    path.write_bytes((CAPI / "libonnxruntime_providers_shared.so").read_bytes()[:200])
    with pytest.raises(BundleError, match="damaged ELF"):
        read_shared_library(path)
