"""Measure the savings of quantized packages on random LLaVA checkpoints. The last line on stdout is JSON.

    python scripts/benchmarks/quantization.py --work /a/disk/with/30/GB
    python scripts/benchmarks/quantization.py --work /a/disk/with/30/GB --part 1b

``1b`` compares a LLaVA with a language model of 1.1 billion parameters in int4 and fp32: package, loading, decoding,
first token, and the vision encoder alone. ``7b`` exports the shape of LLaVA-1.5-7B in int4, and answers with it. Each
figure is the median over the rounds of a separate process; fp32 and int4 take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

EXPORT = Path(sys.executable).with_name("promprune-export")
INT4 = ["--weight-format", "int4", "--vision-int8-activations"]
QUESTION = "What is in the picture?"
NEW_TOKENS = 24


def export(checkpoint: Path, package: Path, *options: str) -> dict[str, Any]:
    """Export in a separate process, replacing a package that exists; return its size, time and memory."""
    if package.exists():
        shutil.rmtree(package)
    started = time.perf_counter()
    command = [str(EXPORT), str(checkpoint), "-o", str(package), "--json", *options]
    text = ask(["--measure-export", json.dumps(command)])
    return {
        "export_s": round(time.perf_counter() - started, 1),
        "export_peak_bytes": text["peak_bytes"],
        "verified": text["verified"],
        "package_bytes": sum(path.stat().st_size for path in package.rglob("*") if path.is_file()),
    }


def ask(arguments: list[str]) -> dict[str, Any]:
    """Run one task of this script in a separate process; return the last line of its output."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure_export(command: list[str]) -> dict[str, Any]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    verification = json.loads(output)["verification"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"peak_bytes": peak, "verified": verification is not None and verification["passed"]}


def measure_package(folder: Path, rounds: int) -> dict[str, Any]:
    """Load a package and answer; image features are never reused."""
    from promprune.embedded import scenes
    from promprune.runtime import VisionLanguagePipeline

    image = scenes.render_scene(scenes.TEST_SEEDS[0], image_size=336).image
    started = time.perf_counter()
    with VisionLanguagePipeline.from_package(folder, provider="cpu", image_cache_size=0) as pipeline:
        load_s = time.perf_counter() - started
        answers = [
            pipeline.generate([image], QUESTION, max_new_tokens=NEW_TOKENS, ignore_eos=True) for _ in range(rounds + 1)
        ][1:]
    timings = [answer.timings for answer in answers]
    return {
        "load_s": load_s,
        "first_token_ms": statistics.median(t.first_token_ms for t in timings),
        "vision_ms": statistics.median(t.vision_ms for t in timings),
        "prefill_ms": statistics.median(t.prefill_ms for t in timings),
        "decode_ms_per_token": statistics.median(t.decode_ms / max(t.new_tokens - 1, 1) for t in timings),
        "prompt_tokens": timings[0].prompt_tokens,
        "new_tokens": timings[0].new_tokens,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def in_turns(packages: dict[str, Path], turns: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure packages in turns; return the median of each figure."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
    for _ in range(turns):
        for name, folder in packages.items():
            found[name].append(ask(["--measure-package", str(folder), "--rounds", str(rounds)]))
    return {
        name: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        for name, runs in found.items()
    }


def compare_1b(work: Path, turns: int, rounds: int) -> dict[str, Any]:
    checkpoint = random_checkpoint(work, "1b", "float32")
    packages, exports = {}, {}
    for name, options in {"fp32": [], "int4": INT4}.items():
        for ratio in ("0.12", "1.0"):
            packages[f"{name}-{ratio}"] = work / f"quantization-1b-{name}-{ratio}"
            exports[f"{name}-{ratio}"] = export(
                checkpoint, packages[f"{name}-{ratio}"], "--ratio", ratio, "--copy-weights", "--no-verify", *options
            )
    runs = in_turns(packages, turns, rounds)
    full, small = runs["fp32-0.12"], runs["int4-0.12"]
    sizes = [exports[f"{name}-0.12"]["package_bytes"] for name in ("int4", "fp32")]
    goals = {"package": 0.2, "load_s": 0.35, "decode_ms_per_token": 0.33, "first_token_ms": 0.55, "vision_ms": 0.5}
    ratios = {"package": sizes[0] / sizes[1], **{key: small[key] / full[key] for key in goals if key != "package"}}
    return {
        "exports": exports,
        "runs": runs,
        "int4_over_fp32": {key: round(value, 3) for key, value in ratios.items()},
        "goals_met": {key: ratios[key] <= goal for key, goal in goals.items()},
    }


def show_7b(work: Path, turns: int, rounds: int) -> dict[str, Any]:
    checkpoint = random_checkpoint(work, "7b", "float16")
    packages = {ratio: work / f"quantization-7b-int4-{ratio}" for ratio in ("0.12", "1.0")}
    once: dict[str, list[str]] = {"0.12": [], "1.0": ["--no-verify"]}  # they differ in the selection alone
    exports = {
        ratio: export(checkpoint, folder, "--ratio", ratio, *INT4, *once[ratio]) for ratio, folder in packages.items()
    }
    runs = in_turns(packages, turns, rounds)
    return {
        "exports": exports,
        "runs": runs,
        "tokens_per_s": {ratio: round(1e3 / run["decode_ms_per_token"], 2) for ratio, run in runs.items()},
        "goals_met": {
            "export_peak_bytes": max(e["export_peak_bytes"] for e in exports.values()) <= 1_500_000_000,
            "export_s": max(e["export_s"] for e in exports.values()) <= 600,
            "package_bytes": max(e["package_bytes"] for e in exports.values()) <= 4_600_000_000,
            "peak_bytes": max(run["peak_bytes"] for run in runs.values()) <= 7_000_000_000,
        },
    }


def random_checkpoint(work: Path, size: str, dtype: str) -> Path:
    """Write a random LLaVA, unless it exists."""
    folder = work / f"quantization-llava-{size}"
    if not folder.exists():
        script = Path(__file__).resolve().with_name("make_random_llava.py")
        subprocess.run([sys.executable, str(script), str(folder), "--size", size, "--dtype", dtype], check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and packages, which are kept")
    parser.add_argument("--part", choices=("1b", "7b"), action="append", help="measure only this part; may be repeated")
    parser.add_argument("--turns", type=int, default=3, help="processes for each package (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="answers of each process (%(default)s)")
    parser.add_argument("--measure-export", help=argparse.SUPPRESS)
    parser.add_argument("--measure-package", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure_export:
        print(json.dumps(measure_export(json.loads(given.measure_export))))
    elif given.measure_package:
        print(json.dumps(measure_package(given.measure_package, given.rounds)))
    elif given.work is None:
        parser.error("expected --work DIR")
    else:
        given.work.mkdir(parents=True, exist_ok=True)
        parts = {"1b": compare_1b, "7b": show_7b}
        chosen = given.part or list(parts)
        print(json.dumps({part: parts[part](given.work, given.turns, given.rounds) for part in chosen}))


if __name__ == "__main__":
    main()
