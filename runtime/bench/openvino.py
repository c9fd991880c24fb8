"""OpenVINO GenAI as a contender: its own runtime, with CDPruner if it supports the model.

Needs ``openvino-genai`` and a model that optimum-intel converted; see docs/benchmarks.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from promprune.errors import BackendError
from promprune.runtime.bench.contenders import Facts, Measurable, Question, Sample
from promprune.runtime.images.preprocess import load_image

__all__ = ["OpenVinoContender", "OpenVinoModel"]


class OpenVinoModel:
    """A loaded model, shared by the contenders that run it.

    Args:
        folder: folder written by optimum-intel.
        dtype: dtype of the computation, ``"fp32"``, ``"fp16"`` or ``"bf16"``; OpenVINO's default would be bf16 if the
            CPU supports it.
        threads: number of CPU threads.

    Raises:
        BackendError: the folder is not a converted model.
    """

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self.folder, self.dtype = folder, dtype
        self.openvino, self.genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # otherwise, a repeated image would cost almost nothing
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": dtype.replace("fp", "f")}
        try:
            self.pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", scheduler_config=scheduler, **settings)
        except RuntimeError as error:
            last = (str(error).strip().splitlines() or ["no reason given"])[-1]
            raise BackendError(
                f"{folder} cannot be loaded by OpenVINO GenAI ({last[:200]})",
                expected="a folder written by optimum-cli export openvino, with its tokenizers",
            ) from error


class OpenVinoContender(Measurable):
    """One pruning ratio of a model in OpenVINO GenAI.

    ``vision`` is its reported time for the embeddings: preprocessing, encoder, pruning and splice together.
    """

    concurrent = False
    batched = False  # with several prompts it silently does not prune

    def __init__(self, name: str, shared: OpenVinoModel, num_tokens: int, removed_percent: int) -> None:
        self.name = name
        self._shared = shared
        self._num_tokens = num_tokens
        self._removed_percent = removed_percent
        self._prompt_tokens = 0

    def run(self, question: Question, batch: int) -> Sample:
        """Answer; see :class:`Measurable`."""
        genai, start = self._shared.genai, time.perf_counter()
        image = self._shared.openvino.Tensor(np.array(load_image(question.image))[None])
        prepared = time.perf_counter()
        config = genai.GenerationConfig()
        config.max_new_tokens = question.new_tokens
        config.ignore_eos = True
        config.pruning_ratio = self._removed_percent
        tokens, times = [], []

        class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, token: Any) -> Any:
                times.append(time.perf_counter())
                tokens.extend(token if isinstance(token, list) else [token])
                return genai.StreamingStatus.RUNNING

            def end(self) -> None: ...

        answer = self._shared.pipeline.generate(
            question.prompt, images=[image], generation_config=config, streamer=Streamer()
        )
        end = time.perf_counter()
        metrics = answer.perf_metrics
        self._prompt_tokens = metrics.get_num_input_tokens()
        stages = {
            "preprocess": (prepared - start) * 1000,
            "vision": metrics.get_prepare_embeddings_duration().mean,
            "first_token": (times[0] - start) * 1000,
            "total": (end - start) * 1000,
        }
        if question.new_tokens > 1:
            stages["decode"] = (times[-1] - times[0]) * 1000 / (question.new_tokens - 1)
        return Sample(stages_ms=stages, token_ids=tuple(tokens))

    def facts(self, question: Question) -> Facts:
        """Return facts; ``prompt_tokens`` is the number that it reports."""
        folder, n = self._shared.folder, self._num_tokens
        return Facts(
            name=self.name,
            kind="peer",
            path=str(folder),
            model=folder.name,
            dtype=self._shared.dtype,
            device="CPU",
            num_tokens=n,
            keep_tokens=max(1, n * (100 - self._removed_percent) // 100),
            policy="cdpruner" if self._removed_percent else "all",
            prompt_tokens=self._prompt_tokens,
        )

    def close(self) -> None:
        """Do nothing: the model is freed with its last contender."""
