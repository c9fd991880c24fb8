"""Worker of peers.py: ONNX Runtime GenAI."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import onnxruntime_genai
from serve import OnToken, serve


def main(folder: str, threads: str) -> None:
    onnxruntime_genai.disable_telemetry_events()
    config = onnxruntime_genai.Config(folder)
    options = {"intra_op_num_threads": int(threads)}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)

    def answer(prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + new_tokens
        # The smallest length keeps it from ending early.
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, past_present_share_buffer=True, batch_size=1
        )
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(new_tokens):
            generator.generate_next_token()
            on_token(int(generator.get_next_tokens()[0]))

    serve(
        {
            "version": version("onnxruntime-genai"),
            "onnxruntime": version("onnxruntime"),
            "threads": int(threads),
            "kv": "fp32, shared buffer",
        },
        answer,
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
