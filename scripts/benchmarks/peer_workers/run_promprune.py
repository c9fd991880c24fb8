"""Worker of peers.py: a package of promprune, through the engine that all its commands use."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from serve import OnToken, serve

from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.engine.request import Request


def main(package: str, threads: str) -> None:
    pipeline = VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=int(threads))
    template = pipeline.request((), "Hello", ignore_eos=True)

    def answer(prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        request = Request(
            prompt_ids=np.array(prompt, np.int64),
            is_image=np.zeros(len(prompt), np.bool_),
            images=(),
            config=template.config,
            tokenizer=template.tokenizer,
            eos_token_ids=(),
            max_new_tokens=new_tokens,
        )
        engine = pipeline.engine()
        engine.add(request)
        while engine.has_requests:
            engine.step()
            on_token(request.token_ids[-1])

    lowered = "seqlens_k" in pipeline.language_model.decoder.session.inputs
    serve({"version": onnxruntime.__version__, "threads": int(threads), "lowered": lowered, "kv": "fp32"}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:3])
