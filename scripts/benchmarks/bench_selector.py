"""Measure how well the selector graph agrees with the float64 reference, and how fast it is.

    python scripts/benchmarks/bench_selector.py agreement --sets 500
    python scripts/benchmarks/bench_selector.py agreement --sets 500 --hidden-size 1024 --dtypes float32 float16
    python scripts/benchmarks/bench_selector.py speed

``speed`` compares with the method as its authors run it (eager PyTorch, an eigensolver, a Python loop); all
contenders take turns in one process, and the ratio compares their fastest runs. The last line on stdout is JSON. For
measurements on a GPU, see ``scripts/gpu/report.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.export.baselines.authors_method import authors_select
from promprune.export.graphs.selector import build_selector
from promprune.method.batched import prune_tokens
from promprune.method.config import LOOP_FORMS, SelectionConfig
from promprune.method.reference import select_tokens
from tests.support.feature_sets import KINDS, feature_set, to_tf32

BUDGETS = (64, 69, 128, 192)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
OUTPUTS = ["token_indices", "saliency_count", "spectral_entropy"]


def open_session(n: int, d: int, keep: int, threads: int, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    model = build_selector(n, d, keep, batch_size="batch", **options).SerializeToString()
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


class Agreement:
    """Counts for one contender at one budget."""

    def __init__(self) -> None:
        self.sets = self.same = self.same_count = self.duplicates = self.furthest = 0

    def add(self, indices: Sequence[int], count: int, want: set[int], want_count: int) -> None:
        self.sets += 1
        self.same += set(indices) == want
        self.same_count += count == want_count
        self.duplicates += len(set(indices)) < len(indices)
        self.furthest = max(self.furthest, abs(count - want_count))

    def figures(self) -> dict[str, float]:
        return {
            "identical_percent": 100 * self.same / self.sets,
            "same_saliency_count_percent": 100 * self.same_count / self.sets,
            "largest_difference_of_count": self.furthest,
            "sets_with_duplicates": self.duplicates,
        }


def agreement(sets: int, n: int, d: int, threads: int, dtypes: Sequence[str], tf32: bool) -> dict[str, Any]:
    """Measure how often each contender keeps the same tokens as the float64 reference."""
    torch.set_num_threads(threads)
    full = {t: open_session(n, d, t, threads) for t in BUDGETS}
    half = {t: open_session(n, d, t, threads, dtype="float16") for t in BUDGETS if "float16" in dtypes}
    tally: dict[tuple[str, int], Agreement] = defaultdict(Agreement)
    errors = []
    for index in track(range(sets), "feature sets", console=Console(stderr=True)):
        _, x, a = feature_set(index, n, d)
        for keep in BUDGETS:
            want = select_tokens(torch.from_numpy(x).double(), torch.from_numpy(a).double(), keep)
            kept = set(want.token_indices.tolist())
            got, count, entropy = full[keep].run(OUTPUTS, {"image_features": x[None], "saliency": a[None]})
            errors.append(abs(float(entropy[0, 0]) - want.spectral_entropy))
            tally["graph, float32", keep].add(got[0].tolist(), int(count[0, 0]), kept, want.saliency_count)
            theirs = authors_select(torch.from_numpy(x)[None], torch.from_numpy(a)[None], keep, first_token_seeds=True)
            tally["authors, float32", keep].add(theirs.indices[0].tolist(), theirs.counts[0], kept, want.saliency_count)
            if tf32:
                got, count, _ = full[keep].run(OUTPUTS, {"image_features": to_tf32(x)[None], "saliency": a[None]})
                tally["graph, TF32 emulated", keep].add(got[0].tolist(), int(count[0, 0]), kept, want.saliency_count)
            if half:
                _compare_half(half[keep], x, a, keep, tally["graph, float16 features", keep])
    report = {f"{name}, T = {keep}": entry.figures() for (name, keep), entry in sorted(tally.items())}
    print(f"{sets} feature sets of {len(KINDS)} kinds, N = {n}, D = {d}; compared with the float64 reference\n")
    print("| | T | identical sets | same T_sal | T_sal off by at most | sets with a duplicate |")
    print("|---|---|---|---|---|---|")
    for (name, keep), entry in sorted(tally.items()):
        f = entry.figures()
        print(
            f"| {name} | {keep} | {f['identical_percent']:.1f} % | {f['same_saliency_count_percent']:.1f} % "
            f"| {entry.furthest} | {entry.duplicates} |"
        )
    print(f"\nlargest |dH| {max(errors):.2g}, root mean square {float(np.sqrt(np.mean(np.square(errors)))):.2g}")
    return report | {"largest_entropy_error": max(errors)}


def _compare_half(session: ort.InferenceSession, x: Any, a: Any, keep: int, tally: Agreement) -> None:
    rounded = x.astype(np.float16)
    want = select_tokens(torch.from_numpy(rounded).double(), torch.from_numpy(a).double(), keep)
    got, count, _ = session.run(OUTPUTS, {"image_features": rounded[None], "saliency": a[None]})
    tally.add(got[0].tolist(), int(count[0, 0]), set(want.token_indices.tolist()), want.saliency_count)


def race(
    contenders: dict[str, Callable[[], Any]], rounds: int, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of every run; the contenders take turns, each after a pause and an untimed run."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(0.05)  # so that the other library's worker threads stop spinning
            contender()
            for _ in range(repeats):
                start = clock()
                contender()
                times[name].append((clock() - start) * 1e3)
    return times


def speed(n: int, d: int, keep: int, threads: int, rounds: int, repeats: int, clock: str) -> dict[str, Any]:
    """Compare the graph in ONNX Runtime with the authors' method in eager PyTorch, on the CPU."""
    torch.set_num_threads(threads)
    sessions = {loop: open_session(n, d, keep, threads, loop=loop) for loop in LOOP_FORMS}
    sets = [feature_set(index, n, d)[1:] for index in range(len(KINDS))]
    images = [(x[None], a[None]) for x, a in sets]
    batch = (np.stack([x for x, _ in sets]), np.stack([a for _, a in sets]))
    report: dict[str, Any] = {"threads": threads, "authoring_ms": _authoring_ms(n, d, keep)}
    print(f"N = {n}, D = {d}, T = {keep}, {threads} threads; best of {rounds * repeats}")
    print(f"milliseconds of {clock} time per batch\n")
    print("| | B | best | median | best / eager's best |\n|---|---|---|---|---|")
    for size, inputs in ((1, images), (5, [batch])):
        totals = _race_all(sessions, inputs, keep, rounds, repeats, CLOCKS[clock])
        eager = totals["authors, eager PyTorch"][0]
        for name, (best, middle) in totals.items():
            print(f"| {name} | {size} | {best:.1f} | {middle:.1f} | {best / eager:.2f} |")
            report[f"{name}, B = {size}"] = {"best_ms": best, "median_ms": middle, "ratio": best / eager}
    print(f"\nauthored in {report['authoring_ms']:.0f} ms")
    return report


