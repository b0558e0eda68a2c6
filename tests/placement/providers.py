"""Which nodes a GPU provider would take, asked of the provider itself, without its GPU.

The published wheels hold the provider's own partitioning code. It runs when every vendor library that the provider is
linked against exists, even an empty one: each imported symbol becomes a function that returns 0 (or what a caller needs
to go on). Sessions can be made and their node assignment read; nothing can be run.

MIGraphX checks operators and attributes in the provider; shape errors inside its own parser are not seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

SYSTEM_LIBRARY = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-x86-64|libonnxruntime.*)\.so"
)
PRELUDE = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nstatic size_t nothing[8];\n"

# Functions whose results the providers look at before they partition a graph; `{}` is cuda or hip.
RUNTIME = {
    "{}GetDeviceCount": "int NAME(int *out) {{ *out = 1; return 0; }}",
    "{}GetDevice": "int NAME(int *out) {{ *out = 0; return 0; }}",
    "{}RuntimeGetVersion": "int NAME(int *out) {{ *out = 13000; return 0; }}",
    "{}DriverGetVersion": "int NAME(int *out) {{ *out = 13000; return 0; }}",
    "{}DeviceGetAttribute": "int NAME(int *out) {{ *out = 9; return 0; }}",
    "{}MemGetInfo": "int NAME(size_t *a, size_t *b) {{ *a = *b = (size_t)1 << 36; return 0; }}",
    "{}GetErrorString": 'const char *NAME(int e) {{ return "stub"; }}',
    "{}GetErrorName": 'const char *NAME(int e) {{ return "stub"; }}',
}
PREFIXES = {
    "GetDeviceProperties": 'int NAME(char *p, int d) { memset(p, 0, 700); strcpy(p, "stub"); return 0; }',
    "StreamCreate": "int NAME(void **out) { *out = (void *)16; return 0; }",
    "EventCreate": "int NAME(void **out) { *out = (void *)16; return 0; }",
    "HostAlloc": "int NAME(void **out, size_t size) { *out = malloc(size); return 0; }",
    "Malloc": "int NAME(void **out, size_t size) { *out = malloc(size); return 0; }",
}
MIGRAPHX_OBJECTS = re.compile(
    r"migraphx_(\w*_create\w*|parse_onnx_buffer|load|program_get_(parameter|output)_shapes|program_run_async|shapes_get"
    r"|program_parameter_shapes_get|arguments_get|argument_shape)"
)
# Compiled programs by the name of their file, which is all that tells them apart: it is printed.
PROGRAM_FILES = {
    "migraphx_save": r"""int migraphx_save(void *program, const char *path, void *options) {
        fprintf(stderr, "migraphx_save %s\n", path); fclose(fopen(path, "w")); return 0; }""",
    "migraphx_load": r"""int migraphx_load(void **out, const char *path, void *options) {
        fprintf(stderr, "migraphx_load %s\n", path); *out = calloc(1, 512); return 0; }""",
}
ASSIGNMENT = """
import json, sys
from collections import Counter
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
if sys.argv[3] == "plain":
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
session = ort.InferenceSession(sys.argv[1], options, providers=[sys.argv[2]])
subgraphs, nodes = Counter(), {}
for part in session.get_provider_graph_assignment_info():
    subgraphs[part.ep_name] += 1
    nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
