"""Measuring what a call costs: CPU seconds and the peak of the memory, each above what it was before (Linux)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from time import process_time
from typing import Any

MB = 2**20


def memory(field: str) -> int:
    """Return one of the memory fields of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def cost_of(action: Callable[[], Any]) -> dict[str, Any]:
    """Run a function; return its outcome, CPU seconds, and MB of memory that it needed at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = memory("VmRSS"), process_time()
    try:
        outcome = f"done: {action()}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return {
        "outcome": outcome,
        "seconds": process_time() - begin,
        "megabytes": (memory("VmHWM") - before) / MB,
    }


def run_limited(module: str, *arguments: str, cpu_seconds: int, memory_mb: int) -> tuple[list[dict[str, Any]], str]:
    """Run a module that prints one JSON object per line, under limits of the kernel.

    Returns:
        The objects, and what was written to stderr.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * MB, memory_mb * MB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
        env=dict(os.environ, OMP_NUM_THREADS="2"),
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def report(costs: Iterable[tuple[str, Callable[[], Any]]]) -> None:
    """Print the cost of each named call, for :func:`run_limited`."""
    for name, action in costs:
        print(json.dumps({"name": name, **cost_of(action)}), flush=True)