def _race_all(
    sessions: dict[str, ort.InferenceSession],
    inputs: list[Any],
    keep: int,
    rounds: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, tuple[float, float]]:
    """Best and median time of each contender, averaged over the inputs."""
    collected: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for x, a in inputs:
        feeds = {"image_features": x, "saliency": a}
        tx, ta = torch.from_numpy(x), torch.from_numpy(a)
        contenders: dict[str, Callable[[], Any]] = {
            f"graph, {loop}": lambda session=session, feeds=feeds: session.run(None, feeds)
            for loop, session in sessions.items()
        }
        contenders["prune_tokens"] = lambda tx=tx, ta=ta: prune_tokens(tx, ta, keep)
        contenders["authors, eager PyTorch"] = lambda tx=tx, ta=ta: authors_select(tx, ta, keep)
        for name, times in race(contenders, rounds, repeats, clock).items():
            collected[name].append((min(times), median(times)))
    return {
        name: (float(np.mean([best for best, _ in times])), float(np.mean([middle for _, middle in times])))
        for name, times in collected.items()
    }


def _authoring_ms(n: int, d: int, keep: int) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        build_selector(n, d, keep)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["agreement", "speed"])
    parser.add_argument("--sets", type=int, default=500, help="feature sets per row of the agreement table")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=["float32", "float16"],
        help="dtypes of the features in the agreement table; float32 is always included",
    )
    parser.add_argument("--tf32", action="store_true", help="also with the Gram product's factors rounded to TF32")
    parser.add_argument("--num-tokens", type=int, default=576)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--keep-tokens", type=int, default=69, help="budget of the speed tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: with --threads 1, for a machine that is busy"
    )
    o = parser.parse_args(arguments)
    n, d, keep = o.num_tokens, o.hidden_size, o.keep_tokens
    if o.table == "agreement":
        report = agreement(o.sets, n, d, o.threads, o.dtypes, o.tf32)
    else:
        report = speed(n, d, keep, o.threads, o.rounds, o.repeats, o.clock)
    print(json.dumps({"table": o.table, "settings": vars(o), "selection": vars(SelectionConfig())} | report))


if __name__ == "__main__":
    main()
