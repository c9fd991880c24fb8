"""The decoder lowered for ONNX Runtime: it computes what the portable one does, and is refused once it is stale."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from promprune.embedded.scenes import TEST_SEEDS, render_scene
from promprune.errors import PackageError, UnsupportedModelError
from promprune.export import ExportResult, export_package
from promprune.export.commands.build import main as build_main
from promprune.export.config import ExportConfig
from promprune.export.lower import onnxruntime as lowering
from promprune.export.lower.build import lower_package
from promprune.package.lowered import LOWERED_FILE, lowered_folder, read_lowered
from promprune.package.manifest import DECODER
from promprune.package.package import read_package
from promprune.runtime import VisionLanguagePipeline
from tests.support.command_line import run

VERSION = "1.31.0"


@pytest.fixture
def package(tiny_export: ExportResult, tmp_path: Path) -> Path:
    """A copy of the tiny package, to be changed."""
    return Path(shutil.copytree(tiny_export.output, tmp_path / "package"))


@pytest.mark.parametrize(
    "family",
    [
        "tiny_export",
        "siglip_export",
        "next_export",
        "onevision_export",
        pytest.param("granite_export", marks=pytest.mark.slow),
        "tiny_qwen_export",
        "tiny_qwen2_export",
        "embedded_export",
    ],
)
def test_every_family_is_lowered_at_the_end_of_an_export(family: str, request: pytest.FixtureRequest) -> None:
    result: ExportResult = request.getfixturevalue(family)
    assert result.not_lowered == ""
    lowered = read_lowered(result.package, tool_version=VERSION)
    assert lowered is not None
    assert [check.name for check in lowered.checks] == [
        "lowered decoder: prefill",
        "lowered decoder: decode",
        "lowered decoder: continue",
    ]
    assert all(check.measured < 1e-5 for check in lowered.checks)
    graph = ir.load(result.output / lowered.graph.file).graph
    kinds = Counter(node.op_type for node in graph)
    layers = sum(name.startswith("past_key_values.") for name in (str(value.name) for value in graph.inputs)) // 2
    assert kinds["GroupQueryAttention"] == layers
    assert kinds["RotaryEmbedding"] == kinds["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert not kinds.keys() & {"Softmax", "Expand", "GatherND", "Pow"} - ({"Expand"} if "qwen" in family else set())


def test_its_weights_are_those_of_the_package(tiny_export: ExportResult) -> None:
    lowered = read_lowered(tiny_export.package, tool_version=VERSION)
    assert lowered is not None
    assert lowered.graph.weights == tiny_export.manifest.graphs[DECODER].weights
    assert {path.name for path in lowered_folder(tiny_export.output).iterdir()} == {LOWERED_FILE, f"{DECODER}.onnx"}
    listed = {record.path for record in tiny_export.manifest.files}
    assert not any(path.startswith("engines/") for path in listed)


def test_sliding_windows_are_lowered(mistral_export: ExportResult) -> None:
    result = mistral_export
    lowered = read_lowered(result.package, tool_version=VERSION)
    assert lowered is not None
    nodes = [node for node in ir.load(result.output / lowered.graph.file).graph if "Attention" in node.op_type]
    assert all(node.attributes["local_window_size"].as_int() == 24 for node in nodes)
    assert all(check.measured < 1e-5 for check in lowered.checks)


@pytest.fixture
def opset_23_export(tiny_llava: Path, tmp_path: Path) -> ExportResult:
    return export_package(
        ExportConfig(model=str(tiny_llava), output=tmp_path / "out", ratio=0.25, verify=False, opset=23)
    )


@pytest.mark.parametrize(
    ("package", "reason"), [("tiny_fp16_export", ""), ("tiny_bf16_export", "bf16"), ("opset_23_export", "")]
)
def test_other_forms_are_lowered_or_left_with_a_reason(
    package: str, reason: str, request: pytest.FixtureRequest
) -> None:
    result: ExportResult = request.getfixturevalue(package)
    assert reason in result.not_lowered
    assert bool(reason) == bool(result.not_lowered)
    assert lowered_folder(result.output).exists() == (not reason)


def test_what_the_operator_cannot_compute_is_refused(
    tiny_export: ExportResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_export.output / tiny_export.manifest.graphs[DECODER].file
    other_mask = ir.load(file)
    next(node for node in other_mask.graph if node.op_type == "LessOrEqual").op_type = "Less"
    with pytest.raises(UnsupportedModelError, match="has the comparisons Less"):
        lowering.lower_decoder(other_mask)
    other_scale = ir.load(file)
    next(node for node in other_scale.graph if node.op_type == "Softmax").op_type = "Tanh"
    with pytest.raises(UnsupportedModelError, match="in an unsupported way"):
        lowering.lower_decoder(other_scale)
    monkeypatch.setattr(lowering, "_HEAD_MULTIPLE", 7)
    with pytest.raises(UnsupportedModelError, match="head size of 8"):
        lowering.lower_decoder(ir.load(file))


def test_a_stale_one_is_refused_with_the_reason(package: Path) -> None:
    read, file = read_package(package), lowered_folder(package) / LOWERED_FILE
    whole = json.loads(file.read_text())
    for key, value, reason in (
        ("recipe", 99, "lowers in another way"),
        ("decoder", "0" * 64, "another decoder_model_merged.onnx"),
        ("sha256", "0" * 64, "is missing or was changed"),
        ("tool_version", "99.0.0", "verified with ONNX Runtime 99.0.0; this is"),
    ):
        file.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(PackageError, match=reason):
            read_lowered(read, tool_version=VERSION)
    for content, reason in (("{", "is not a valid manifest"), ('{"schema_version": 9}', "schema version 9")):
        file.write_text(content)
        with pytest.raises(PackageError, match=reason):
            read_lowered(read, tool_version=VERSION)
        with pytest.raises(PackageError, match=reason):
            lower_package(read)
    file.unlink()
    assert read_lowered(read, tool_version=VERSION) is None


def test_the_command_builds_it_again_after_it_was_deleted(package: Path) -> None:
    folder = lowered_folder(package)
    shutil.rmtree(folder)
    for state in ("built", "up to date"):
        outcome = run(build_main, str(package), "--backend", "onnxruntime")
        assert outcome.exit_code == 0, outcome.stderr
        assert outcome.stdout == f"{folder}: onnxruntime {_version(package)}, {state}\n"
    printed = json.loads(run(build_main, str(package), "--backend", "onnxruntime", "--rebuild", "--json").stdout)
    assert printed["lowered"]["built"] is True
    refused = run(build_main, str(package), "--backend", "onnxruntime", "--max-batch", "2")
    assert refused.exit_code == 1
    assert "received backend = 'onnxruntime'" in refused.error_lines[-1]


def _version(package: Path) -> str:
    return str(json.loads((lowered_folder(package) / LOWERED_FILE).read_text())["tool_version"])


@pytest.mark.parametrize("family", ["tiny_export", "tiny_qwen_export"])
def test_answers_are_those_of_the_portable_decoder(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    package = request.getfixturevalue(family).output
    answers = []
    for lowered in (True, False):
        with VisionLanguagePipeline.from_package(package, provider="cpu", lowered=lowered) as pipeline:
            in_place = "decoder lowered for ONNX Runtime: keys and values are updated in place"
            assert (in_place in pipeline.notes) == lowered
            answers.append([*_alone_and_together(pipeline), *_in_turns(pipeline), *_joining_and_leaving(pipeline)])
    assert answers[0] == answers[1]


QUESTIONS = [(render_scene(seed, image_size=56).image, "What is " + "it" * (seed % 9)) for seed in TEST_SEEDS[:6]]


def _alone_and_together(pipeline: VisionLanguagePipeline) -> list[tuple[int, ...]]:
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    alone = [pipeline.generate(*question, **options).token_ids for question in QUESTIONS]
    together = [result.token_ids for result in pipeline.generate_batch(QUESTIONS, **options)]
    assert together == alone
    return alone


def _in_turns(pipeline: VisionLanguagePipeline) -> list[tuple[int, ...]]:
    """A chat in which a prompt replaces the end of the answer before."""
    chat = pipeline.chat()
    return [chat.ask(text, image, max_new_tokens=8).token_ids for image, text in QUESTIONS[:4]]


def _joining_and_leaving(pipeline: VisionLanguagePipeline) -> list[tuple[int, ...]]:
    engine = pipeline.engine(max_batch=3)
    lengths = (3, 11, 5, 2, 9, 7)
    requests = [
        pipeline.request(*question, max_new_tokens=length, ignore_eos=True)
        for question, length in zip(QUESTIONS, lengths, strict=True)
    ]
    waiting = list(requests)
    while waiting or engine.has_requests:
        if waiting:
            engine.add(waiting.pop(0))
        engine.step()
    return [request.result().token_ids for request in requests]
