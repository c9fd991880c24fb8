"""Granite Vision: LLaVA-NeXT with SigLIP, the features of several layers, and a Granite, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from promprune.runtime import VisionLanguagePipeline
from tests.support.crops import CropsReference, assert_all_ways_agree, assert_close, picture, prefill
from tests.support.hugging_face import PHOTOGRAPHS

pytestmark = pytest.mark.slow  # little differs from LLaVA-NeXT and LLaVA-OneVision

SIZES = [(112, 112), (64, 48), (200, 150), (33, 200), (640, 480)]
BATCH = [
    ([picture((120, 40))], "What is it?"),
    ([picture((64, 64), 1), picture((30, 90), 2)], "Which of the two is larger, the first or the second?"),
    ([], "No image"),
]


class Reference(CropsReference):
    """Several images of a LLaVA-NeXT are each divided into crops."""

    def inputs(self, images: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        if not images:
            return {"input_ids": self.ids(question, [])}
        values = self.image_processor(images=images, return_tensors="pt")
        counts = [len(features) for features in self.model.get_image_features(**values).pooler_output]
        return {"input_ids": self.ids(question, counts), **values}

    def kept(self, image: Image.Image, *, alone: bool) -> torch.Tensor:
        return super().kept(image, alone=True)


@pytest.fixture(scope="module")
def reference(tiny_granite: Path) -> Reference:
    return Reference(tiny_granite)


@pytest.fixture(scope="module")
def pruned(granite_export: ExportResult) -> Any:
    with VisionLanguagePipeline.from_package(granite_export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


def test_pruned_inputs_and_logits_are_those_of_the_chosen_tokens(pruned: Any, reference: Reference) -> None:
    images = [*(picture(size) for size in SIZES), *(Image.open(path).convert("RGB") for path in PHOTOGRAPHS)]
    for image in images:
        embeds, _, logits = prefill(pruned, [([image], "What is it?")])
        expected, expected_logits = reference.pruned([image], "What is it?")
        assert_close(embeds[0], expected, "fp32")
        assert_close(logits[0], expected_logits, "fp32")


def test_batches_streams_chats_and_several_images(pruned: Any, reference: Reference) -> None:
    assert_all_ways_agree(pruned, reference, BATCH)
    chat = pruned.chat()
    chat.ask("What is it?", BATCH[0][0], max_new_tokens=4)
    again = chat.ask("And why?", max_new_tokens=4)
    assert again.token_ids == pruned.generate(BATCH[0][0], chat.messages[:-1], max_new_tokens=4).token_ids


@torch.no_grad()
def test_with_nothing_removed_everything_is_transformers(
    tiny_granite: Path, reference: Reference, tmp_path: Path
) -> None:
    export_package(ExportConfig(model=str(tiny_granite), ratio=1.0, output=tmp_path / "full"))
    with VisionLanguagePipeline.from_package(tmp_path / "full", provider="cpu", num_threads=1) as full:
        for request in [*BATCH, *(([picture(size)], "What is it?") for size in SIZES)]:
            embeds, _, logits = prefill(full, [request])
            expected, expected_logits = reference.whole(*request)
            assert_close(embeds[0], expected, "fp32")
            assert_close(logits[0], expected_logits, "fp32")
            inputs = reference.inputs(*request)
            answer = reference.model.generate(**inputs, max_new_tokens=32, do_sample=False)
            result = full.generate(*request, max_new_tokens=32)
            assert list(result.token_ids) == answer[0, inputs["input_ids"].shape[1] :].tolist()
