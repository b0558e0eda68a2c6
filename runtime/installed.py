"""Which ONNX Runtime packages are installed, and whether the folder they share holds what their metadata promises."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from samescore.runtime.providers import installed_distributions

PLUGIN_PREFIX = "onnxruntime-ep-"


def version_of(name: str) -> str | None:
    """A distribution's version, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def onnxruntime_distributions() -> dict[str, str]:
    """Name → version of every distribution that installs the package `onnxruntime`, nightly and vendors' builds too."""
    named = dict.fromkeys((*installed_distributions(), *metadata.packages_distributions().get("onnxruntime", ())))
    return {name: version for name in named if (version := version_of(name)) and not name.startswith(PLUGIN_PREFIX)}


def plugin_distributions() -> dict[str, str]:
    """Name → version of installed execution provider plugins (`onnxruntime-ep-…`), which samescore does not use."""
    found = ((d.metadata["Name"] or "", d.version) for d in metadata.distributions())
    return {
        name: version for name, version in sorted(found) if name.lower().replace("_", "-").startswith(PLUGIN_PREFIX)
    }


def mixture(name: str, version: str, folder: Path, imported: str) -> tuple[str, ...]:
    """What contradicts that `name` (metadata `version`) alone filled `folder`, the one that was imported as `imported`.

    Compared are the sizes of the shared libraries below `capi` with the distribution's RECORD, both ways.
    """
    said = []
    if version.partition("+")[0] != imported.partition("+")[0]:
        said.append(f"metadata says {name} {version}, but the imported module is {imported}")
    recorded = {
        Path(str(file.locate())).absolute(): file.size
        for file in metadata.distribution(name).files or ()
        if ".so" in file.name and "capi" in file.parts
    }
    if not recorded:
        return tuple(said)
    present = {path.absolute(): path.stat().st_size for path in (folder / "capi").glob("*.so*") if path.is_file()}
    if not {_real(path) for path in recorded} & {_real(path) for path in present}:
        return (*said, f"{name} is installed elsewhere, but onnxruntime is imported from {folder}")
    return (*said, *_differences(name, _by_name(recorded), _by_name(present)))


def _differences(name: str, recorded: Mapping[str, int | None], present: Mapping[str, int | None]) -> list[str]:
    said = [
        f"{file} is there, but not part of {name}: another build left it" for file in present if file not in recorded
    ]
    for file, size in recorded.items():
        if file not in present:
            said.append(f"{file} of {name} is gone")
        elif size is not None and size != present[file]:
            said.append(
                f"{file} is not the one of {name} ({present[file]} bytes, not {size}): another build overwrote it"
            )
    return said


def _by_name(files: Mapping[Path, int | None]) -> dict[str, int | None]:
    return {path.name: size for path, size in sorted(files.items())}


def _real(path: Path) -> Path:
    return path.resolve()
