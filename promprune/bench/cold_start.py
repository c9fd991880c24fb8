"""A process that loads one contender, answers with one token, and says when and with how much memory.

Run as ``python -m promprune.bench.cold_start JSON``, where the JSON is a :class:`ColdStartRequest`. For a package,
nothing is imported that the runtime does not need.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import msgspec

from promprune.bench.report import ColdStart
from promprune.errors import BackendError

__all__ = ["ColdStartRequest", "measure_cold_starts"]


class ColdStartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process loads, and what it is asked."""

    image: str
    prompt: str
    package: str | None = None
    options: dict[str, Any] = {}  # of the runtime, for a package
    pytorch: dict[str, Any] | None = None  # of :class:`promprune.bench.pytorch.PytorchSettings`, for the others


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    finished_s: float  # time.time()
    peak_host_bytes: int
    peak_device_bytes: int | None


def measure_cold_starts(request: ColdStartRequest, count: int) -> ColdStart:
    """Start a process ``count`` times.

    Raises:
        BackendError: it failed; its last line says why.
    """
    command = [sys.executable, "-m", "promprune.bench.cold_start", msgspec.json.encode(request).decode()]
    starts, outcomes = [], []
    for _ in range(count):
        starts.append(time.time())
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise BackendError(f"a process that answers with one token failed ({last})")
        outcomes.append(msgspec.json.decode(done.stdout.splitlines()[-1], type=_Outcome))
    devices = [outcome.peak_device_bytes for outcome in outcomes if outcome.peak_device_bytes is not None]
    times = [(outcome.finished_s - start) * 1000 for start, outcome in zip(starts, outcomes, strict=True)]
    return ColdStart(
        first_token_ms=round(statistics.median(times), 3),
        peak_host_bytes=int(statistics.median(outcome.peak_host_bytes for outcome in outcomes)),
        peak_device_bytes=int(statistics.median(devices)) if devices else None,
        n=count,
    )


def _answer(request: ColdStartRequest) -> None:
    if request.pytorch is not None:
        from promprune.bench.pytorch import PytorchSettings, first_token

        first_token(PytorchSettings(**request.pytorch), request.image, request.prompt)
        return
    from promprune.runtime import VisionLanguagePipeline

    with VisionLanguagePipeline.from_package(str(request.package), **request.options) as pipeline:
        list(pipeline.stream(request.image, request.prompt, max_new_tokens=1))


def _main() -> None:
    _answer(msgspec.json.decode(sys.argv[1], type=ColdStartRequest))
    finished = time.time()
    from promprune.bench.machine import device_bytes_of_this_process, peak_host_bytes

    outcome = _Outcome(
        finished_s=finished,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=device_bytes_of_this_process(),
    )
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    _main()
