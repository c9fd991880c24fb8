"""Answers of exported packages against Hugging Face ``generate``, fed with the same kept tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from promprune.errors import ModelError
from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from promprune.runtime import VisionLanguagePipeline
from tests.support.hugging_face import PHOTOGRAPHS, QUESTIONS, Reference, messages_of


@pytest.fixture(scope="module")
def reference(tiny_llava: Path) -> Reference:
    return Reference(tiny_llava)


@pytest.fixture(scope="module", params=["pruned", "unpruned", "pruned, in chunks"])
def pipeline(request: pytest.FixtureRequest, tiny_export: ExportResult, tiny_full_export: ExportResult) -> Any:
    export = tiny_full_export if request.param == "unpruned" else tiny_export
    chunk = 5 if request.param.endswith("chunks") else None
    with VisionLanguagePipeline.from_package(
        export.output, provider="cpu", num_threads=1, prefill_chunk=chunk
    ) as loaded:
        yield loaded


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("images", [PHOTOGRAPHS[:1], PHOTOGRAPHS[1:], []], ids=["one", "two", "none"])
def test_greedy_tokens_are_equal(pipeline: Any, reference: Reference, images: list[Path], question: str) -> None:
    result = pipeline.generate(list(images), question, max_new_tokens=24)
    kept = [selection.token_indices for selection in result.selection]
    expected = reference.generate(images, messages_of(question, len(images)), kept, max_new_tokens=24)
    assert list(result.token_ids) == expected
    assert result.text == reference.processor.decode(expected, skip_special_tokens=True)


def test_batch_stream_chat_and_one_by_one_are_equal(pipeline: Any) -> None:
    requests = [([path], question) for path, question in zip(PHOTOGRAPHS, QUESTIONS, strict=True)]
    requests += [(PHOTOGRAPHS[:2], "Which is larger?"), ([], "No image")]
    one_by_one = [pipeline.generate(*request, max_new_tokens=20).token_ids for request in requests]
    assert [row.token_ids for row in pipeline.generate_batch(requests, max_new_tokens=20)] == one_by_one
    assert [pipeline.stream(*request, max_new_tokens=20).result.token_ids for request in requests] == one_by_one
    assert [pipeline.chat().ask(text, images, max_new_tokens=20).token_ids for images, text in requests] == one_by_one


def test_a_conversation_equals_hugging_face(pipeline: Any, reference: Reference) -> None:
    chat = pipeline.chat()
    for number, images in enumerate([PHOTOGRAPHS[:1], [], PHOTOGRAPHS[1:2]]):
        result = chat.ask(QUESTIONS[number][:12], list(images), max_new_tokens=8)
        kept = [selection.token_indices for selection in result.selection]
        asked = [dict(message) for message in chat.messages[:-1]]
        seen = PHOTOGRAPHS[: 1 + (number == 2)]
        assert list(result.token_ids) == reference.generate(seen, asked, kept, max_new_tokens=8)
    assert result.timings.reused_tokens > 20


@torch.no_grad()
def test_encoded_images_serve_a_hugging_face_model(pipeline: Any, reference: Reference) -> None:
    """The way for those who run the language model elsewhere."""
    encoded = pipeline.encode_image(PHOTOGRAPHS[0])
    ids = torch.tensor(pipeline.prompts.build(messages_of("What is this?", 1), [len(encoded.image_features)]))[None]
    embeds = reference.model.get_input_embeddings()(ids)
    embeds[ids == 3] = torch.tensor(encoded.image_features)
    answer = reference.model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    expected = pipeline.generate(encoded, "What is this?", max_new_tokens=12)
    assert answer[0].tolist() == list(expected.token_ids)


def test_several_ends_of_sequence(pipeline: Any, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    free = pipeline.generate(PHOTOGRAPHS[0], "What?", max_new_tokens=16).token_ids
    ends = [free[5], free[9], 2]
    monkeypatch.setattr(pipeline, "_eos_token_ids", frozenset(ends))
    result = pipeline.generate(PHOTOGRAPHS[0], "What?", max_new_tokens=16)
    kept = [selection.token_indices for selection in result.selection]
    options = {"max_new_tokens": 16, "eos_token_id": ends}
    assert list(result.token_ids) == reference.generate(PHOTOGRAPHS[:1], messages_of("What?", 1), kept, **options)
    assert result.finish_reason == "stop"


def test_added_tokens_with_embeddings_of_their_own(tiny_llava: Path, tmp_path: Path) -> None:
    """Tokens added to a tokenizer, with the embeddings resized and padded, as fine-tuned checkpoints have them."""
    checkpoint = tmp_path / "checkpoint"
    processor = AutoProcessor.from_pretrained(tiny_llava)
    processor.tokenizer.add_tokens(["<left>", "colourful"])
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(embeddings.weight[260:], std=0.5)
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    result = export_package(ExportConfig(model=str(checkpoint), ratio=0.25, output=tmp_path / "out", verify=False))
    question = "Is the <left> one colourful?"
    reference = Reference(checkpoint)
    with VisionLanguagePipeline.from_package(result.output, provider="cpu", num_threads=1) as pipeline:
        answer = pipeline.generate([PHOTOGRAPHS[0]], question, max_new_tokens=24)
        ids = pipeline.prompts.build(messages_of(question, 1), [4])
    assert {260, 261} <= set(ids.tolist())
    kept = [selection.token_indices for selection in answer.selection]
    expected = reference.generate(PHOTOGRAPHS[:1], messages_of(question, 1), kept, max_new_tokens=24)
    assert list(answer.token_ids) == expected
    assert answer.text == reference.processor.decode(expected, skip_special_tokens=True)


def test_added_tokens_without_embeddings_are_refused(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    processor = AutoProcessor.from_pretrained(tiny_llava)
    processor.tokenizer.add_tokens(["<left>", "<right>"])
    processor.save_pretrained(checkpoint)
    with pytest.raises(
        ModelError, match=r"has 2 tokens that its model lacks, such as '<left>' \(id 260\).*ids below 260.*resize"
    ):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
