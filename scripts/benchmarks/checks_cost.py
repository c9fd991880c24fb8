"""What the checks of images and packages cost for honest input: two checkouts in turns, one package, one photograph.

    python scripts/benchmarks/checks_cost.py --package PACKAGE --before OLD_CHECKOUT --after NEW_CHECKOUT

Prints the CPU time of loading the package and of preprocessing a JPEG of 12 million pixels, per checkout and process.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

REPEATS = 7


def photograph() -> bytes:
    """A smooth picture with noise, encoded as a JPEG of 4032 x 3024 pixels."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (300, 400, 3), dtype=np.uint8)).resize((4032, 3024))
    noisy = np.asarray(smooth).astype(np.int16) + random.normal(0, 6, (3024, 4032, 3)).astype(np.int16)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def best_of(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        action()
        times.append(time.process_time() - begin)
    return min(times)


def measure(package: str) -> None:
    """Measure with the promprune that this process imports."""
    from promprune.runtime import VisionLanguagePipeline

    def load() -> VisionLanguagePipeline:
        return VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1)

    content = photograph()
    with load() as pipeline:
        pipeline.encoder.preprocess(content)
        found = {"load_ms": best_of(load), "photograph_ms": best_of(lambda: pipeline.encoder.preprocess(content))}
    print(json.dumps({name: seconds * 1000 for name, seconds in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", required=True)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(asked.rounds):
        for name in found:
            environment = {**os.environ, "PYTHONPATH": getattr(asked, name), "MEASURE": asked.package}
            done = subprocess.run(
                [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(done.stdout))
    for key in found["before"][0]:
        medians = {name: statistics.median(one[key] for one in found[name]) for name in found}
        print(json.dumps({"what": key, **medians, "ratio": medians["after"] / medians["before"]}))


if __name__ == "__main__":
    measure(os.environ["MEASURE"]) if "MEASURE" in os.environ else main()
