"""Qwen2.5-VL from checkpoint to answer: packages against transformers, with all tokens and with kept tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from promprune.errors import ConfigError, PackageError, UnsupportedModelError
from promprune.export import ExportResult, export_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig
from promprune.export.families.qwen2_5_vl import Qwen25VL
from promprune.export.verify.samples import check_samples
from promprune.export.verify.verification import verify_package
from promprune.package.image import GridLayout
from promprune.package.manifest import read_manifest
from promprune.package.package import Package
from promprune.runtime import EncodedImage, ImageEncoder, VisionLanguagePipeline
from promprune.runtime.images.overlay import draw_kept_tokens
from tests.support.fake_package import rewrite_manifest
from tests.support.qwen import NEW_TOKENS, Reference, Request
from tests.support.shared import Shared
from tests.support.tiny_models import save_tiny_qwen, tiny_qwen2_5_vl

GRIDS = ((6, 6), (4, 7))
TOKEN_PIXELS = 28


def picture(grid: int, seed: int = 0) -> Image.Image:
    """Noise in the exact size of a grid, so that neither side resizes it."""
    rows, columns = GRIDS[grid]
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (rows * TOKEN_PIXELS // 4, columns * TOKEN_PIXELS // 4, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(pixels, np.ones((4, 4, 1), np.uint8)))


REQUESTS: dict[str, list[Request]] = {
    "one prompt": [([picture(0)], "What is this?")],
    "three prompts": [
        ([picture(1)], "Which colour has the thing on the left?"),
        ([], "Hello."),
        ([picture(0, 1)], "Why?"),
    ],
    "several images": [([picture(0), picture(1), picture(0, 2)], "Compare them.")],
}


@pytest.fixture(scope="module")
def reference(tiny_qwen: Path) -> Reference:
    return Reference(tiny_qwen)


def exported(tiny_qwen: Path, folder: Path, **options: Any) -> ExportResult:
    return export_package(ExportConfig(model=str(tiny_qwen), image_grids=GRIDS, output=folder, **options))


@pytest.fixture(scope="module")
def whole(tiny_qwen: Path, shared: Shared) -> VisionLanguagePipeline:
    """The unpruned baseline."""
    package = shared.export("tiny-qwen-whole", tiny_qwen, image_grids=GRIDS, ratio=1.0, verify=False)
    return VisionLanguagePipeline.from_package(package.output)


@pytest.fixture(scope="module")
def pruned(tiny_qwen_export: ExportResult) -> VisionLanguagePipeline:
    return VisionLanguagePipeline.from_package(tiny_qwen_export.output)


def first_logits(
    pipeline: VisionLanguagePipeline, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """The logits after the prompts, [batch, vocabulary]."""
    forward, seen = pipeline.language_model.decoder.forward, []

    def recording(*args: Any) -> Any:
        output = forward(*args)
        seen.append(output[0])
        return output

    monkeypatch.setattr(pipeline.language_model.decoder, "forward", recording)
    pipeline.generate_batch(requests, max_new_tokens=1)
    monkeypatch.undo()
    return seen[0]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


def check_logits(
    pipeline: VisionLanguagePipeline,
    wanted: Callable[[Request], np.ndarray],
    requests: list[Request],
    limit: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = first_logits(pipeline, requests, monkeypatch)
    for row, request in zip(logits, requests, strict=True):
        assert relative_error(row, wanted(request)) < limit


@pytest.mark.parametrize("case", REQUESTS)
def test_whole_images_are_read_as_transformers_reads_them(
    whole: VisionLanguagePipeline, reference: Reference, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = REQUESTS[case]
    check_logits(whole, reference.logits, requests, 1e-4, monkeypatch)
    results = whole.generate_batch(requests, max_new_tokens=NEW_TOKENS)
    for result, request in zip(results, requests, strict=True):
        assert list(result.token_ids) == reference.answer(**reference.prompt(request).inputs)


@pytest.mark.parametrize("case", REQUESTS)
def test_kept_tokens_keep_their_positions(
    pruned: VisionLanguagePipeline, reference: Reference, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to transformers with the tokens that the float64 method keeps, at their positions in the full image."""
    requests = REQUESTS[case]
    check_logits(pruned, reference.pruned_logits, requests, 1e-4, monkeypatch)
    results = pruned.generate_batch(requests, max_new_tokens=NEW_TOKENS)
    for result, request in zip(results, requests, strict=True):
        inputs, chosen = reference.pruned(reference.prompt(request))
        assert [sorted(image.token_indices.tolist()) for image in result.selection] == chosen
        assert list(result.token_ids) == reference.answer(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16"])
def test_half_precision_reads_the_same(
    tiny_qwen: Path, reference: Reference, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported(tiny_qwen, tmp_path / "whole", ratio=1.0, dtype=dtype)
    pruned = exported(tiny_qwen, tmp_path / "pruned", dtype=dtype)
    for result, wanted in ((whole, reference.logits), (pruned, reference.pruned_logits)):
        with VisionLanguagePipeline.from_package(result.output) as pipeline:
            for requests in REQUESTS.values():
                check_logits(pipeline, wanted, requests, 5e-2, monkeypatch)


@pytest.mark.slow
def test_bf16_is_verified(tiny_qwen: Path, tmp_path: Path) -> None:
    """Computed in fp32 with the weights in bf16; unpruned and pruned, both grids."""
    for ratio in (1.0, 0.12):
        result = exported(tiny_qwen, tmp_path / f"{ratio}", ratio=ratio, dtype="bf16")
        verification = result.manifest.verification
        assert verification is not None
        assert verification.passed
        assert {"image features, relative error", "decode logits, relative error"} <= {
            c.name for c in verification.checks
        }


def test_an_out_of_core_verification_runs_every_vision_graph(tiny_qwen: Path, tmp_path: Path) -> None:
    """bf16 is always verified out of core, on two images unless there are more grids; the third graph is wrong here."""
    config = ExportConfig(
        model=str(tiny_qwen),
        image_grids=((2, 2), (2, 3), (3, 2)),
        dtype="bf16",
        vision_only=True,
        verify=False,
        output=tmp_path / "package",
    )
    package, source = export_package(config), load_checkpoint(str(tiny_qwen))
    record = verify_package(package.package, source)
    assert record.passed
    assert "more than 3 images" in record.not_verified
    weights = package.output / "onnx/vision_encoder_3x2.onnx_data"
    values = np.random.default_rng(0).standard_normal(weights.stat().st_size // 2).astype(ml_dtypes.bfloat16)
    weights.write_bytes(values.tobytes())
    record = verify_package(package.package, source)
    assert "image features, relative error" in {check.name for check in record.checks if not check.passed}


def test_a_vision_graph_that_no_image_is_for_is_noticed(
    tiny_qwen: Path, tiny_qwen_export: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could happen for a family whose sample sizes do not cover all of its graphs."""
    monkeypatch.setattr(
        "promprune.export.verify.verification.check_samples", lambda count, *, sizes: check_samples(2, sizes=sizes[:1])
    )
    record = verify_package(tiny_qwen_export.package, load_checkpoint(str(tiny_qwen)))
    (check,) = (check for check in record.checks if check.name == "vision graphs without an image")
    assert (check.passed, check.detail) == (False, "vision_encoder_4x7")


@pytest.mark.parametrize("axes", [[1, 0, 2], [0, 2, 1]], ids=["time and rows", "rows and columns"])
def test_exchanged_axes_are_noticed_without_an_answer(
    axes: list[int], tiny_qwen: Path, tiny_qwen_export: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If memory is short, only the logits of a text can detect swapped axes."""
    monkeypatch.setattr("promprune.export.verify.verification.available_memory", lambda: 0)
    package = Path(shutil.copytree(tiny_qwen_export.output, tmp_path / "package"))
    path = package / "onnx/decoder_model_merged.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["exchanged" if name == "position_ids" else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes), "axes"))
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["position_ids", "axes"], ["exchanged"]))
    path.write_bytes(model.SerializeToString())
    record = verify_package(Package(package, tiny_qwen_export.manifest), load_checkpoint(str(tiny_qwen)))
    failed = {check.name for check in record.checks if not check.passed and not check.advisory}
    assert failed == {"prefill logits, relative error", "decode logits, relative error"}


def test_the_generation_config_of_a_model_does_not_fail_it(tmp_path: Path) -> None:
    """The published Qwen2.5-VL has a repetition penalty; the runtime is greedy unless it is told otherwise."""
    model = tiny_qwen2_5_vl()
    model.generation_config.update(repetition_penalty=1.05, no_repeat_ngram_size=2, suppress_tokens=[10, 11, 12])
    checkpoint = save_tiny_qwen(tmp_path / "checkpoint", model)
    package = export_package(ExportConfig(model=str(checkpoint), image_grids=((4, 7),), output=tmp_path / "package"))
    assert package.manifest.verification is not None
    answers = [c for c in package.manifest.verification.checks if c.name == "greedy answers equal to torch's"]
    assert [check.measured for check in answers] == [1.0]
    own = json.loads((package.output / "generation_config.json").read_text())
    assert own["repetition_penalty"] == 1.05


def test_the_positions_matter(
    whole: VisionLanguagePipeline, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With consecutive positions, as in other families, the same tokens give other logits."""
    monkeypatch.setattr(whole.language_model, "_positions", lambda prompts, begin: None)
    logits = first_logits(whole, REQUESTS["one prompt"], monkeypatch)
    wanted = reference.logits(REQUESTS["one prompt"][0])
    assert relative_error(logits[0], wanted) > 1e-2


def test_a_conversation_goes_on_where_it_was(pruned: VisionLanguagePipeline) -> None:
    """Turns with images of both grids and without images: earlier tokens need no prefill, and keep their positions."""
    turns: list[Request] = [([picture(0)], "What is this?"), ([picture(1)], "And this?"), ([], "Which is larger?")]
    chat, images, messages, read = pruned.chat(), [], [], 0
    for added, text in turns:
        images += added
        content = [{"type": "image"}] * len(added) + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        result = chat.ask(text, added, max_new_tokens=NEW_TOKENS)
        fresh = pruned.generate(images, messages, max_new_tokens=NEW_TOKENS)
        assert result.token_ids == fresh.token_ids
        assert result.timings.reused_tokens >= read
        read = result.timings.prompt_tokens
        messages.append(chat.messages[-1])
    assert result.timings.reused_tokens > 0


def test_chunks_and_streams_change_no_answer(tiny_qwen_export: ExportResult, pruned: VisionLanguagePipeline) -> None:
    requests = REQUESTS["three prompts"] + REQUESTS["several images"]
    wanted = [result.token_ids for result in pruned.generate_batch(requests, max_new_tokens=NEW_TOKENS)]
    with VisionLanguagePipeline.from_package(tiny_qwen_export.output, prefill_chunk=5) as chunked:
        assert [r.token_ids for r in chunked.generate_batch(requests, max_new_tokens=NEW_TOKENS)] == wanted
    for (images, prompt), tokens in zip(requests, wanted, strict=True):
        stream = pruned.stream(images, prompt, max_new_tokens=NEW_TOKENS)
        assert "".join(stream) == stream.result.text
        assert stream.result.token_ids == tokens


def test_an_image_takes_the_grid_that_distorts_it_least(
    tiny_qwen_export: ExportResult, pruned: VisionLanguagePipeline
) -> None:
    assert list(tiny_qwen_export.manifest.graphs)[:2] == ["vision_encoder", "vision_encoder_4x7"]
    for size, (rows, columns) in (((300, 290), GRIDS[0]), ((90, 50), GRIDS[1]), ((1000, 20), GRIDS[1])):
        image = Image.new("RGB", size, (90, 120, 30))
        encoded = pruned.encode_image(image)
        grid = encoded.selection.grids[0]
        assert (grid.rows, grid.columns) == (rows, columns)
        assert encoded.selection.keep_tokens == round(0.12 * rows * columns) == len(encoded.image_features)
        assert encoded.positions is not None
        assert encoded.positions.extent == max(rows, columns)
        assert (encoded.positions.offsets[1] * columns + encoded.positions.offsets[2]).tolist() == (
            encoded.selection.token_indices.tolist()
        )
        view = pruned.encoder.view(image)
        assert view.size == (columns * TOKEN_PIXELS, rows * TOKEN_PIXELS)
        assert draw_kept_tokens(view, encoded.selection).width >= 896


def test_an_encoded_image_can_be_used_again(pruned: VisionLanguagePipeline) -> None:
    encoded = pruned.encode_image(picture(1))
    fresh, again = (pruned.generate([image], "Why?", max_new_tokens=4) for image in (picture(1), encoded))
    assert again.token_ids == fresh.token_ids
    assert again.timings.encoded_images == 0
    with pytest.raises(ConfigError, match="without rotary positions"):
        pruned.generate([EncodedImage(encoded.image_features, encoded.selection)], "Why?")


def test_a_package_whose_grid_has_no_graph_is_refused(tiny_qwen_export: ExportResult, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny_qwen_export.output, tmp_path / "package"))
    manifest = read_manifest(package)
    assert isinstance(manifest.image.layout, GridLayout)
    graphs = {name: graph for name, graph in manifest.graphs.items() if name != "vision_encoder_4x7"}
    rewrite_manifest(package, manifest, graphs=graphs)
    with pytest.raises(PackageError, match="no graph 'vision_encoder_4x7'"):
        ImageEncoder.from_package(package)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (((9, 9),), "received the image grid 9x9, 81 tokens; expected 4 to 64 tokens"),
        (((1, 3),), "3 tokens; expected 4 to 64"),
        (((1, 300),), "grid 1x300; expected an aspect ratio of at most 200"),
    ],
)
def test_a_grid_that_the_image_processor_never_makes_is_refused(
    tiny_qwen: Path, tmp_path: Path, grids: Any, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        export_package(ExportConfig(model=str(tiny_qwen), image_grids=grids, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tower_that_never_looks_at_the_whole_image_is_refused(tmp_path: Path) -> None:
    model = tiny_qwen2_5_vl(fullatt_block_indexes=[7, 15, 23, 31])
    checkpoint = save_tiny_qwen(tmp_path / "checkpoint", model)
    with pytest.raises(UnsupportedModelError, match=r"= \[7, 15, 23, 31\] in a tower of 3; expected"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))


def test_grids_share_the_weights_of_the_tower(tiny_qwen_export: ExportResult) -> None:
    """Each graph has the constants of its grid for itself."""
    first, second = (tiny_qwen_export.manifest.graphs[name] for name in ("vision_encoder", "vision_encoder_4x7"))
    assert first.weights == ("onnx/vision_encoder.onnx_data",)
    assert set(second.weights) >= set(first.weights)
    sizes = {file.path: file.size_bytes for file in tiny_qwen_export.manifest.files}
    own = sum(sizes[name] for name in second.weights if name not in first.weights)
    assert own < sizes["onnx/vision_encoder.onnx_data"] / 5


def test_grids_are_for_families_that_take_them(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--image-grid for a model of the family 'llava'"):
        export_package(ExportConfig(model=str(tiny_llava), image_grids=((4, 4),), output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="each grid once"):
        ExportConfig(image_grids=((4, 4), (4, 4)))
    with pytest.raises(ConfigError, match="at least 1"):
        ExportConfig(image_grids=((0, 4),))


@pytest.mark.parametrize(
    ("shortest_edge", "longest_edge", "side"), [(3136, 12845056, 24), (3136, 50176, 8), (1_000_000, 12845056, 36)]
)
def test_the_grid_of_a_model_is_one_that_its_image_processor_makes(
    shortest_edge: int, longest_edge: int, side: int
) -> None:
    """The first limits are those of the published Qwen2.5-VL."""
    size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(size=size))
    assert Qwen25VL(tiny_qwen2_5_vl(), processor).grids == ((side, side),)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    model = tiny_qwen2_5_vl()
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    model.config.text_config.use_sliding_window = True
    model.config.text_config.sliding_window = 16
    with pytest.raises(UnsupportedModelError, match="sliding window of 16 tokens"):
        export_package(ExportConfig(model=str(save_tiny_qwen(tmp_path / "m", model)), output=tmp_path / "out"))


def test_qwen2_vl_answers_as_transformers(tiny_qwen2_export: ExportResult) -> None:
    """Its export was verified: features, saliency, kept sets, logits, and answers at the positions of the image."""
    verification = tiny_qwen2_export.manifest.verification
    assert verification is not None
    assert verification.passed
    answers = [check for check in verification.checks if check.name == "greedy answers equal to torch's"]
    assert [check.measured for check in answers] == [1.0]
    assert tiny_qwen2_export.manifest.family == "qwen2_vl"
    (saliency,) = (check for check in verification.checks if check.name == "saliency, relative error")
    assert saliency.detail == "against the exported module, not transformers"


def test_rotary_frequencies_keep_their_precision_in_half(tiny_qwen: Path) -> None:
    """In a model that transformers loads in fp16, an error of 2**-11 of a frequency is a full turn at far positions."""
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_qwen, dtype=torch.float16)
    converted = load_checkpoint(str(tiny_qwen), dtype=torch.float16).meta_model
    wanted = dict(loaded.named_buffers())
    assert any("rotary" in name for name in wanted)
    for name, buffer in converted.named_buffers():
        assert buffer.dtype == wanted[name].dtype, name
        assert torch.equal(buffer, wanted[name]), name
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float16}
