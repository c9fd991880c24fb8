"""Measure how much sooner requests are answered in a shared running batch than one by one.

    python scripts/benchmarks/continuous_batching.py PACKAGE [PACKAGE ...]
    python scripts/benchmarks/continuous_batching.py PACKAGE --requests 8 --new-tokens 64 --gap-ms 50 --rounds 5

Requests arrive at fixed intervals. Each asks about an image that was encoded before, and is answered with exactly the
requested number of tokens (the end of sequence is ignored). One by one, a request starts after the one before it is
answered; in the engine, it joins the running batch at the next step. The two take turns; times are measured from the
first arrival to the last answer. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from promprune.runtime import Request, VisionLanguagePipeline

QUESTIONS = ("What is on the table?", "How many red shapes are there?", "Describe the picture.", "Is it day?")


class Run(NamedTuple):
    """One run: seconds from the first arrival to the last answer, seconds of each request, and the answers."""

    total_s: float
    latencies_s: list[float]
    token_ids: list[tuple[int, ...]]


def make_requests(pipeline: VisionLanguagePipeline, count: int, new_tokens: int) -> list[Request]:
    image = pipeline.encode_image(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    )
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(count)]
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True}
    return [pipeline.request(image, question, **options) for question in questions]


def run(pipeline: VisionLanguagePipeline, requests: list[Request], gap_s: float, max_batch: int | None) -> Run:
    """Answer requests that arrive ``gap_s`` apart; with a ``max_batch`` of 1, one by one."""
    engine = pipeline.engine(max_batch=max_batch)
    done_s: dict[Request, float] = {}
    start, arrived = time.perf_counter(), 0
    while len(done_s) < len(requests):
        while arrived < len(requests) and time.perf_counter() - start >= arrived * gap_s:
            engine.add(requests[arrived])
            arrived += 1
        if not engine.has_requests:
            time.sleep(max(0.0, start + arrived * gap_s - time.perf_counter()))
        done_s |= {r: time.perf_counter() - start for r, _ in engine.step() if r.done}
    latencies_s = [done_s[request] - number * gap_s for number, request in enumerate(requests)]
    return Run(max(done_s.values()), latencies_s, [request.result().token_ids for request in requests])


def measure(package: Path, args: argparse.Namespace) -> dict[str, Any]:
    with VisionLanguagePipeline.from_package(package, num_threads=args.threads) as pipeline:
        ways: dict[str, Callable[[], Run]] = {
            name: lambda max_batch=max_batch: run(  # type: ignore[misc]
                pipeline, make_requests(pipeline, args.requests, args.new_tokens), args.gap_ms / 1000, max_batch
            )
            for name, max_batch in (("one_by_one", 1), ("continuous", None))
        }
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                made = ways[name]()
                if number:  # the first warms up
                    runs[name].append(made)
    equal = len({tuple(made.token_ids) for found in runs.values() for made in found}) == 1
    total_s = {name: median(made.total_s for made in found) for name, found in runs.items()}
    latency_s = {name: median(median(made.latencies_s) for made in found) for name, found in runs.items()}
    return {
        "package": package.name,
        "one_by_one_ms": round(total_s["one_by_one"] * 1000, 1),
        "continuous_ms": round(total_s["continuous"] * 1000, 1),
        "ratio": round(total_s["continuous"] / total_s["one_by_one"], 3),
        "one_by_one_latency_ms": round(latency_s["one_by_one"] * 1000, 1),
        "continuous_latency_ms": round(latency_s["continuous"] * 1000, 1),
        "equal_answers": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--gap-ms", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    figures = [measure(package, args) for package in args.packages]
    settings = {name: value for name, value in vars(args).items() if name != "packages"}
    print(json.dumps({**settings, "cpus": len(os.sched_getaffinity(0)), "packages": figures}))


if __name__ == "__main__":
    main()