print(json.dumps({"first": session.get_providers()[0], "subgraphs": subgraphs, "nodes": nodes}))
"""


class Provider:
    """One ONNX Runtime wheel with stand-ins for its vendor's libraries, below `folder`."""

    def __init__(self, wheel: Path, folder: Path):
        self.package, self.stubs = folder / "package", folder / "stubs"
        if not self.stubs.is_dir():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.package)
            partial = folder / "stubs.partial"
            partial.mkdir(exist_ok=True)
            build_stubs(self.package / "onnxruntime" / "capi", partial)
            partial.rename(self.stubs)

    def assign(self, model: Path, provider: str, *, plain: bool) -> dict[str, dict[str, dict[str, int]]]:
        """`subgraphs` and `nodes` (operator counts) by provider, as ONNX Runtime would place them.

        plain: without ONNX Runtime's own optimisations, as the runtime opens files for MIGraphX.
        """
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.stubs), "PYTHONPATH": str(self.package)}
        command = [sys.executable, "-c", ASSIGNMENT, str(model), provider, "plain" if plain else "optimised"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        if result["first"] != provider:
            raise AssertionError(f"{provider} did not load: {done.stderr[-2000:]}")
        return result


def build_stubs(capi: Path, out: Path) -> None:
    """A shared library for each vendor library that the providers in `capi` import from."""
    symbols: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for library in capi.glob("libonnxruntime_providers_*.so"):
        if "shared" not in library.name:
            _imports(library, symbols)
    defined: set[tuple[str, str]] = set()
    for name, versions in symbols.items():
        source, versioned = [PRELUDE], []
        for version, kinds in versions.items():
            for symbol, kind in sorted(kinds.items()):
                if (name, symbol) not in defined:
                    defined.add((name, symbol))
                    source.append(f"char {symbol}[4096];" if kind == "OBJECT" else stand_in(symbol))
            if version:
                versioned.append(f"{version} {{ global: {' '.join(f'{s};' for s in sorted(kinds))} }};")
        (out / f"{name}.c").write_text("\n".join(source))
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        if versioned:
            (out / f"{name}.map").write_text("\n".join(versioned))
            command.append(f"-Wl,--version-script={out / name}.map")
        subprocess.run([*command, "-o", str(out / name), str(out / f"{name}.c")], check=True)


def stand_in(symbol: str) -> str:
    """C source of one function."""
    for vendor in ("cuda", "hip"):
        rest = symbol.removeprefix(vendor)
        if rest != symbol:
            for pattern, body in RUNTIME.items():
                if pattern.format(vendor) == symbol:
                    return body.replace("{{", "{").replace("}}", "}").replace("NAME", symbol)
            for prefix, body in PREFIXES.items():
                if rest.startswith(prefix) and not rest.startswith("MallocManaged"):
                    return body.replace("NAME", symbol)
    if symbol in PROGRAM_FILES:
        return PROGRAM_FILES[symbol]
    if symbol in ("migraphx_shape_lengths", "migraphx_shape_strides"):
        return f"int {symbol}(const size_t **out, size_t *count) {{ *out = nothing; *count = 0; return 0; }}"
    if symbol.startswith("migraphx_") and symbol.endswith("_size"):
        return f"int {symbol}(size_t *out) {{ *out = 0; return 0; }}"
    if MIGRAPHX_OBJECTS.fullmatch(symbol):
        return f"int {symbol}(void **out) {{ *out = calloc(1, 512); return 0; }}"
    return f"long {symbol}(void) {{ return 0; }}"


def _imports(library: Path, symbols: dict[str, dict[str, dict[str, str]]]) -> None:
    """Add `symbols[vendor library][version][symbol] = kind` of what a provider imports."""
    needed = re.findall(r"NEEDED.*\[(.*?)\]", _readelf("-dW", library))
    vendor = [name for name in needed if not SYSTEM_LIBRARY.match(name)]
    for name in vendor:
        symbols[name][""] = symbols[name][""]
    origin, current = {}, ""
    for line in _readelf("-VW", library).splitlines():
        if file := re.search(r"Version: 1\s+File: (\S+)", line):
            current = file.group(1)
        if version := re.search(r"Name: (\S+)\s+Flags", line):
            origin[version.group(1)] = current
    for line in _readelf("--dyn-syms", "-W", library).splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[6] != "UND":
            continue
        kind, binding, (symbol, _, version) = fields[3], fields[4], fields[7].partition("@")
        version = version.lstrip("@")
        if version:
            if (name := origin.get(version, "")) in vendor:
                symbols[name][version][symbol] = kind
        elif binding != "WEAK" and vendor and symbol != "Provider_GetHost" and not symbol.startswith("_Z"):
            tensorrt = [name for name in vendor if "nvinfer" in name]
            wanted = tensorrt if tensorrt and re.match(r"createNv|createInfer|getInfer|getPlugin", symbol) else vendor
            symbols[wanted[0]][""][symbol] = kind


def _readelf(*arguments: str | Path) -> str:
    return subprocess.run(["readelf", *map(str, arguments)], check=True, capture_output=True, text=True).stdout
