"""Timing on a CUDA stream, CUDA graphs, and counting of floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.gpu.sizes import Sizes

__all__ = ["Run", "count_flops", "device_ms", "free_memory", "graphed", "timing"]

Run = Callable[[], Any]
LONG_RUN_MS = 20.0


@torch.inference_mode()
def timing(run: Run, sizes: Sizes) -> dict[str, Any]:
    """Time a call: median, 10th and 90th percentile, number of runs, and the peak of allocated device memory."""
    for _ in range(sizes.warm_up):
        run()
    runs = max(3, sizes.runs // 4) if device_ms(run, sizes.device, 2)[0] > LONG_RUN_MS else sizes.runs
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples = torch.tensor(device_ms(run, sizes.device, runs), dtype=torch.float64)
    low, middle, high = samples.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    peak = {"peak_device_bytes": torch.cuda.max_memory_allocated()} if sizes.device == "cuda" else {}
    return {"median_ms": middle, "p10_ms": low, "p90_ms": high, "runs": runs, **peak}


def device_ms(run: Run, device: str, runs: int) -> list[float]:
    """Time every run on the current CUDA stream, in milliseconds; on a CPU, by the clock.

    Nothing waits between runs, so that the host may queue work ahead of the device as a model does.
    """
    if device != "cuda":
        return [_clock_ms(run) for _ in range(runs)]
    events = []
    torch.cuda.synchronize()
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _clock_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def graphed(run: Run, warm_up: int = 3) -> Run:
    """Capture a call as a CUDA graph and return its replay, whose results stay those of the first call's tensors.

    Raises:
        RuntimeError: there is no CUDA, or the call does what a graph cannot hold, such as waiting for the device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device to capture a graph on")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@torch.inference_mode()
def count_flops(run: Run) -> int:
    """Count the floating-point operations of the matrix products and convolutions in a call."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # not every fused attention is counted
        run()
    return int(counter.get_total_flops())


def free_memory(device: str) -> None:
    """Give the device memory of tensors that are gone back to the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
