"""A process that loads one contender, generates one token, and reports the time and its peak memory.

Run as ``python -m promprune.runtime.bench.cold_start JSON``, where the JSON is a :class:`ColdStartRequest`. For a
package, nothing is imported that the runtime does not need.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from promprune.errors import BackendError, PrompruneError
from promprune.runtime.bench.plugins import plugin
from promprune.runtime.bench.report import ColdStart

__all__ = ["ColdStartRequest", "ProcessStart", "start_process", "summary_of"]

_EXIT_REFUSED: Final = 3  # the last line of stdout is then the error message; other failures exit with 1


class ColdStartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process loads, and the question it answers."""

    image: str
    prompt: str
    package: str | None = None
    options: dict[str, Any] = {}  # options of the runtime, for a package
    pytorch: dict[str, Any] | None = None  # fields of PytorchSettings, for a baseline in PyTorch


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    finished_s: float  # time.time()
    peak_host_bytes: int
    peak_device_bytes: int | None


class ProcessStart(NamedTuple):
    """One process: the time from its start to the first token, in milliseconds, and its peak memory, in bytes."""

    first_token_ms: float
    peak_host_bytes: int
    peak_device_bytes: int | None


def start_process(request: ColdStartRequest) -> ProcessStart:
    """Start one process, and wait for its result.

    Raises:
        BackendError: the process failed; the message is that of its error, if promprune raised it.
    """
    command = [sys.executable, "-m", "promprune.runtime.bench.cold_start", msgspec.json.encode(request).decode()]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == _EXIT_REFUSED:
        raise BackendError(done.stdout.splitlines()[-1])
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BackendError(f"a process that measures the cold start failed ({last})")
    outcome = msgspec.json.decode(done.stdout.splitlines()[-1], type=_Outcome)
    return ProcessStart((outcome.finished_s - start) * 1000, outcome.peak_host_bytes, outcome.peak_device_bytes)


def summary_of(starts: Sequence[ProcessStart]) -> ColdStart:
    """Return the medians over one or more processes."""
    devices = [start.peak_device_bytes for start in starts if start.peak_device_bytes is not None]
    return ColdStart(
        first_token_ms=round(statistics.median(start.first_token_ms for start in starts), 3),
        peak_host_bytes=int(statistics.median(start.peak_host_bytes for start in starts)),
        peak_device_bytes=int(statistics.median(devices)) if devices else None,
        n=len(starts),
    )


def _answer(request: ColdStartRequest) -> None:
    if request.pytorch is not None:
        pytorch = plugin("pytorch")
        settings = msgspec.convert(request.pytorch, pytorch.PytorchSettings)
        pytorch.first_token(settings, request.image, request.prompt)
        return
    from promprune.runtime import VisionLanguagePipeline

    with VisionLanguagePipeline.from_package(str(request.package), **request.options) as pipeline:
        list(pipeline.stream(request.image, request.prompt, max_new_tokens=1))


def _main() -> None:
    try:
        _answer(msgspec.json.decode(sys.argv[1], type=ColdStartRequest))
    except PrompruneError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(_EXIT_REFUSED)
    finished = time.time()
    from promprune.runtime.bench.machine import device_bytes_of_this_process, peak_host_bytes

    outcome = _Outcome(
        finished_s=finished,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=device_bytes_of_this_process(),
    )
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    _main()
