"""Facts about this machine that need no library: CPU limits, memory, graphics cards, environment variables.

Everything is read from files below `root` (`/`), so that tests can lay them out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
NVIDIA, AMD = "0x10de", "0x1002"
# CUDA 13 needs this driver branch (CUDA Toolkit release notes, minor version compatibility).
CUDA_DRIVER = 580
# Limits above this mean "none": cgroup v1 writes the largest page-aligned number.
_NO_LIMIT = 1 << 60

# What a variable does; those of `ALARMING` change scores or hide devices.
VARIABLES = {
    "OMP_NUM_THREADS": "read by PyTorch; ONNX Runtime has its own threads and ignores it",
    "CUDA_VISIBLE_DEVICES": "which NVIDIA GPUs this process sees",
    "NVIDIA_VISIBLE_DEVICES": "which NVIDIA GPUs the container was given",
    "HIP_VISIBLE_DEVICES": "which AMD GPUs HIP sees",
    "ROCR_VISIBLE_DEVICES": "which AMD GPUs the ROCm runtime sees",
    "HSA_OVERRIDE_GFX_VERSION": "makes ROCm take the GPU for another one",
    "LD_LIBRARY_PATH": "folders searched before the system's libraries",
    "LD_PRELOAD": "libraries loaded into every process",
    "CUDA_MODULE_LOADING": "when CUDA kernels are loaded",
    "CUDA_LAUNCH_BLOCKING": "every CUDA kernel is waited for: slow",
    "NVIDIA_TF32_OVERRIDE": "forces TF32 products on or off",
    "ORT_MIGRAPHX_MODEL_CACHE_PATH": "MIGraphX programs are kept and looked up here, whatever the session says",
    "ORT_MIGRAPHX_CACHE_PATH": "calibration tables of MIGraphX are looked up here",
    "ORT_MIGRAPHX_FP16_ENABLE": "MIGraphX rounds the whole model to float16",
    "ORT_MIGRAPHX_BF16_ENABLE": "MIGraphX rounds the whole model to bfloat16",
    "ORT_MIGRAPHX_FP8_ENABLE": "MIGraphX rounds the whole model to float8",
    "ORT_MIGRAPHX_INT8_ENABLE": "MIGraphX rounds the whole model to int8",
    "ORT_MIGRAPHX_EXHAUSTIVE_TUNE": "MIGraphX tries every kernel: compiling takes far longer",
    "MIGRAPHX_DISABLE_FP32_SOFTMAX": "softmax is computed in float16",
    "ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION": "CUDA reads padded texts with kernels that misread their masks",
    "ORT_FPA_INTB_GEMM": "other CUDA kernels for MatMulNBits",
    "SAMESCORE_CACHE": "where samescore keeps measured logits and compiled programs",
}
ALARMING = frozenset(
    {
        *(f"ORT_MIGRAPHX_{precision}_ENABLE" for precision in ("FP16", "BF16", "FP8", "INT8")),
        "ORT_MIGRAPHX_MODEL_CACHE_PATH",
        "ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION",
        "MIGRAPHX_DISABLE_FP32_SOFTMAX",
        "NVIDIA_TF32_OVERRIDE",
        "HSA_OVERRIDE_GFX_VERSION",
    }
)
_PREFIXES = ("ORT_", "MIGRAPHX_", "OMP_", "KMP_", "HIP_", "ROCR_", "HSA_")


@dataclass(frozen=True)
class Limit:
    """One number that the kernel enforces: `value` in CPUs or bytes, None for no limit; what says so, and in which folder."""

    value: float | None
    said: str
    folder: str

    def __lt__(self, other: Limit) -> bool:
        return self.value is not None and (other.value is None or self.value < other.value)


@dataclass(frozen=True)
class Memory:
    """Bytes. available: what a new program may take, the smaller of MemAvailable and what the cgroup has left.

    limit: the cgroup's, None without cgroups; cgroup_left: the limit less what is in use and cannot be dropped, None
    without a limit.
    """

    total: int
    mem_available: int
    limit: Limit | None
    cgroup_left: int | None

    @property
    def available(self) -> int:
        """The smaller of the two."""
        return self.mem_available if self.cgroup_left is None else min(self.mem_available, self.cgroup_left)


@dataclass(frozen=True)
class Graphics:
    """What the kernel knows about graphics cards.

    devices: names (or PCI ids) of NVIDIA and AMD cards. nvidia_driver, rocm: versions, None where absent. kfd: None without
    /dev/kfd, else whether this user may open it.
    """

    nvidia: tuple[str, ...]
    amd: tuple[str, ...]
    nvidia_driver: str | None
    rocm: str | None
    kfd: bool | None


def cpu_limits(root: Path = ROOT) -> Limit | None:
    """The tightest CPU quota of this process's cgroups, v2 or v1, its own and those above; None without cgroups."""
    found = []
    for folder in cgroup_folders("cpu", root):
        maximum = _read(folder / "cpu.max").split()
        quota, period = (
            maximum if len(maximum) == 2 else (_read(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        )
        name = "cgroup v2 cpu.max" if len(maximum) == 2 else "cgroup v1 cpu.cfs_quota_us / period"
        if period.isdigit() and int(period):
            value = int(quota) / int(period) if quota.isdigit() else None
            found.append(Limit(value, f"{name} = {quota} / {period}", str(folder)))
    return min(found, default=None)


def memory(root: Path = ROOT) -> Memory:
    """What is there and what is left; zeros where /proc/meminfo cannot be read."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE))
    limits, left = [], []
    for folder in cgroup_folders("memory", root):
        for name, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            value = _read(folder / name)
            said = f"cgroup {'v2' if name == 'memory.max' else 'v1'} {name} = {value}"
            if value == "max" or (value.isdigit() and int(value) >= _NO_LIMIT):
                limits.append(Limit(None, said, str(folder)))
            elif value.isdigit():
                limits.append(Limit(int(value), said, str(folder)))
                held = int(_read(folder / used) or 0) - int(_stat(folder / "memory.stat", cache) or 0)
                left.append(max(0, int(value) - max(0, held)))
    total, available = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Memory(total, available, min(limits, default=None), min(left, default=None))


def cgroup_folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of this process's cgroup for a controller (v1) and of the unified tree (v2), from its own up to the top.

    In a container the paths of /proc/self/cgroup may be the host's and not exist; the top is then the container's own.
    """
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            bases = [top, top / "unified"]
        elif controller in controllers.split(","):
            bases = [top / controller, top / controllers]
        else:
            continue
        for base in dict.fromkeys(bases):
            folder = base / path.strip("/")
            while folder != base and base in folder.parents:
                if folder.is_dir():
                    yield folder
                folder = folder.parent
            if base.is_dir():
                yield base


def graphics(root: Path = ROOT) -> Graphics:
    """Graphics cards and drivers, from /proc, /sys and /opt/rocm; nothing is loaded."""
    version = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", _read(root / "proc/driver/nvidia/version"))
    named = (_read(path) for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")))
    models = [match.group(1).strip() for text in named if (match := re.search(r"Model:\s*(.+)", text))]
    nodes = (_read(path) for path in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")))
    targets = [int(m.group(1)) for text in nodes if (m := re.search(r"gfx_target_version (\d+)", text))]
    kfd = root / "dev/kfd"
    return Graphics(
        tuple(models) or _pci(root, NVIDIA, "NVIDIA"),
        tuple(_gfx(target) for target in targets if target) or _pci(root, AMD, "AMD"),
        version.group(1) if version else None,
        _read(root / "opt/rocm/.info/version") or None,
        os.access(kfd, os.R_OK | os.W_OK) if kfd.exists() else None,
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Those variables that change what ONNX Runtime, MIGraphX, CUDA or the threads do, sorted by name."""
    return {name: value for name, value in sorted(variables.items()) if name in VARIABLES or name.startswith(_PREFIXES)}


def _gfx(target: int) -> str:
    """gfx90a for 90010: the kernel writes major, minor and stepping as two decimal digits each, the name is hexadecimal."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def _pci(root: Path, vendor: str, name: str) -> tuple[str, ...]:
    """Display controllers and accelerators (classes 03 and 12) of a vendor that no driver has named."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        kind = _read(device / "class")
        if _read(device / "vendor") == vendor and kind.startswith(("0x03", "0x12")):
            found.append(f"{name} PCI device {_read(device / 'device')} at {device.name}")
    return tuple(found)


def _stat(path: Path, name: str) -> str | None:
    match = re.search(rf"^{name} (\d+)$", _read(path), re.MULTILINE)
    return match.group(1) if match else None


def _read(path: Path) -> str:
    """The file's text without white space around it; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
