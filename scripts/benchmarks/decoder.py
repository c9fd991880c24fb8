"""Compare the decoder lowered for ONNX Runtime with the portable one: times, memory, and answers.

    python scripts/benchmarks/decoder.py                          # equal answers: embedded model and tiny families
    python scripts/benchmarks/decoder.py --package llava-1b-0.12  # times of a package, on a quiet machine

The two decoders take turns, on the same tokens, in random order; each time is the median of the rounds. Both are in
memory: twice the weights, plus the copies that ONNX Runtime rearranges. A decode step is measured with a KV cache of
110 or 617 tokens. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.embedded.scenes import TEST_SEEDS, questions, render_scene
from promprune.export import export_package
from promprune.export.config import ExportConfig
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.engine.language_model import LanguageModel
from tests.support.tiny_models import (
    save_tiny_llava,
    save_tiny_llava_next,
    save_tiny_qwen,
    save_tiny_siglip_llava,
    tiny_language_model,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)

LENGTHS = (110, 617)
ROWS = 8
NEW_TOKENS = 16  # length of the compared answers
TINY: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llava": (save_tiny_llava, {"ratio": 0.25}),
    "llava-siglip": (save_tiny_siglip_llava, {"ratio": 0.25}),
    "llava-next": (save_tiny_llava_next, {}),
    "sliding window": (
        lambda folder: save_tiny_llava_next(folder, text=tiny_language_model("mistral", sliding_window=16)),
        {},
    ),
    "qwen2.5-vl": (lambda folder: save_tiny_qwen(folder, tiny_qwen2_5_vl()), {"image_grids": ((6, 6),)}),
    "qwen2-vl": (lambda folder: save_tiny_qwen(folder, tiny_qwen2_vl()), {"image_grids": ((4, 6),)}),
}


class Both(NamedTuple):
    """One package with each of the two decoders; the other graphs are shared."""

    lowered: VisionLanguagePipeline
    portable: VisionLanguagePipeline


def open_both(folder: Path, stack: ExitStack, threads: int | None = None) -> Both:
    """Open a package twice, on the CPU; refuse one without a lowered decoder."""
    options: dict[str, Any] = {"provider": "cpu", "num_threads": threads}
    lowered = stack.enter_context(VisionLanguagePipeline.from_package(folder, **options))
    if "seqlens_k" not in lowered.language_model.decoder.session.inputs:
        sys.exit(f"{folder}: {lowered.notes[-1]}")
    return Both(lowered, stack.enter_context(VisionLanguagePipeline.from_package(folder, lowered=False, **options)))


def prefill(model: LanguageModel, embeds: np.ndarray[Any, Any], capacity: int) -> Any:
    """Run the decoder on [rows, length, hidden] embeddings; return the cache."""
    return model.decoder.forward(embeds, model.decoder.caches.empty(len(embeds), capacity))[1]


def time_prefill(model: LanguageModel, rows: int, length: int) -> Iterator[float]:
    """Yield the time of one prefill after the other, in milliseconds."""
    embeds = embeddings(model, rows, length)
    while True:
        start = time.perf_counter()
        prefill(model, embeds, length + 64)
        yield (time.perf_counter() - start) * 1000


def time_decode(model: LanguageModel, rows: int, length: int) -> Iterator[float]:
    """Yield the time of one decode step after the other; the cache is truncated to ``length`` after every 32 steps."""
    embeds = embeddings(model, rows, length)
    while True:
        cache = prefill(model, embeds, length + 64)
        for _ in range(32):
            start = time.perf_counter()
            _, cache = model.decode([5] * rows, cache)
            yield (time.perf_counter() - start) * 1000


def embeddings(model: LanguageModel, rows: int, length: int) -> np.ndarray[Any, Any]:
    ids = np.random.default_rng(0).integers(5, 200, (rows, length))
    return model.embed.run({"input_ids": ids})["inputs_embeds"]


def in_turns(times: dict[str, Iterator[float]], rounds: int) -> dict[str, float]:
    """Return the median of each time, in milliseconds, without two rounds of warm-up."""
    measured: dict[str, list[float]] = {name: [] for name in times}
    for number in range(rounds + 2):
        for name in random.sample(sorted(times), len(times)):
            value = next(times[name])
            if number >= 2:
                measured[name].append(value)
    return {name: median(values) for name, values in measured.items()}


def measure_times(both: Both, rounds: int) -> dict[str, Any]:
    """Measure prefill and decode steps of one row, and decode steps of eight rows at once."""
    models = {"lowered": both.lowered.language_model, "portable": both.portable.language_model}
    result: dict[str, Any] = {}
    for length in LENGTHS:
        for name, clock, count in (("prefill", time_prefill, max(3, rounds // 8)), ("decode", time_decode, rounds)):
            found = in_turns({key: clock(model, 1, length) for key, model in models.items()}, count)
            result[f"{name}_{length}"] = {
                **milliseconds(found),
                "ratio": round(found["lowered"] / found["portable"], 3),
            }
    for key, model in models.items():
        found = in_turns({"one_row": time_decode(model, 1, 617), "eight_rows": time_decode(model, ROWS, 617)}, rounds)
        ratio = found["eight_rows"] / (ROWS * found["one_row"])
        result[f"eight_rows_617_{key}"] = {**milliseconds(found), "ratio": round(ratio, 3)}
    result["choosing_tokens"] = measure_choice(both.lowered, result["decode_110"]["lowered_ms"])
    return result


def measure_choice(pipeline: VisionLanguagePipeline, step_ms: float) -> dict[str, Any]:
    """Measure the time of choosing a token and decoding it to text, compared with the decode step."""
    spec = pipeline.language_model.decoder.session.outputs["logits"]
    logits = np.random.default_rng(0).normal(size=(64, int(spec.shape[-1]))).astype(np.float32)
    found = {}
    for name, options in (("greedy", {}), ("sampling", {"temperature": 0.7, "top_p": 0.9, "top_k": 50})):
        request = pipeline.request((), "Hello", max_new_tokens=len(logits), ignore_eos=True, **options)
        start = time.perf_counter()
        for row in logits:
            request.choose_token(row)
        choice_ms = (time.perf_counter() - start) * 1000 / len(logits)
        found[name] = {"ms": round(choice_ms, 4), "share_of_step": round(choice_ms / (choice_ms + step_ms), 4)}
    return found


def milliseconds(times: dict[str, float]) -> dict[str, float]:
    return {f"{name}_ms": round(value, 2) for name, value in times.items()}


def count_equal(both: Both, prompts: int, image_size: int) -> dict[str, int]:
    """Compare greedy answers: the portable decoder's to one prompt at a time, the lowered one's also in batches."""
    asked = []
    for seed in TEST_SEEDS:
        scene = render_scene(seed, image_size=image_size)
        image = both.lowered.encode_image(scene.image)
        asked += [(image, question.text) for question in questions(scene)]
        if len(asked) >= prompts:
            break
    asked = asked[:prompts]
    options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    wanted = [both.portable.generate(*question, **options).token_ids for question in asked]
    alone = [both.lowered.generate(*question, **options).token_ids for question in asked]
    batches = [asked[begin : begin + ROWS] for begin in range(0, len(asked), ROWS)]
    together = [result.token_ids for batch in batches for result in both.lowered.generate_batch(batch, **options)]
    return {
        "prompts": len(asked),
        "equal": sum(a == b for a, b in zip(wanted, alone, strict=True)),
        "equal_in_batches": sum(a == b for a, b in zip(wanted, together, strict=True)),
    }


def measure_answers(prompts: int, tiny_prompts: int) -> dict[str, Any]:
    """Export the embedded model and every tiny family, and compare their answers."""
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, (save, options) in {"embedded": (None, {}), **TINY}.items():
            model = {} if save is None else {"model": str(save(folder / f"{family} model"))}
            export_package(ExportConfig(output=folder / family, verify=False, **model, **options))
            with ExitStack() as stack:
                both = open_both(folder / family, stack)
                count, size = (prompts, 224) if save is None else (tiny_prompts, 112)
                result[family] = count_equal(both, count, size)
            print(f"{family}: {result[family]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, action="append", default=[], help="package to measure the times of")
    parser.add_argument("--rounds", type=int, default=40, help="decode steps of each measurement (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime")
    parser.add_argument("--prompts", type=int, default=500, help="prompts of the embedded model (%(default)s)")
    parser.add_argument("--tiny-prompts", type=int, default=50, help="prompts of each tiny family (%(default)s)")
    given = parser.parse_args()
    result: dict[str, Any] = {}
    for package in given.package:
        with ExitStack() as stack:
            result[package.name] = measure_times(open_both(package, stack, given.threads), given.rounds)
        print(f"{package}: {result[package.name]}", flush=True)
    if not given.package:
        result["equal_answers"] = measure_answers(given.prompts, given.tiny_prompts)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
