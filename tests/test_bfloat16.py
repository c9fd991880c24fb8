"""Packages in bfloat16: the CPU lacks operators for them, so here the graphs compute in fp32 between bfloat16 edges."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from promprune.errors import BackendError
from promprune.export import ExportResult
from promprune.package.manifest import GraphRecord, TensorRecord, read_manifest
from promprune.runtime import VisionLanguagePipeline, image_embeds_part
from promprune.runtime.sessions import open_file
from promprune.runtime.sessions.config import RuntimeConfig
from tests.support.fake_package import rewrite_manifest

PICTURE = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 40).convert("RGB")
QUESTION = "What is this?"


def is_edge(name: str) -> bool:
    """Whether a tensor of a graph is in the package's dtype: all but pixels, logits, and the selection's report."""
    return name in ("image_features", "inputs_embeds") or name.startswith(("past_key_values", "present"))


def narrow(path: Path) -> None:
    """Give a graph in fp32 the edges that it would have in bf16."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    casts = []
    for value in graph.input:
        if is_edge(value.name):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
            rename_uses(graph, value.name)
            casts.append(helper.make_node("Cast", [value.name], [wide(value.name)], to=TensorProto.FLOAT))
    after = []
    for value in graph.output:
        if is_edge(value.name):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
            for node in graph.node:
                node.output[:] = [wide(name) if name == value.name else name for name in node.output]
            rename_uses(graph, value.name)
            after.append(helper.make_node("Cast", [wide(value.name)], [value.name], to=TensorProto.BFLOAT16))
    nodes = [*casts, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def rename_uses(graph: onnx.GraphProto, name: str) -> None:
    for node in graph.node:
        node.input[:] = [wide(used) if used == name else used for used in node.input]


def wide(name: str) -> str:
    return f"{name}_fp32"


def narrowed(tensors: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
    return tuple(msgspec.structs.replace(t, dtype="bfloat16") if is_edge(t.name) else t for t in tensors)


def bfloat16_edges(package: Path, folder: Path) -> Path:
    """Copy a package in fp32 and give its graphs bfloat16 edges."""
    copy = Path(shutil.copytree(package, folder / "package"))
    manifest = read_manifest(copy)
    graphs: dict[str, GraphRecord] = {}
    for name, graph in manifest.graphs.items():
        narrow(copy / graph.file)
        graphs[name] = msgspec.structs.replace(graph, inputs=narrowed(graph.inputs), outputs=narrowed(graph.outputs))
    rewrite_manifest(copy, manifest, graphs=graphs)
    return copy


@pytest.fixture(scope="module")
def edged(embedded_export: ExportResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bfloat16_edges(embedded_export.output, tmp_path_factory.mktemp("bfloat16"))


@pytest.fixture(params=[None, 7], ids=["whole", "in chunks"])
def pipeline(edged: Path, request: pytest.FixtureRequest) -> Any:
    with VisionLanguagePipeline.from_package(
        edged, provider="cpu", num_threads=1, prefill_chunk=request.param
    ) as loaded:
        yield loaded


def test_tensors_of_a_session_are_bfloat16(edged: Path) -> None:
    with open_file(edged / "onnx/embed_tokens.onnx", RuntimeConfig(provider="cpu")) as session:
        outputs = session.run({"input_ids": np.array([[1, 5]])})["inputs_embeds"]
        kept = session.run_keeping({"input_ids": np.array([[1, 5]])}, keep=["inputs_embeds"])["inputs_embeds"]
    assert outputs.dtype.name == kept.dtype == "bfloat16"
    np.testing.assert_array_equal(kept.numpy(), outputs)
    assert kept.nbytes == outputs.nbytes == 2 * outputs.size


def test_answers_are_those_of_fp32(pipeline: VisionLanguagePipeline, embedded_export: ExportResult) -> None:
    """The embedded model's answers are clear enough that the rounding at the edges does not change them."""
    scene = Path(__file__).parent.parent / "docs/images/scene.png"
    questions = ["What colour is the large 2?", "How many blue objects are there?", "Where is the star?"]
    with VisionLanguagePipeline.from_package(embedded_export.output, provider="cpu", num_threads=1) as fp32:
        wanted = [fp32.generate(scene, question).text for question in questions]
    assert [pipeline.generate(scene, question).text for question in questions] == wanted


def test_batch_stream_and_chat_are_equal(pipeline: VisionLanguagePipeline) -> None:
    requests = [(PICTURE, QUESTION), (PICTURE.rotate(90), "Is there a red circle?")]
    one_by_one = [pipeline.generate(*request, max_new_tokens=6).token_ids for request in requests]
    assert [row.token_ids for row in pipeline.generate_batch(requests, max_new_tokens=6)] == one_by_one
    assert pipeline.stream(*requests[0], max_new_tokens=6).result.token_ids == one_by_one[0]
    chat = pipeline.chat()
    assert chat.ask(QUESTION, PICTURE, max_new_tokens=6).token_ids == one_by_one[0]
    assert chat.ask("Why?", max_new_tokens=2).timings.reused_tokens > 20


def test_features_for_a_language_model_elsewhere(pipeline: VisionLanguagePipeline) -> None:
    encoded = pipeline.encode_image(PICTURE)
    content = base64.b64decode(image_embeds_part(encoded)["image_embeds"])
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), encoded.image_features.astype(np.float32))


def test_features_that_are_no_numbers_are_noticed(pipeline: VisionLanguagePipeline) -> None:
    image = pipeline.encoder.preprocess(PICTURE)
    outputs = pipeline.encoder.sessions[image.graph].run(image.feeds)  # type: ignore[union-attr]
    outputs["image_features"] = np.full_like(outputs["image_features"], np.inf)
    with pytest.raises(BackendError, match="not finite numbers"):
        pipeline.encoder.processor.postprocess(outputs, image)  # type: ignore[arg-type]


def test_a_package_in_bf16_has_these_edges(tiny_bf16_export: ExportResult) -> None:
    """And computes in bfloat16 in between, which the CPU refuses in one line that says what to do."""
    manifest = tiny_bf16_export.manifest
    tensors = {t.name: t.dtype for graph in manifest.graphs.values() for t in (*graph.inputs, *graph.outputs)}
    for name, dtype in tensors.items():
        assert (dtype == "bfloat16") == is_edge(name), name
    with pytest.raises(BackendError, match="use a GPU for it, or export with --dtype fp32"):
        VisionLanguagePipeline.from_package(tiny_bf16_export.output, provider="cpu")
