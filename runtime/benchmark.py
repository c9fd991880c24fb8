"""How fast packages start and answer, each stage apart, several packages in one run.

::

    python -m promprune.runtime.benchmark llava-0.12 llava-1.0 --image photo.jpg

Every package is started ``--runs`` times in a fresh process (cold start to first token, resident memory) and then
asked ``--runs`` times in one process, after a warm-up and without the cache of encoded images. Medians are
reported. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from promprune.errors import PrompruneError
from promprune.package import read_manifest
from promprune.runtime.config import RuntimeConfig
from promprune.runtime.pipeline import VisionLanguagePipeline

__all__ = ["benchmark_package", "main"]

_STAGES: Final = ("preprocess_ms", "vision_ms", "splice_ms", "prefill_ms", "first_token_ms")
_COLD_START: Final = """
import json, sys, time
from promprune.runtime import VisionLanguagePipeline
package, image, prompt, provider, threads = json.loads(sys.argv[1])
with VisionLanguagePipeline.from_package(package, provider=provider, num_threads=threads) as pipeline:
    stream = pipeline.stream(image, prompt, max_new_tokens=1)
    list(stream)
    first_token = time.time()
import resource
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([first_token, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]))
"""


def benchmark_package(
    package: Path, image: Path, prompt: str, *, new_tokens: int, runs: int, provider: str, num_threads: int | None
) -> dict[str, Any]:
    """Measure one package.

    Returns:
        Medians, with their units in the names: times in milliseconds, sizes in bytes.

    Raises:
        PrompruneError: the package cannot be loaded, or cannot answer.
    """
    manifest = read_manifest(package)
    config = RuntimeConfig(provider=provider, num_threads=num_threads, image_cache_size=0)  # type: ignore[arg-type]
    with VisionLanguagePipeline.from_package(package, **vars(config)) as pipeline:
        device = pipeline.device
        pipeline.generate(image, prompt, max_new_tokens=2)
        results = [pipeline.generate(image, prompt, max_new_tokens=new_tokens) for _ in range(runs)]
    timings = [result.timings for result in results]
    rates = [rate for rate in (timing.decode_tokens_per_s for timing in timings) if rate is not None]
    starts = [_cold_start(package, image, prompt, provider, num_threads) for _ in range(runs)]
    return {
        "package": str(package),
        "device": device,
        "num_tokens": manifest.selection.num_tokens,
        "keep_tokens": manifest.selection.keep_tokens,
        "package_bytes": sum(file.size_bytes for file in manifest.files),
        "prompt_tokens": timings[0].prompt_tokens,
        "new_tokens": timings[0].new_tokens,
        "kv_cache_bytes": timings[0].kv_cache_bytes,
        **{stage: _median([getattr(timing, stage) for timing in timings]) for stage in _STAGES},
        "decode_tokens_per_s": _median(rates),
        "cold_start_ms": _median([start for start, _ in starts]),
        "peak_resident_bytes": _median([peak for _, peak in starts]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m promprune.runtime.benchmark``."""
    given = _parser().parse_args(arguments)
    try:
        reports = [
            benchmark_package(
                package,
                given.image,
                given.prompt,
                new_tokens=given.new_tokens,
                runs=given.runs,
                provider=given.provider,
                num_threads=given.num_threads,
            )
            for package in given.packages
        ]
    except PrompruneError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for line in _table(reports):
        sys.stderr.write(line + "\n")
    sys.stdout.write(json.dumps({"runs": given.runs, "num_threads": given.num_threads, "packages": reports}) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m promprune.runtime.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE")
    parser.add_argument("--prompt", default="What is in the picture?", metavar="TEXT")
    parser.add_argument("--new-tokens", type=_count, default=32, metavar="COUNT")
    parser.add_argument("--runs", type=_count, default=5, metavar="COUNT")
    parser.add_argument("--provider", default=RuntimeConfig.provider)
    parser.add_argument("--num-threads", type=int, default=RuntimeConfig.num_threads, metavar="COUNT")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}; expected a whole number of at least 1")
    return int(text)


def _cold_start(package: Path, image: Path, prompt: str, provider: str, num_threads: int | None) -> tuple[float, float]:
    """Return the milliseconds from starting a process to its first token, and its peak resident bytes."""
    argument = json.dumps([str(package), str(image), prompt, provider, num_threads])
    started = time.time()
    done = subprocess.run([sys.executable, "-c", _COLD_START, argument], capture_output=True, text=True, check=True)
    first_token, peak_bytes = json.loads(done.stdout)
    return (first_token - started) * 1000, peak_bytes


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def _table(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Lay the reports out in columns, one per package."""
    names = [name for name in reports[0] if name != "package"]
    width = max(len(name) for name in names) + 2
    lines = ["".ljust(width) + "".join(Path(report["package"]).name.rjust(24) for report in reports)]
    for name in names:
        cells = [report[name] for report in reports]
        shown = [f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(name.ljust(width) + "".join(cell.rjust(24) for cell in shown))
    return lines


if __name__ == "__main__":
    sys.exit(main())
