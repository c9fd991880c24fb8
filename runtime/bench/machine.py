"""Facts about the machine, its load, and the memory of this process; uses the standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Final

from promprune._version import __version__
from promprune.runtime.bench.report import Machine
from promprune.runtime.sessions.config import usable_cpus

__all__ = [
    "OtherLoad",
    "describe_machine",
    "device_bytes_of_this_process",
    "load_average",
    "peak_host_bytes",
]

_PACKAGES: Final = ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "transformers")
_GPU_QUERY: Final = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
_CPU_CLOCK: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_CPU_TIMES: Final = Path("/proc/stat")


class OtherLoad:
    """Measures how much of the CPUs other processes use, from one call to the next."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), _own_seconds(), time.perf_counter()

    def since_last(self) -> float | None:
        """Return the share of all CPUs that other processes used since the last call; None if it is unknown."""
        before = self._busy, self._own, self._start
        self._busy, self._own, self._start = _busy_seconds(), _own_seconds(), time.perf_counter()
        if self._busy is None or before[0] is None:
            return None
        others = (self._busy - before[0]) - (self._own - before[1])
        available = (self._start - before[2]) * (os.cpu_count() or 1)
        return round(min(max(others / available, 0.0), 1.0), 4) if available > 0 else None


def describe_machine(
    *, load_before: float | None, load_after: float | None, other_cpu_fraction: tuple[float, ...]
) -> Machine:
    """Return the record of the machine and of its load during the benchmark."""
    info = _cpu_info()
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cpus=usable_cpus(),
        memory_bytes=_memory_bytes(),
        governor=_read(_CPU_CLOCK / "scaling_governor"),
        cpu_mhz=float(info["cpu MHz"]) if "cpu MHz" in info else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        gpus=tuple(_nvidia_smi(f"--query-gpu={_GPU_QUERY}")),
        versions=_versions(),
        load_before=load_before,
        load_after=load_after,
        other_cpu_fraction=other_cpu_fraction,
    )


def load_average() -> float | None:
    """Return the 1-minute load average; None if the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_bytes_of_this_process() -> int | None:
    """Return the GPU memory of this process according to the driver; None without a GPU.

    ONNX Runtime and PyTorch free none while they run, so at the end this is the peak.
    """
    rows = [row.split(",") for row in _nvidia_smi("--query-compute-apps=pid,used_memory", "nounits")]
    own = [int(used) * 2**20 for pid, used in rows if pid.strip() == str(os.getpid()) and used.strip().isdecimal()]
    return sum(own) if own else None


def peak_host_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux this is ``VmHWM``, because ``ru_maxrss`` starts with the size of the parent process.
    """
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _versions() -> dict[str, str]:
    found = {"promprune": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_info() -> dict[str, str]:
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in reversed([(k, v) for k, v in pairs])}


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _busy_seconds() -> float | None:
    """Return the seconds that all CPUs were busy since the machine started, including time stolen by its host."""
    first = (_read(_CPU_TIMES) or "").partition("\n")[0].split()
    if first[:1] != ["cpu"] or len(first) < 9:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, first[1:9])
    return float(user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _nvidia_smi(query: str, *flags: str) -> list[str]:
    """Return the rows of one query; empty if the command is missing or fails."""
    command = ["nvidia-smi", query, f"--format={','.join(('csv', 'noheader', *flags))}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
