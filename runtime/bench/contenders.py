"""Contenders of the benchmark: packages here; baselines in PyTorch are in ``promprune.export.baselines``."""

from __future__ import annotations

import contextlib
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from promprune.package.manifest import GraphRecord, Manifest, read_manifest
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.bench.plugins import plugin
from promprune.runtime.bench.report import ColdStart, Contender, GraphWork, Kind
from promprune.runtime.engine.loading import same_language_model
from promprune.runtime.engine.result import Result
from promprune.runtime.images import PreprocessedImage
from promprune.runtime.sessions import Session, Value, open_file
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = [
    "Facts",
    "Measurable",
    "PackageContender",
    "Question",
    "Sample",
    "device_of",
    "open_packages",
    "source_name",
]

CUT_BACKEND: Final = "onnxruntime"  # the backend that can run a part of a graph


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question that every contender answers.

    Attributes:
        image: image file.
        prompt: text after the image.
        new_tokens: length of the answer, in tokens; the end of sequence is ignored.
    """

    image: Path
    prompt: str
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The measurements of one call.

    Attributes:
        stages_ms: stage of :data:`promprune.runtime.bench.report.STAGES` -> milliseconds; without stages that were not
            timed separately.
        token_ids: tokens of the first answer.
    """

    stages_ms: Mapping[str, float]
    token_ids: tuple[int, ...]

    def with_selection(self, selection_ms: float) -> Sample:
        """Return the sample with the selection as a separate stage, subtracted from the vision stage."""
        vision_ms = max(self.stages_ms["vision"] - selection_ms, 0.0)
        return replace(self, stages_ms={**self.stages_ms, "vision": vision_ms, "selection": selection_ms})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about a contender besides its times; the fields are those of its record in the report."""

    name: str
    kind: Kind
    path: str
    model: str
    dtype: str
    device: str
    num_tokens: int
    keep_tokens: int
    policy: str
    prompt_tokens: int
    saliency_count: int | None = None
    package_bytes: int | None = None
    engine_bytes: int | None = None
    kv_cache_bytes: int | None = None
    work: Mapping[str, GraphWork] | None = None
    first_token_flops: int | None = None

    def record(self, work: Mapping[str, Any], token_ids: tuple[int, ...], cold_start: ColdStart | None) -> Contender:
        """Return the record, complemented by measured values."""
        found = {"work": dict(work), "token_ids": token_ids, "cold_start": cold_start}
        return Contender(**{**vars(self), **found})


class Measurable(ABC):
    """A contender: it answers a question about an image, and reports the time of each stage.

    Attributes:
        name: unique in a report.
        concurrent: whether it is thread-safe.
        batched: whether it can answer several prompts in one batch.
    """

    name: str
    concurrent: bool
    batched = True

    @abstractmethod
    def run(self, question: Question, batch: int) -> Sample:
        """Answer ``batch`` equal prompts in one batch; return when the device is done."""

    def separate_selection(self, image: Path) -> None:
        """Prepare to time the selection separately on this image, if a run does not time it."""
        del image

    def selection_apart_ms(self, batch: int) -> float | None:
        """Time the selection alone, run once per image of a batch; None if that is impossible or unnecessary."""
        del batch
        return None

    @abstractmethod
    def facts(self, question: Question) -> Facts:
        """Return facts about the contender; called after the warm-up."""

    @abstractmethod
    def close(self) -> None:
        """Free its resources."""


class PackageContender(Measurable):
    """An exported package in this project's runtime.

    The selection is part of the vision graph. To time it separately, its nodes are copied into a second graph, which
    runs right after every call, on the features of the same image; its time is subtracted from the vision stage.
    ``first_token`` and ``total`` are times of the complete graph, as in normal use.

    Attributes:
        pipeline: the pipeline of the package.
    """

    concurrent = True

    def __init__(self, name: str, folder: Path, pipeline: VisionLanguagePipeline, config: RuntimeConfig) -> None:
        self.name = name
        self._folder = folder
        self.pipeline = pipeline
        self._config = config
        self._selection: _SelectionApart | None = None
        self._last: Result | None = None
        self._cache_bytes = 0  # KV cache of one answer

    def run(self, question: Question, batch: int) -> Sample:
        """Answer; see :class:`Measurable`."""
        requests = [(question.image, question.prompt)] * batch
        result = self.pipeline.generate_batch(requests, max_new_tokens=question.new_tokens, ignore_eos=True)[0]
        self._last, timings = result, result.timings
        self._cache_bytes = timings.kv_cache_bytes
        stages = {
            "preprocess": timings.preprocess_ms + timings.prompt_ms,
            "vision": timings.vision_ms,
            "splice": timings.splice_ms,
            "prefill": timings.prefill_ms,
            "first_token": timings.first_token_ms,
            "total": timings.total_ms,
        }
        if timings.new_tokens > 1:
            stages["decode"] = timings.decode_ms / (timings.new_tokens - 1)
        return Sample(stages_ms=stages, token_ids=result.token_ids)

    def separate_selection(self, image: Path) -> None:
        """Extract the selection from the vision graph, if it has one; see :class:`Measurable`."""
        self._selection = _SelectionApart.of(self._folder, self.pipeline, self._config, self._preprocess(image))

    def selection_apart_ms(self, batch: int) -> float | None:
        """Time the extracted selection; see :class:`Measurable`."""
        return None if self._selection is None else sum(self._selection.run_ms() for _ in range(batch))

    def facts(self, question: Question) -> Facts:
        """Return facts, with the work counted for an image whose selection just ran; see :class:`Measurable`."""
        if self._last is None:
            raise RuntimeError("facts() needs a run before it")
        manifest = self.pipeline.manifest
        prompt_tokens = self._last.timings.prompt_tokens
        preprocessed = self._preprocess(question.image)
        sizes = _sizes(manifest.graphs[preprocessed.graph], preprocessed)
        work = plugin("work").package_work(self._folder, manifest, preprocessed.graph, sizes, prompt_tokens)
        selection = self._last.selection[0]
        return Facts(
            name=self.name,
            kind="package",
            path=str(self._folder),
            model=source_name(manifest),
            dtype=manifest.dtype,
            device=self.pipeline.device,
            num_tokens=selection.num_tokens,
            keep_tokens=selection.keep_tokens,
            policy=selection.policy if selection.ran else "all",
            saliency_count=selection.saliency_count,
            prompt_tokens=prompt_tokens,
            package_bytes=sum(file.size_bytes for file in manifest.files),
            engine_bytes=_bytes_under(self._folder / "engines"),
            kv_cache_bytes=self._cache_bytes,
            work=work,
            first_token_flops=sum(stage.flops for name, stage in work.items() if name != "decode"),
        )

    def _preprocess(self, image: Path) -> PreprocessedImage:
        preprocessed = self.pipeline.encoder.preprocess(image)
        if not isinstance(preprocessed, PreprocessedImage):
            raise TypeError(f"a file was preprocessed as {type(preprocessed).__name__}")
        return preprocessed

    def close(self) -> None:
        """Free the graphs."""
        self.pipeline.close()
        if self._selection is not None:
            self._selection.close()


def open_packages(folders: Mapping[str, Path], config: RuntimeConfig) -> list[PackageContender]:
    """Load packages; packages with the same language model share one copy of it.

    Raises:
        PackageError: a folder is not a package with a language model.
        BackendError: a package cannot be loaded.
    """
    opened: list[PackageContender] = []
    with contextlib.ExitStack() as loaded:
        for name, folder in folders.items():
            pipeline = _pipeline(folder, opened, config)
            opened.append(PackageContender(name, folder, pipeline, config))
            loaded.callback(pipeline.close)
        loaded.pop_all()
    return opened


def device_of(folder: Path, config: RuntimeConfig) -> str:
    """Load a package, return the device of its language model, and free it again.

    Raises:
        PackageError: it is not a package with a language model.
        BackendError: it cannot be loaded.
    """
    options: Any = vars(config)
    with VisionLanguagePipeline.from_package(folder, **options) as pipeline:
        return pipeline.device


def source_name(manifest: Manifest) -> str:
    """Return a name for the source of a package: the model, and the beginning of its weights' digest."""
    return f"{manifest.source.model} {manifest.source.weights_sha256[:12]}"


