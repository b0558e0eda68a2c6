"""Facts about a machine that is laid out in a folder."""

import pytest

from samescore.runtime.machine import CUDA_DRIVER, cpu_limits, environment, graphics, memory


def lay(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "value", "said"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5, "cgroup v2 cpu.max = 150000 / 100000"),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None, "cpu.max = max / 100000"),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            3.0,
            "cgroup v1 cpu.cfs_quota_us / period = 300000 / 100000",
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            "= -1 / 100000",
        ),
        (
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                "sys/fs/cgroup/cpu.max": "max 100000",
                "sys/fs/cgroup/outer/cpu.max": "50000 100000",
                "sys/fs/cgroup/outer/inner/cpu.max": "400000 100000",
            },
            0.5,
            "50000 / 100000",
        ),
    ],
)
def test_the_tightest_quota_of_all_groups_above(tmp_path, files, value, said):
    limit = cpu_limits(lay(tmp_path, files))
    assert limit is not None
    assert limit.value == value
    assert said in limit.said


def test_the_folder_of_a_quota_is_named(tmp_path):
    lay(tmp_path, {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "100000 100000"})
    limit = cpu_limits(tmp_path)
    assert limit is not None and limit.folder == str(tmp_path / "sys/fs/cgroup/job")


def test_without_cgroups(tmp_path):
    assert cpu_limits(tmp_path) is None
    assert memory(tmp_path).limit is None


MEMINFO = "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable:  6000000 kB\n"


def test_memory_is_what_the_cgroup_leaves(tmp_path):
    """What the cgroup uses counts without the page cache that the kernel would drop."""
    files = {
        "proc/meminfo": MEMINFO,
        "sys/fs/cgroup/memory.max": "4000000000",
        "sys/fs/cgroup/memory.current": "2500000000",
        "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 500000000\n",
    }
    held = memory(lay(tmp_path, files))
    assert held.total == 8_000_000 * 1024 and held.mem_available == 6_000_000 * 1024
    assert held.cgroup_left == held.available == 2_000_000_000
    assert held.limit is not None and held.limit.said == "cgroup v2 memory.max = 4000000000"


def test_memory_in_cgroup_v1(tmp_path):
    group = "sys/fs/cgroup/memory/box"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/box\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        f"{group}/memory.limit_in_bytes": "1000000000",
        f"{group}/memory.usage_in_bytes": "300000000",
        f"{group}/memory.stat": "inactive_file 7\ntotal_inactive_file 100000000\n",
    }
    held = memory(lay(tmp_path, files))
    assert held.limit is not None and held.limit.value == 1_000_000_000
    assert held.available == 800_000_000


def test_no_limit_leaves_what_the_machine_has(tmp_path):
    files = {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max"}
    held = memory(lay(tmp_path, files))
    assert held.cgroup_left is None and held.available == 6_000_000 * 1024
    assert held.limit is not None and held.limit.value is None


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U16)",
    ],
)
def test_nvidia(tmp_path, line):
    files = {
        "proc/driver/nvidia/version": line + "\nGCC version: gcc 12.3.0",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 1\n",
    }
    cards = graphics(lay(tmp_path, files))
    assert cards.nvidia == ("NVIDIA H200",) and cards.nvidia_driver == "550.54.15"
    assert int(cards.nvidia_driver.split(".")[0]) < CUDA_DRIVER
    assert cards.amd == () and cards.rocm is None and cards.kfd is None


def test_amd(tmp_path):
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {
        f"{nodes}/0/properties": "cpu_cores_count 96\ngfx_target_version 0\n",
        f"{nodes}/1/properties": "simd_count 1216\ngfx_target_version 90402\n",
        f"{nodes}/2/properties": "gfx_target_version 90010\n",
        f"{nodes}/3/properties": "gfx_target_version 110000\n",
        "opt/rocm/.info/version": "7.2.4-44\n",
        "dev/kfd": "",
    }
    cards = graphics(lay(tmp_path, files))
    assert cards.amd == ("gfx942", "gfx90a", "gfx1100")
    assert cards.rocm == "7.2.4-44" and cards.kfd is True and cards.nvidia == ()


def test_a_card_without_a_driver_is_seen_on_the_bus(tmp_path):
    files = {
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
        "sys/bus/pci/devices/0000:01:00.0/device": "0x2335\n",
        "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
        "sys/bus/pci/devices/0000:02:00.0/class": "0x020000\n",
        "sys/bus/pci/devices/0000:02:00.0/device": "0x0001\n",
    }
    cards = graphics(lay(tmp_path, files))
    assert cards.nvidia == ("NVIDIA PCI device 0x2335 at 0000:01:00.0",)
    assert cards.amd == (), "a network card is no display"


def test_variables_that_matter():
    found = environment({"PATH": "/bin", "ORT_X": "1", "OMP_NUM_THREADS": "4", "HOME": "/", "MIGRAPHX_TRACE": "1"})
    assert found == {"MIGRAPHX_TRACE": "1", "OMP_NUM_THREADS": "4", "ORT_X": "1"}
