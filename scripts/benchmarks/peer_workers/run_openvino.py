"""Worker of peers.py: OpenVINO GenAI, without prefix caching, which would skip the prefill of a repeated prompt."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import openvino
import openvino_genai
from serve import OnToken, serve


class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Passes the tokens on."""

    def __init__(self, on_token: OnToken) -> None:
        super().__init__()
        self._on_token = on_token

    def write(self, token: Any) -> Any:
        for number in token if isinstance(token, list) else [token]:
            self._on_token(number)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None: ...


def open_pipeline(folder: str, settings: dict[str, Any], runtime: str) -> Any:
    """Open a pipeline with paged attention, its default, or with one stateful graph."""
    if runtime.endswith("-stateful"):
        return openvino_genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", **settings)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    return openvino_genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **settings)


def main(folder: str, threads: str, dtype: str, runtime: str) -> None:
    settings = {"INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32"}
    if dtype == "fp32":
        settings["KV_CACHE_PRECISION"] = "f32"  # the default is u8
    pipeline = open_pipeline(folder, settings, runtime)

    def answer(prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        config.apply_chat_template = False
        pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config, Streamer(on_token))

    serve({"version": openvino_genai.__version__, **settings}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:5])
