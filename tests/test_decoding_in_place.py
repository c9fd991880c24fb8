"""Decode steps in place: all steps have one shape, and spare capacity of the KV cache is masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promprune.export import ExportResult
from promprune.export.families import FAMILIES
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.engine import cache as module
from promprune.runtime.engine.cache import KVCache
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.engine.loading import steps_in_place
from promprune.runtime.sessions import Session, open_file
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import OnnxRuntimeSession
from tests.support.fake_package import HIDDEN, FakeModel, write_fake_package

EXPORTS = {
    "llava": "tiny_export",
    "llava_next": "next_export",
    "llava_onevision": "onevision_export",
    "qwen2_5_vl": "tiny_qwen_export",
    "qwen2_vl": "tiny_qwen2_export",
    "embedded": "embedded_export",
}


@pytest.fixture
def session(tmp_path: Path) -> Any:
    write_fake_package(tmp_path / "package")
    with open_file(tmp_path / "package" / "onnx" / "decoder_model_merged.onnx", RuntimeConfig()) as session:
        yield session


@pytest.fixture(autouse=True)
def small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CAPACITY_STEP", 16)


def lengths_of(session: Session) -> list[int]:
    """Note the length of the mask of every run."""
    lengths: list[int] = []
    session.on_run = lambda inputs: lengths.append(inputs["attention_mask"].shape[1])
    return lengths


def test_all_families_are_known() -> None:
    assert EXPORTS.keys() == {*FAMILIES, "embedded"}


@pytest.mark.parametrize("model", EXPORTS)
def test_logits_are_those_of_a_cache_that_grows(model: str, request: pytest.FixtureRequest) -> None:
    """Prompts of two lengths, steps beyond the capacity, and a prompt that continues; keys and values as well."""
    export: ExportResult = request.getfixturevalue(EXPORTS[model])
    random = np.random.default_rng(0)
    path = export.output / "onnx" / "decoder_model_merged.onnx"
    with open_file(path, RuntimeConfig(provider="cpu")) as session:
        plain, fixed = Decoder(session), Decoder(session, in_place=True)
        expected_cache, cache = plain.caches.empty(2), fixed.caches.empty(2)
        lengths = lengths_of(session)
        for count in (9, *[1] * 10, 4, 1):
            embeds = random.normal(scale=0.05, size=(2, count, plain.hidden_size)).astype(plain.embeds_dtype)
            mask = np.ones((2, count), np.int64)
            mask[1, :3] = int(count != 9)  # the second prompt is shorter
            expected, expected_cache = plain.forward(embeds, expected_cache, mask)
            logits, cache = fixed.forward(embeds, cache, mask)
            np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_array_equal(cache.mask, expected_cache.mask)
    assert lengths[3::2] == [17] * 7 + [33] * 3 + [23, 33]
    for name, tensor in expected_cache.tensors.items():
        wanted, found = tensor.numpy(), np.asarray(cache.tensors[name])[:, :, : cache.length]  # type: ignore[union-attr]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("model", EXPORTS)
def test_answers_are_the_same(model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch, and a conversation that returns to an earlier state."""
    export: ExportResult = request.getfixturevalue(EXPORTS[model])
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 40, 3), np.uint8))
    answers = []
    for in_place in (False, True):
        monkeypatch.setattr(OnnxRuntimeSession, "repeats", in_place)
        with VisionLanguagePipeline.from_package(
            export.output, provider="cpu", num_threads=1, lowered=False
        ) as pipeline:
            lengths = lengths_of(pipeline.sessions["decoder_model_merged"])
            requests = [(image, "what is it?"), ((), "a"), ((), "bcd")]
            batch = pipeline.generate_batch(requests, max_new_tokens=24, ignore_eos=True)
            chat = pipeline.chat()
            turns = [chat.ask("what is it?", image, max_new_tokens=5)]
            turns += [chat.ask("and?", max_new_tokens=20, ignore_eos=True)]
            answers.append([result.token_ids for result in (*batch, *turns)])
        assert (len(set(lengths)) < len(lengths) / 2) == in_place
    assert answers[0] == answers[1]