def _sizes(graph: GraphRecord, preprocessed: PreprocessedImage) -> dict[str, int]:
    """Return the sizes of the dynamic dimensions of a vision graph for an image."""
    return {
        dimension: size
        for tensor in graph.inputs
        for dimension, size in zip(tensor.shape, preprocessed.feeds[tensor.name].shape, strict=True)
        if isinstance(dimension, str)
    }


def _pipeline(folder: Path, opened: Sequence[PackageContender], config: RuntimeConfig) -> VisionLanguagePipeline:
    options: Any = vars(config)
    if config.backend == CUT_BACKEND:
        manifest = read_manifest(folder)
        for other in opened:
            if same_language_model(manifest, other.pipeline.manifest):
                return other.pipeline.with_vision_of(folder, **options)
    return VisionLanguagePipeline.from_package(folder, **options)


def _bytes_under(folder: Path) -> int | None:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


class _SelectionApart:
    """The selection extracted from a vision graph, with its inputs for one image."""

    def __init__(self, session: Session, inputs: Mapping[str, Value], held: Session) -> None:
        self._session = session
        self._inputs = inputs
        self._held = held  # on a GPU, it owns the memory of the inputs

    @classmethod
    def of(
        cls, folder: Path, pipeline: VisionLanguagePipeline, config: RuntimeConfig, preprocessed: PreprocessedImage
    ) -> _SelectionApart | None:
        """Extract the selection; return None if that is impossible."""
        if config.backend != CUT_BACKEND:
            return None
        path = folder / pipeline.manifest.graphs[preprocessed.graph].file
        with tempfile.TemporaryDirectory() as scratch:
            parts = plugin("work").write_parts(path, Path(scratch))
            if parts is None:
                return None
            before, after = (open_file(part, config) for part in parts)
        made = before.run_keeping(preprocessed.feeds, keep=set(before.outputs))
        if pipeline.device != "CPU":
            return cls(after, {name: made[name] for name in after.inputs}, before)
        inputs = {name: made[name].numpy().copy() for name in after.inputs}
        before.close()
        return cls(after, inputs, before)

    def run_ms(self) -> float:
        """Run the selection once; return the milliseconds until its result is on the host."""
        start = time.perf_counter()
        self._session.run_keeping(self._inputs, keep=())
        return (time.perf_counter() - start) * 1000

    def close(self) -> None:
        self._session.close()
        self._held.close()
