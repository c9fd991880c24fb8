"""Running an exported package, without PyTorch.

::

    from promprune.runtime import VisionLanguagePipeline

    with VisionLanguagePipeline.from_package("llava-0.12") as pipeline:
        result = pipeline.generate("photo.jpg", "What is on the table?")
        print(result.text, result.timings.first_token_ms, result.selection[0].token_indices)
"""

from __future__ import annotations

from promprune.runtime.config import GenerationConfig, RuntimeConfig
from promprune.runtime.encoder import ImageEncoder
from promprune.runtime.handoff import image_embeds_part
from promprune.runtime.overlay import draw_kept_tokens
from promprune.runtime.pipeline import AnswerStream, Chat, VisionLanguagePipeline
from promprune.runtime.preprocess import load_image
from promprune.runtime.results import EncodedImage, Result, Timings, TokenSelection

__all__ = [
    "AnswerStream",
    "Chat",
    "EncodedImage",
    "GenerationConfig",
    "ImageEncoder",
    "Result",
    "RuntimeConfig",
    "Timings",
    "TokenSelection",
    "VisionLanguagePipeline",
    "draw_kept_tokens",
    "image_embeds_part",
    "load_image",
]
