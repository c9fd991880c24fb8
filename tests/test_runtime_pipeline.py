"""The pipeline, against the fake package's model in numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from promprune.errors import BackendError, ConfigError, ImageError, PackageError, PrompruneError, PromptError
from promprune.package.manifest import read_manifest
from promprune.runtime import EncodedImage, ImageEncoder, VisionLanguagePipeline, draw_kept_tokens
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.engine.language_model import copy_features
from promprune.runtime.engine.sampling import TokenChooser
from promprune.runtime.images.encoded import TokenSelection
from tests.support.fake_package import (
    HIDDEN,
    NUM_TOKENS,
    FakeModel,
    make_graph,
    replaced_graph,
    rewrite_manifest,
    write_fake_package,
)


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "package"
    write_fake_package(path)
    return path


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def pipeline(folder: Path) -> Any:
    with VisionLanguagePipeline.from_package(folder) as loaded:
        yield loaded


def expected_answer(pipeline: Any, model: FakeModel, images: list[Image.Image], text: str, count: int) -> list[int]:
    """Work out the greedy answer in numpy."""
    features = [model.encode(pipeline.encoder.processor.preprocessor(image)[0])[0] for image in images]
    ids: list[int] = []
    for token in pipeline.prompts.tokenizer.encode(f"USER: {'<image>' + chr(10)}{text} ASSISTANT:").ids:
        ids += [3] * 4 * len(images) if token == 3 else [token]
    if len(images) != 1:
        ids = pipeline.prompts.build(
            [{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]}],
            [4] * len(images),
        ).tolist()
    return model.greedy(ids, np.concatenate(features) if features else np.zeros((0, HIDDEN)), count)


REQUESTS = [
    ([picture(1)], "What is it?"),
    ([], "héllo 世界"),
    ([picture(2), picture(1)], "a much longer question, this"),
]


@pytest.mark.parametrize(("images", "text"), REQUESTS)
def test_greedy_answers_are_those_of_the_model(pipeline: Any, model: FakeModel, images: Any, text: str) -> None:
    result = pipeline.generate(images, text, max_new_tokens=20)
    assert list(result.token_ids) == expected_answer(pipeline, model, images, text, 20)
    assert result.finish_reason == ("stop" if result.token_ids[-1] == 2 else "length")
    for image, selection in zip(images, result.selection, strict=True):
        np.testing.assert_array_equal(
            selection.token_indices, model.encode(pipeline.encoder.processor.preprocessor(image)[0])[1]
        )
        np.testing.assert_array_equal(selection.saliency_mask, selection.token_indices % 2 == 0)


def test_batch_stream_and_one_by_one_are_equal(pipeline: Any) -> None:
    options = {"max_new_tokens": 30}
    one_by_one = [pipeline.generate(*request, **options) for request in REQUESTS]
    batch = pipeline.generate_batch(REQUESTS, **options)
    streams = [pipeline.stream(*request, **options) for request in REQUESTS]
    pieces = [list(stream) for stream in streams]
    for one, row, stream, texts in zip(one_by_one, batch, streams, pieces, strict=True):
        assert one.token_ids == row.token_ids == stream.result.token_ids
        assert one.text == row.text == stream.result.text == "".join(texts)
        assert one.finish_reason == row.finish_reason == stream.result.finish_reason


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_a_prompt_read_in_chunks_is_answered_alike(folder: Path, pipeline: Any, chunk: int) -> None:
    options = {"max_new_tokens": 30}
    lengths: list[int] = []
    with VisionLanguagePipeline.from_package(folder, prefill_chunk=chunk) as chunked:
        session = chunked.language_model.decoder.session
        run = session.run_keeping
        session.run_keeping = lambda inputs, keep: lengths.append(inputs["inputs_embeds"].shape[1]) or run(inputs, keep)
        for found, expected in zip(
            chunked.generate_batch(REQUESTS, **options), pipeline.generate_batch(REQUESTS, **options), strict=True
        ):
            assert found.token_ids == expected.token_ids
    assert max(lengths) == min(chunk, expected.timings.prompt_tokens)


def test_rows_of_a_batch_that_finish_early_change_nothing(pipeline: Any) -> None:
    alone = [pipeline.generate((), text, max_new_tokens=40).text for text in ("abc", "defgh", "i")]
    stop = (alone[0][5:7], alone[2][1:3])
    expected = [pipeline.generate((), text, max_new_tokens=40, stop=stop) for text in ("abc", "defgh", "i")]
    batch = pipeline.generate_batch([((), text) for text in ("abc", "defgh", "i")], max_new_tokens=40, stop=stop)
    assert [row.token_ids for row in batch] == [row.token_ids for row in expected]
    assert len({len(row.token_ids) for row in batch}) > 1


def test_sampling_is_reproducible_and_batched(pipeline: Any) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 7}
    first = pipeline.generate(*REQUESTS[0], **options)
    assert first.token_ids == pipeline.generate(*REQUESTS[0], **options).token_ids
    assert first.token_ids == pipeline.generate_batch(REQUESTS, **options)[0].token_ids
    assert first.token_ids != pipeline.generate(*REQUESTS[0], **{**options, "seed": 8}).token_ids


def test_a_conversation_equals_reading_everything_again(pipeline: Any) -> None:
    chat = pipeline.chat(system="be brief")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
    images: list[Image.Image] = []
    turns = [("What is it?", [picture(1)]), ("And now?", []), ("Compare", [picture(2), picture(3)]), ("Thanks", [])]
    for text, added in turns:
        images += added
        messages.append(
            {"role": "user", "content": [*[{"type": "image"}] * len(added), {"type": "text", "text": text}]}
        )
        answer = chat.ask(text, added, max_new_tokens=6)
        assert answer.token_ids == pipeline.generate(images, messages, max_new_tokens=6).token_ids
        assert len(answer.selection) == len(images)
        messages.append({"role": "assistant", "content": answer.text.strip()})
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 4]
    assert answer.timings.reused_tokens > 20
    assert answer.timings.encoded_images == 0


def test_an_abandoned_turn_leaves_the_conversation_as_it_was(pipeline: Any) -> None:
    chat = pipeline.chat()
    chat.ask("first", picture(1), max_new_tokens=5)
    before = list(chat.messages)
    stream = chat.stream("abandoned", picture(2), max_new_tokens=5)
    next(stream)
    stream.close()
    with pytest.raises(BackendError, match="not finished"):
        _ = stream.result
    with pytest.raises(ImageError):
        chat.ask("no such image", "missing.png")
    assert chat.messages == before
    again = chat.ask("abandoned", picture(3), max_new_tokens=5)
    fresh = pipeline.chat()
    fresh.ask("first", picture(1), max_new_tokens=5)
    expected = fresh.ask("abandoned", picture(3), max_new_tokens=5)
    assert again.token_ids == expected.token_ids
    assert again.timings.reused_tokens == expected.timings.reused_tokens  # nothing of the other picture's


def test_a_conversation_goes_on_after_the_placeholder_was_said(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "an <image>, </s>"
    chat = pipeline.chat()
    with monkeypatch.context() as patch:
        spelt = iter([token for piece in said for token in pipeline.prompts.tokenizer.encode(piece).ids])
        patch.setattr(TokenChooser, "choose", lambda *_: next(spelt, 2))
        assert chat.ask("What is it?", picture(1)).text == said
    again = chat.ask("And now?", picture(2), max_new_tokens=6)
    expected = pipeline.generate([picture(1), picture(2)], chat.messages[:-1], max_new_tokens=6)
    assert again.token_ids == expected.token_ids
    assert again.timings.reused_tokens > 20
    chat.ask("Thanks", max_new_tokens=6)
    assert len(chat.messages) == 6


def test_encoded_images_are_reused(pipeline: Any) -> None:
    fresh = pipeline.generate(picture(5), "What?", max_new_tokens=5)
    again = pipeline.generate(np.asarray(picture(5)), "What?", max_new_tokens=5)
    encoded = pipeline.encode_image(picture(5))
    third = pipeline.generate(encoded, "What?", max_new_tokens=5)
    assert fresh.token_ids == again.token_ids == third.token_ids
    assert [r.timings.encoded_images for r in (fresh, again, third)] == [1, 0, 0]
    assert encoded.image_features.shape == (4, HIDDEN)
    with pytest.raises(ValueError, match="read-only"):
        encoded.image_features[0, 0] = 1


def test_the_image_cache_is_bounded_and_can_be_switched_off(folder: Path) -> None:
    with VisionLanguagePipeline.from_package(folder, image_cache_size=2) as pipeline:
        ran = [pipeline.generate(picture(n), "?", max_new_tokens=1).timings.encoded_images for n in (1, 2, 1, 3, 1, 2)]
        assert ran == [1, 1, 0, 1, 0, 1]
    with VisionLanguagePipeline.from_package(folder, image_cache_size=0) as pipeline:
        ran = [pipeline.generate(picture(1), "?", max_new_tokens=1).timings.encoded_images for _ in range(2)]
        assert ran == [1, 1]


def test_an_encoded_image_of_another_package_is_refused(pipeline: Any) -> None:
    other = pipeline.encode_image(picture(1))
    wrong = EncodedImage(other.image_features[:3], other.selection)
    with pytest.raises(ConfigError, match=r"\[3, 16\].*\[4, 16\]"):
        pipeline.generate(wrong, "What?")


def test_the_vision_half_alone(folder: Path, pipeline: Any) -> None:
    with ImageEncoder.from_package(folder) as encoder:
        alone = encoder.encode_image(picture(1))
    whole = pipeline.encode_image(picture(1))
    np.testing.assert_array_equal(alone.image_features, whole.image_features)
    np.testing.assert_array_equal(alone.selection.token_indices, whole.selection.token_indices)
    assert pipeline.generate(alone, "x", max_new_tokens=3).token_ids == (
        pipeline.generate(picture(1), "x", max_new_tokens=3).token_ids
    )
    with pytest.raises(BackendError, match="closed"):
        encoder.encode_image(picture(2))


def test_threads_share_a_pipeline(pipeline: Any) -> None:
    expected = [pipeline.generate(picture(n), f"question {n}", max_new_tokens=15).token_ids for n in range(6)]
    found: dict[int, Any] = {}

    def work(n: int) -> None:
        found[n] = pipeline.generate(picture(n), f"question {n}", max_new_tokens=15).token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(6)] == expected


def test_timings_and_json(pipeline: Any) -> None:
    result = pipeline.generate(picture(1), "What?", max_new_tokens=10)
    timings = result.timings
    stages = ("preprocess_ms", "prompt_ms", "vision_ms", "splice_ms", "prefill_ms", "decode_ms")
    assert all(getattr(timings, stage) > 0 for stage in stages)
    assert timings.first_token_ms <= timings.total_ms
    assert timings.new_tokens == len(result.token_ids)
    held = timings.prompt_tokens + timings.new_tokens - 1
    assert timings.kv_cache_bytes == held * pipeline.cache_bytes_per_token == held * 2 * HIDDEN * 4
    written = json.loads(json.dumps(result.to_dict()))
    assert written["timings"]["prompt_tokens"] == timings.prompt_tokens
    assert written["selection"][0]["token_indices"] == result.selection[0].token_indices.tolist()


def test_a_package_without_selection_keeps_everything(tmp_path: Path) -> None:
    model = write_fake_package(tmp_path / "full", FakeModel(keep_tokens=NUM_TOKENS))
    with VisionLanguagePipeline.from_package(tmp_path / "full") as pipeline:
        result = pipeline.generate(picture(1), "What?", max_new_tokens=5)
        assert list(result.token_ids) == expected_full(pipeline, model)
        (selection,) = result.selection
        assert not selection.ran
        assert selection.token_indices.tolist() == list(range(NUM_TOKENS))
        assert result.to_dict()["selection"][0]["spectral_entropy"] is None
        crop = pipeline.encoder.view(picture(1))
        assert draw_kept_tokens(crop, selection).width == 896


def expected_full(pipeline: Any, model: FakeModel) -> list[int]:
    prompt = pipeline.prompts.build(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], [NUM_TOKENS]
    )
    assert (prompt == 3).sum() == NUM_TOKENS
    return model.greedy(prompt.tolist(), model.encode(pipeline.encoder.processor.preprocessor(picture(1))[0])[0], 5)


# Contexts


def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "forward", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(ImageEncoder, "encode", lambda *_: pytest.fail("it ran"))
    with pytest.raises(PromptError, match=r"322 tokens long.*at most 256"):
        pipeline.generate(picture(1), "x" * 300)
    with pytest.raises(PromptError, match=r"max_new_tokens is 240.*at most 256.*233 are left"):
        pipeline.generate(picture(1), "x", max_new_tokens=240)


def test_answers_end_where_the_context_does(pipeline: Any) -> None:
    result = pipeline.generate((), "x" * 220)
    assert result.finish_reason == "length" or result.token_ids[-1] == 2
    assert result.timings.prompt_tokens + result.timings.new_tokens <= 256
    both = pipeline.generate_batch([((), "x" * 220), ((), "x")])
    assert both[0].token_ids == result.token_ids


def test_a_conversation_that_outgrows_the_context_says_so(pipeline: Any) -> None:
    chat = pipeline.chat()
    chat.ask("x" * 180, max_new_tokens=8)
    with pytest.raises(PromptError, match="at most 256"):
        chat.ask("y" * 60, max_new_tokens=8)
    assert len(chat.messages) == 2


# Refusals


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"stop": [""]},
        {"stop": [3]},
        {"seed": -1},
    ],
)
def test_wrong_options_are_refused(pipeline: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        pipeline.generate((), "x", **options)


def test_unknown_options_are_refused(pipeline: Any) -> None:
    with pytest.raises(ConfigError, match="max_tokens = 3; expected an option named one of max_new_tokens, temp"):
        pipeline.generate((), "x", max_tokens=3)
    with pytest.raises(ConfigError, match="threads = 3; expected an option named one of backend, provider"):
        VisionLanguagePipeline.from_package("no package", threads=3)


@pytest.mark.parametrize(
    "options",
    [{"provider": "tpu"}, {"num_threads": 0}, {"image_cache_size": -1}, {"prefill_chunk": 0}, {"num_threads": True}],
)
def test_wrong_loading_options_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        VisionLanguagePipeline.from_package(folder, **options)


def test_a_closed_pipeline_says_so(folder: Path) -> None:
    with VisionLanguagePipeline.from_package(folder) as pipeline:
        pass
    with pytest.raises(BackendError, match="closed"):
        pipeline.generate((), "x")


def test_it_is_usable_after_an_interrupt(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipeline.generate(picture(1), "x", max_new_tokens=5).token_ids
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate(picture(1), "x")
    assert pipeline.generate(picture(1), "x", max_new_tokens=5).token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("an <image> in the text", "stands for an image"),
        ([], "expected a text, or a list"),
        (7, "expected a text, or a list"),
        ([{"role": "user"}], "content"),
        ([{"content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "type"),
        ([{"role": "user", "content": "no image part"}], "0 image placeholders for 1 images"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "2 image placeholders for 1"),
        ("lone surrogate \ud800", "Unicode"),
    ],
)
def test_malformed_prompts_are_refused(pipeline: Any, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        pipeline.generate(picture(1), prompt)


def replace_graph(folder: Path, name: str, graph: onnx.ModelProto) -> None:
    manifest = read_manifest(folder)
    onnx.save(graph, folder / "onnx" / f"{name}.onnx")
    rewrite_manifest(folder, manifest, graphs=replaced_graph(manifest, name, graph))


def spoiled_vision(**spoiled: str) -> onnx.ModelProto:
    """A vision graph that returns constants, some of them spoiled."""
    good = {
        "image_features": np.zeros((1, 4, HIDDEN), np.float32),
        "token_indices": np.arange(4)[None],
        "saliency_mask": np.array([[True, False, True, False]]),
        "saliency_count": np.array([[2]]),
        "spectral_entropy": np.array([[0.5]], np.float32),
    }
    bad = {
        "image_features": np.full((1, 4, HIDDEN), np.nan, np.float32),
        "token_indices": np.array([[0, 1, 1, 2]]),
        "saliency_count": np.array([[3]]),
        "spectral_entropy": np.array([[np.inf]], np.float32),
    }
    constants = {f"c_{name}": (bad if name in spoiled else good)[name] for name in good}
    dtypes = {name: str(value.dtype) for name, value in good.items()}
    shapes = {name: ["batch_size", *value.shape[1:]] for name, value in good.items()}
    return make_graph(
        {"pixel_values": ("float32", ["batch_size", 3, 32, 32])},
        {name: (dtypes[name], shapes[name]) for name in good},
        constants,
        *[("Identity", f"c_{name}", name) for name in good],
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("image_features", "not finite"),
        ("spectral_entropy", "not finite"),
        ("token_indices", "3 distinct tokens"),
        ("saliency_count", "count of 3"),
    ],
)
def test_what_the_vision_graph_returns_is_checked(tmp_path: Path, output: str, message: str) -> None:
    write_fake_package(tmp_path / "p")
    replace_graph(tmp_path / "p", "vision_encoder", spoiled_vision(**{output: ""}))
    with (
        VisionLanguagePipeline.from_package(tmp_path / "p") as pipeline,
        pytest.raises(BackendError, match=message),
    ):
        pipeline.generate(picture(1), "x")


def test_logits_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = FakeModel()
    model.weights["head"][:] = np.nan
    write_fake_package(tmp_path / "p", model)
    with (
        VisionLanguagePipeline.from_package(tmp_path / "p") as pipeline,
        pytest.raises(BackendError, match="logits that are not finite"),
    ):
        pipeline.generate((), "x")


def test_graphs_are_compared_with_the_manifest(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "p")
    manifest = read_manifest(tmp_path / "p")
    vision = manifest.graphs["vision_encoder"]
    features = msgspec.structs.replace(vision.outputs[0], shape=("batch_size", 5, HIDDEN))
    graph = msgspec.structs.replace(vision, outputs=(features, *vision.outputs[1:]))
    rewrite_manifest(tmp_path / "p", manifest, graphs={**manifest.graphs, "vision_encoder": graph})
    with pytest.raises(
        PackageError, match=r"image_features: float32\[batch_size, 4, 16\].*float32\[batch_size, 5, 16\]"
    ):
        VisionLanguagePipeline.from_package(tmp_path / "p")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer"),
        ("generation_config.json", "[1]", "JSON object"),
        ("chat_template.jinja", "{% for %}", "chat template"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("preprocessor_config.json", '{"size": 5}', "224 x 224"),
        ("onnx/embed_tokens.onnx", "no graph", "cannot be loaded"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_fake_package(tmp_path / "p")
    manifest = read_manifest(tmp_path / "p")
    (tmp_path / "p" / file).write_text(content)
    rewrite_manifest(tmp_path / "p", manifest)
    with pytest.raises(PrompruneError, match=message) as caught:
        VisionLanguagePipeline.from_package(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_another_placeholder_is_refused(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "p")
    manifest = read_manifest(tmp_path / "p")
    image = msgspec.structs.replace(manifest.image, token_id=9)
    rewrite_manifest(tmp_path / "p", manifest, image=image)
    with pytest.raises(PackageError, match=r"id 3.*expected 9"):
        VisionLanguagePipeline.from_package(tmp_path / "p")


def test_nothing_of_a_package_is_read_after_loading(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "p")
    with VisionLanguagePipeline.from_package(tmp_path / "p") as pipeline:
        shutil.rmtree(tmp_path / "p")
        assert pipeline.generate(picture(1), "What?", max_new_tokens=2).token_ids


def test_another_vision_half_is_refused_with_its_tokenizer(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "p")
    (tmp_path / "p" / "tokenizer.json").write_text("{}")
    rewrite_manifest(tmp_path / "p", read_manifest(folder))
    with pytest.raises(PackageError, match="tokenizer"):
        pipeline.with_vision_of(tmp_path / "p")


# The picture of kept tokens


def test_kept_tokens_are_framed_and_the_rest_is_dimmed(pipeline: Any) -> None:
    white = Image.new("RGB", (32, 32), "white")
    selection = pipeline.encode_image(picture(1)).selection
    drawn = np.asarray(draw_kept_tokens(white, selection))
    side = 896 // 4
    for token in range(NUM_TOKENS):
        row, column = divmod(token, 4)
        patch = drawn[row * side : (row + 1) * side, column * side : (column + 1) * side]
        kept = token in selection.token_indices
        assert (patch[side // 2, side // 2].min() > 250) == kept
        colour = (255, 140, 0) if token % 2 == 0 else (0, 190, 255)
        assert (tuple(patch[1, 1]) == colour) == kept


def test_the_picture_wants_what_the_model_sees(pipeline: Any) -> None:
    selection = pipeline.encode_image(picture(1)).selection
    with pytest.raises(ImageError, match=r"50 x 40.*32 x 32"):
        draw_kept_tokens(picture(1), selection)
    crop = pipeline.encoder.view(picture(1))
    assert draw_kept_tokens(crop, selection).size[0] == 896


def test_the_runtime_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from promprune.runtime import VisionLanguagePipeline as P; import promprune.runtime.commands.run\n"
        f"P.from_package({str(folder)!r}).generate((), 'x', max_new_tokens=2)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'promprune.export', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_features_go_to_the_places_of_their_image_stretch_by_stretch() -> None:
    """Worked by hand: two images of 4 and 3 tokens; the first is in two parts, and its first two tokens are cached."""
    features = [np.zeros((4, 2)), np.zeros((3, 2))]
    images = [EncodedImage(array, TokenSelection((), np.arange(len(array)))) for array in features]
    places = np.array([-2, -1, 0, 3, 4, 5, 6])
    rows = list(copy_features(images, places, begin=10))
    assert [(part.start, part.count, part.at) for part in rows] == [(2, 1, 10), (3, 1, 13), (0, 3, 14)]
    assert [part.source is features[0] for part in rows] == [True, True, False]
    assert list(copy_features([], np.zeros(0, np.int64), begin=0)) == []
