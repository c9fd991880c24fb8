"""Several packages with one language model in one process, and answers of a requested length."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from promprune.errors import PackageError
from promprune.export import ExportResult
from promprune.package.manifest import DECODER, read_manifest
from promprune.runtime import VisionLanguagePipeline
from tests.support.fake_package import EOS, HIDDEN, FakeModel, replaced_graph, rewrite_manifest, write_fake_package
from tests.support.tiny_models import save_tiny_llava

VISION = "onnx/vision_encoder.onnx"
PICTURE = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 40).convert("RGB")


def test_another_ratio_shares_the_language_model(tiny_export: ExportResult, tiny_full_export: ExportResult) -> None:
    with VisionLanguagePipeline.from_package(tiny_full_export.output, provider="cpu") as full:
        shared = full.with_vision_of(tiny_export.output, provider="cpu")
        assert shared.manifest == tiny_export.manifest
        got = shared.generate(PICTURE, "What is this?", max_new_tokens=8)
        with VisionLanguagePipeline.from_package(tiny_export.output, provider="cpu") as alone:
            assert got.token_ids == alone.generate(PICTURE, "What is this?", max_new_tokens=8).token_ids
        assert (
            got.timings.prompt_tokens < full.generate(PICTURE, "What is this?", max_new_tokens=1).timings.prompt_tokens
        )


def test_another_language_model_is_refused(tiny_full_export: ExportResult, tmp_path: Path) -> None:
    write_fake_package(tmp_path / "other")
    with (
        VisionLanguagePipeline.from_package(tiny_full_export.output, provider="cpu") as pipeline,
        pytest.raises(PackageError, match="another language model; expected the same files"),
    ):
        pipeline.with_vision_of(tmp_path / "other", provider="cpu")


def test_other_linked_weights_are_another_language_model(
    tiny_linked_export: ExportResult, tiny_llava: Path, tmp_path: Path
) -> None:
    """Weights that a package shares with its checkpoint are in files that are not named after the graphs."""
    (weights,) = tiny_linked_export.manifest.graphs[DECODER].weights
    package = Path(shutil.copytree(tiny_linked_export.output, tmp_path / "other"))
    save_tiny_llava(tmp_path / "checkpoint", seed=1)
    (package / weights).unlink()
    shutil.copy(tmp_path / "checkpoint/model.safetensors", package / weights)
    rewrite_manifest(package, tiny_linked_export.manifest)
    with (
        VisionLanguagePipeline.from_package(tiny_linked_export.output, provider="cpu") as pipeline,
        pytest.raises(PackageError, match="another language model"),
    ):
        pipeline.with_vision_of(package, provider="cpu")


def replace_vision(package: Path, model: onnx.ModelProto) -> None:
    """Give a package another vision graph, and say so in its manifest."""
    manifest = read_manifest(package)
    onnx.save(model, package / VISION)
    graphs = replaced_graph(manifest, "vision_encoder", model)
    rewrite_manifest(package, manifest, graphs=graphs)


def test_visual_tokens_of_another_size_are_refused(tmp_path: Path) -> None:
    """They would be read as other rows, for example as twice as many of half the size."""
    package = tmp_path / "package"
    write_fake_package(package)
    model = onnx.load(package / VISION)
    node = next(node for node in model.graph.node if "image_features" in node.output)
    node.output[0] = "half"
    model.graph.node.append(helper.make_node("Concat", ["half", "half"], ["image_features"], axis=2))
    output = next(value for value in model.graph.output if value.name == "image_features")
    output.type.tensor_type.shape.dim[2].dim_value = 2 * HIDDEN
    replace_vision(package, model)
    with pytest.raises(PackageError, match=f"size of the visual tokens of .*: {2 * HIDDEN}; expected {HIDDEN};"):
        VisionLanguagePipeline.from_package(package, provider="cpu")


def test_a_manifest_whose_visual_tokens_have_no_size_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "package"
    write_fake_package(package)
    manifest = read_manifest(package)
    vision = manifest.graphs["vision_encoder"]
    outputs = tuple(msgspec.structs.replace(tensor, shape=()) for tensor in vision.outputs)
    graphs = {**manifest.graphs, "vision_encoder": msgspec.structs.replace(vision, outputs=outputs)}
    rewrite_manifest(package, manifest, graphs=graphs)
    with pytest.raises(PackageError, match=f"size of the visual tokens of vision_encoder: None; expected {HIDDEN};"):
        VisionLanguagePipeline.from_package(package, provider="cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("saliency_count", "int64", ["batch_size"]), ("token_indices", "float32", ["batch_size", 4])],
)
def test_a_report_of_another_form_is_refused(tmp_path: Path, name: str, dtype: str, shape: list[Any]) -> None:
    package = tmp_path / "package"
    write_fake_package(package)
    model = onnx.load(package / VISION)
    node = next(node for node in model.graph.node if name in node.output)
    node.output[:] = [f"{name}_raw" if made == name else made for made in node.output]
    for user in model.graph.node:
        user.input[:] = [f"{name}_raw" if used == name else used for used in user.input]
    if dtype == "float32":
        model.graph.node.append(helper.make_node("Cast", [f"{name}_raw"], [name], to=TensorProto.FLOAT))
    else:
        model.graph.node.append(helper.make_node("Squeeze", [f"{name}_raw", "one"], [name]))
    index = next(i for i, value in enumerate(model.graph.output) if value.name == name)
    elements = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    model.graph.output[index].CopyFrom(helper.make_tensor_value_info(name, elements[dtype], shape))
    replace_vision(package, model)
    with pytest.raises(PackageError, match=f"{name}: .*; expected"):
        VisionLanguagePipeline.from_package(package, provider="cpu")


def test_the_end_of_sequence_can_be_ignored(tmp_path: Path) -> None:
    for seed in range(60):  # until a model says it early
        folder = tmp_path / str(seed)
        write_fake_package(folder, FakeModel(seed=seed))
        with VisionLanguagePipeline.from_package(folder, provider="cpu") as pipeline:
            stopped = pipeline.generate(PICTURE, "What?", max_new_tokens=12)
            if stopped.finish_reason == "length":
                continue
            whole = pipeline.generate(PICTURE, "What?", max_new_tokens=12, ignore_eos=True)
            assert stopped.token_ids[-1] == EOS
            assert len(whole.token_ids) == 12
            assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
            assert whole.finish_reason == "length"
            return
    pytest.fail("no model ended its answer")
