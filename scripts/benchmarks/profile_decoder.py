"""Show how long each kind of operator takes in a prefill and in a decode step, by ONNX Runtime's profiler.

    python scripts/benchmarks/profile_decoder.py llava-1b-int4
    python scripts/benchmarks/profile_decoder.py llava-1b-int4 --portable --length 110

Times are milliseconds per run, on the CPU; "outside" is what a run takes besides its operators. The profiler itself
adds some microseconds to each operator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.sessions import onnxruntime as sessions

WARM_UP = 4  # decode steps that are not counted


def record(package: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decode with a profiler in every session; return the events of the decoder."""
    with tempfile.TemporaryDirectory() as folder:
        plain_settings = sessions._settings

        def settings(*arguments: Any, **options: Any) -> Any:
            found = plain_settings(*arguments, **options)
            found.enable_profiling, found.profile_file_prefix = True, f"{folder}/profile"
            return found

        options = {"provider": "cpu", "num_threads": given.threads, "lowered": not given.portable}
        with (
            patch.object(sessions, "_settings", settings),
            VisionLanguagePipeline.from_package(package, **options) as pipeline,
        ):
            model = pipeline.language_model
            ids = np.random.default_rng(0).integers(5, 200, (given.rows, given.length))
            embeds = model.embed.run({"input_ids": ids})["inputs_embeds"]
            cache = model.decoder.caches.empty(given.rows, given.length + given.steps + WARM_UP)
            _, cache = model.decoder.forward(embeds, cache)
            for _ in range(given.steps + WARM_UP):
                _, cache = model.decode([5] * given.rows, cache)
            events: list[dict[str, Any]] = json.loads(Path(model.decoder.session._open().end_profiling()).read_text())
            return events


def runs_of(events: Sequence[dict[str, Any]]) -> list[Counter[str]]:
    """Return, for each run of the graph, the milliseconds of each kind of operator."""
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    found = []
    for run in runs:
        end = run["ts"] + run["dur"]
        times: Counter[str] = Counter()
        for event in kernels:
            if run["ts"] <= event["ts"] < end:
                times[event["args"]["op_name"]] += event["dur"] / 1000
        times["outside"] = run["dur"] / 1000 - sum(times.values())
        found.append(times)
    return found


def show(title: str, runs: Sequence[Counter[str]]) -> dict[str, float]:
    """Print the median of each kind of operator over some runs; return those above 1 % of the whole."""
    kinds = {kind for run in runs for kind in run}
    medians = {kind: median(run[kind] for run in runs) for kind in kinds}
    whole = sum(medians.values())
    print(f"{title}: {whole:.2f} ms")
    shown = {kind: round(ms, 3) for kind, ms in sorted(medians.items(), key=lambda item: -item[1]) if ms > whole / 100}
    for kind, ms in shown.items():
        print(f"  {kind:<36}{ms:>10.3f} ms {ms / whole:>6.1%}")
    return {"whole": round(whole, 3), **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--portable", action="store_true", help="the portable decoder, not the lowered one")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch (%(default)s)")
    parser.add_argument("--length", type=int, default=617, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime")
    given = parser.parse_args()
    runs = runs_of(record(given.package, given))
    result = {"prefill": show(f"prefill of {given.length} tokens", runs[:1])}
    result["decode"] = show(f"decode step of {given.rows} after {given.length} tokens", runs[-given.steps :])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
