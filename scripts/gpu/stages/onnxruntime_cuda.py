"""Exported packages in ONNX Runtime on CUDA, against the same packages on the CPU."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch  # first: ONNX Runtime then finds the CUDA libraries that PyTorch has loaded

from promprune.embedded.scenes import render_scene
from promprune.export import export_package
from promprune.export.config import ExportConfig
from promprune.runtime import Result, VisionLanguagePipeline
from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes

PROMPT = "What colour is the large 2?"
SCENES = range(20_000_000, 20_000_008)
NEW_TOKENS = 8
GRAPH_RUNS = 50


def run(sizes: Sizes, record: Record) -> None:
    """Record rows of ``package`` and ``what``: answers, kept tokens and first tokens, the vision encoder as a graph."""
    record.fact("onnxruntime", ort.__version__)
    record.fact("providers", ort.get_available_providers())
    record.fact("cuda_is_available_to_pytorch", torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = None if sizes.device == "cuda" else _tiny_model(folder)
        packages = {
            "12 %, loop": ExportConfig(model=model, output=folder / "loop", verify=False),
            "12 %, unrolled": ExportConfig(model=model, output=folder / "unrolled", loop="unrolled", verify=False),
            "all tokens": ExportConfig(model=model, output=folder / "all", ratio=1.0, verify=False),
        }
        for name, config in packages.items():
            _measure_package(record, sizes, name, config)
        _measure_large(record, sizes, folder)


def _tiny_model(folder: Path) -> str:
    from tests.support.tiny_models import save_tiny_llava

    return str(save_tiny_llava(folder / "tiny"))


def _measure_package(record: Record, sizes: Sizes, name: str, config: ExportConfig) -> None:
    package = export_package(config).output
    wanted = _answers(package, "cpu")
    record.attempt(lambda: _comparison(_answers(package, sizes.device), wanted), package=name, what="against the CPU")
    record.attempt(lambda: _vision_graph(package, sizes), package=name, what="vision encoder as a CUDA graph")


def _answers(package: Path, provider: Any, scenes: Sequence[int] = SCENES) -> list[Result]:
    """Answer one prompt about each scene, after one untimed answer."""
    with VisionLanguagePipeline.from_package(package, provider=provider, image_cache_size=0) as pipeline:
        images = [render_scene(seed).image for seed in scenes]
        pipeline.generate(images[0], PROMPT, max_new_tokens=NEW_TOKENS)
        return [pipeline.generate(image, PROMPT, max_new_tokens=NEW_TOKENS) for image in images]


def _comparison(found: Sequence[Result], wanted: Sequence[Result]) -> dict[str, Any]:
    """Return how many answers and kept sets are equal, and the median times."""
    pairs = list(zip(found, wanted, strict=True))
    answers = sum(one.token_ids == other.token_ids for one, other in pairs)
    kept = sum(_kept(one) == _kept(other) for one, other in pairs)
    first, vision, prefill = (
        statistics.median(getattr(result.timings, name) for result in found)
        for name in ("first_token_ms", "vision_ms", "prefill_ms")
    )
    count = len(pairs)
    return {
        "result": f"{answers} of {count} answers and {kept} of {count} kept sets equal; first token {first:.2f} ms",
        "equal_answers": answers,
        "equal_kept_sets": kept,
        "images": count,
        "first_token_ms": first,
        "vision_ms": vision,
        "prefill_ms": prefill,
    }


def _kept(result: Result) -> list[set[int]]:
    return [set(selection.token_indices.tolist()) for selection in result.selection]


def _vision_graph(package: Path, sizes: Sizes) -> dict[str, Any]:
    """Time the vision encoder with inputs and outputs bound on the device, captured as a CUDA graph."""
    if sizes.device != "cuda":
        raise RuntimeError("no CUDA device to capture a graph on")
    options = {"use_tf32": "0", "enable_cuda_graph": "1"}
    path = next((package / "onnx").glob("vision_encoder*.onnx"))
    session = ort.InferenceSession(path, providers=[("CUDAExecutionProvider", options)])
    (pixels, *others) = session.get_inputs()
    if others:
        raise RuntimeError(f"{path.name} has further inputs")
    shape = [1, *pixels.shape[1:]]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(pixels.name, ort.OrtValue.ortvalue_from_numpy(values, "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)
    times = _bound_times(session, binding)
    return {"result": f"{statistics.median(times):.3f} ms", "median_ms": statistics.median(times), "runs": len(times)}


def _bound_times(session: Any, binding: Any) -> list[float]:
    """Time runs of a session, after those that capture its graph."""
    from scripts.gpu.measure import device_ms

    def run_once() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    for _ in range(3):
        run_once()
    return device_ms(run_once, "cpu", GRAPH_RUNS)  # by the clock: ONNX Runtime has a stream of its own


def _measure_large(record: Record, sizes: Sizes, folder: Path) -> None:
    """Measure ViT-L/14-336 with a 1.1B language model in fp16, random weights made here; the CPU does not answer it."""
    if sizes.device != "cuda":
        return
    from tests.support.random_llava import config_of, save

    save(folder / "1b", config_of("1b"), "float16", 0)
    for ratio in (0.12, 1.0):
        name = f"1.1B in fp16, ratio {ratio:g}"
        config = ExportConfig(
            model=str(folder / "1b"), output=folder / name, ratio=ratio, dtype="fp16", verify=False, copy_weights=False
        )
        record.attempt(lambda config=config: _large(config), package=name, what="first token")


def _large(config: ExportConfig) -> dict[str, Any]:
    results = _answers(export_package(config).output, "cuda", SCENES[:4])
    return _comparison(results, results) | {
        "result": f"{statistics.median(result.timings.first_token_ms for result in results):.2f} ms"
    }
