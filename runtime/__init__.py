"""Running an exported package, without PyTorch.

::

    from promprune.runtime import VisionLanguagePipeline

    with VisionLanguagePipeline.from_package("llava-0.12") as pipeline:
        result = pipeline.generate("photo.jpg", "What is on the table?")
        print(result.text, result.timings.first_token_ms, result.selection[0].token_indices)
"""

from __future__ import annotations

from promprune.runtime.chat import Chat
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.engine import Engine
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Result, Timings
from promprune.runtime.engine.stream import AnswerStream
from promprune.runtime.images.encoded import EncodedImage, TokenSelection
from promprune.runtime.images.encoder import ImageEncoder
from promprune.runtime.images.overlay import draw_kept_tokens
from promprune.runtime.images.preprocess import load_image
from promprune.runtime.integrations.vllm import image_embeds_part
from promprune.runtime.pipeline import VisionLanguagePipeline
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = [
    "AnswerStream",
    "Chat",
    "EncodedImage",
    "Engine",
    "GenerationConfig",
    "ImageEncoder",
    "Request",
    "Result",
    "RuntimeConfig",
    "Timings",
    "TokenSelection",
    "VisionLanguagePipeline",
    "draw_kept_tokens",
    "image_embeds_part",
    "load_image",
]