def test_rows_of_a_batch_that_finish_early_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_package(tmp_path / "package")
    prompts = ("abc", "defgh", "i")
    with VisionLanguagePipeline.from_package(tmp_path / "package") as plain:
        alone = [plain.generate((), text, max_new_tokens=40).text for text in prompts]
        stop = (alone[0][5:7], alone[2][1:3])
        expected = [plain.generate((), text, max_new_tokens=40, stop=stop).token_ids for text in prompts]
    monkeypatch.setattr(OnnxRuntimeSession, "repeats", True)
    with VisionLanguagePipeline.from_package(tmp_path / "package") as pipeline:
        batch = pipeline.generate_batch([((), text) for text in prompts], max_new_tokens=40, stop=stop)
    assert [row.token_ids for row in batch] == expected
    assert len({len(ids) for ids in expected}) > 1


def step(random: np.random.Generator) -> np.ndarray:
    return random.normal(size=(1, 1, HIDDEN)).astype(np.float32)


def test_caches_that_share_their_capacity_are_never_overwritten(session: Session) -> None:
    """Two continuations of one cache, and one of its beginning, compared with the model in numpy."""
    random, model, decoder = np.random.default_rng(2), FakeModel(), Decoder(session, in_place=True)

    def read(embeds: np.ndarray, cache: KVCache, told: list[np.ndarray]) -> tuple[KVCache, list[np.ndarray]]:
        told = [*told, *embeds[0]]
        logits, cache = decoder.forward(embeds, cache)
        np.testing.assert_allclose(logits[0], model.logits(np.array(told)), rtol=1e-4, atol=1e-4)
        return cache, told

    trunk, told = read(random.normal(size=(1, 5, HIDDEN)).astype(np.float32), decoder.caches.empty(1), [])
    trunk, told = read(step(random), trunk, told)
    left, right, short = (trunk, told), (trunk, told), (trunk.truncate(4), told[:4])
    for _ in range(4):
        left, right, short = read(step(random), *left), read(step(random), *right), read(step(random), *short)
    assert len({id(cache.tensors["past_key_values.0.key"]) for cache, _ in (left, right, short)}) == 3
    assert left[0].tensors["past_key_values.0.key"] is trunk.tensors["past_key_values.0.key"]  # written in place


def test_a_step_that_fails_leaves_the_cache_as_it_was(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    random, decoder = np.random.default_rng(3), Decoder(session, in_place=True)
    _, cache = decoder.forward(step(random), decoder.caches.empty(1))
    _, cache = decoder.forward(step(random), cache)
    new = step(random)
    expected, _ = Decoder(session).forward(new, cache)
    with monkeypatch.context() as patch:
        patch.setattr(session, "_run", lambda inputs, keep: pytest.fail("no more memory"))
        with pytest.raises(pytest.fail.Exception):
            decoder.forward(new, cache)
    np.testing.assert_allclose(decoder.forward(new, cache)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_capacity_ends_at_the_limit_of_the_engine(session: Session) -> None:
    """The last positions have no spare capacity after them, and run with growing tensors."""
    session.limits = {"past_sequence_length": 20}
    random, lengths = np.random.default_rng(4), lengths_of(session)
    plain, fixed = Decoder(session), Decoder(session, in_place=True)
    expected_cache, cache = plain.caches.empty(1), fixed.caches.empty(1)
    for _ in range(21):
        new = step(random)
        expected, expected_cache = plain.forward(new, expected_cache)
        logits, cache = fixed.forward(new, cache)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert lengths[1::2] == [17] * 16 + [21] * 5


@pytest.mark.parametrize(
    ("text", "in_place"),
    [
        ({}, True),
        ({"sliding_window": None}, True),
        ({"sliding_window": 4096}, False),
        ({"sliding_window": 4096, "use_sliding_window": False}, True),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, True),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, False),
    ],
)
def test_a_sliding_window_would_count_the_free_places(
    session: Session, tmp_path: Path, text: dict[str, Any], in_place: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert not steps_in_place(tmp_path, session)
    session.repeats = True
    assert steps_in_place(tmp_path, session) == in_place
    assert any("its attention has a sliding window" in note for note in session.notes) != in_place
