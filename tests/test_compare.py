"""Comparing backends and packages through Polygraphy: what is measured, and that an injected fault is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from promprune.errors import BackendError, ConfigError, PackageError
from promprune.export import ExportResult
from promprune.export.commands.verify import BACKENDS, main
from promprune.export.engine import toolkit
from promprune.export.graphs.selector import build_selector
from promprune.export.verify.config import CompareConfig
from promprune.package.engines import current_target
from promprune.package.manifest import DECODER, read_manifest
from promprune.package.package import read_package
from tests.support.command_line import run
from tests.support.fake_package import (
    NUM_TOKENS,
    FakeModel,
    make_graph,
    replaced_graph,
    rewrite_manifest,
    write_fake_package,
)

pytest.importorskip("polygraphy", reason="Polygraphy is not installed")

import polygraphy.config
from polygraphy.backend.base import BaseRunner

from promprune.export.verify import comparison as pipeline
from promprune.export.verify.backends import RUNNERS, GraphToRun
from promprune.export.verify.comparison import GraphComparison, compare_package, sample_feeds
from promprune.export.verify.tensors import same_tensors, tensor_error


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a few nodes; not to be changed."""
    folder = tmp_path_factory.mktemp("compared") / "package"
    write_fake_package(folder)
    return folder


def with_graph(folder: Path, name: str, graph: onnx.ModelProto) -> Path:
    """Write a package of a few nodes, of whose graphs one is another, or that has one more."""
    write_fake_package(folder)
    manifest = read_manifest(folder)
    onnx.save(graph, folder / "onnx" / f"{name}.onnx")
    rewrite_manifest(folder, manifest, graphs=replaced_graph(manifest, name, graph))
    return folder


def perturbed(package: Path, folder: Path, graph: str, weight: str, factor: float) -> Path:
    """Return a copy of a package in which one weight of one graph is another."""
    copy = Path(shutil.copytree(package, folder / "perturbed"))
    path = copy / "onnx" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    place = {entry.key: entry.value for entry in tensor.external_data}
    load_external_data_for_model(model, str(path.parent))
    changed = (numpy_helper.to_array(tensor) * np.float32(factor)).astype(np.float32)
    with (path.parent / place["location"]).open("r+b") as stream:
        stream.seek(int(place["offset"]))
        stream.write(changed.tobytes())
    return copy


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 5.0], [3.0, 4.0], 0.2),  # 1 / 5
        ([3, 4, 5, 6], [3, 4, 5, 7], 0.25),
        ([True, False], [True, True], 0.5),
        ([1.0], [1.0, 2.0], np.inf),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [2.0, 1.0], np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([0.0], [0.0], 0.0),
        ([1.0], [0.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_the_error_of_a_tensor(value: list[float], reference: list[float], error: float) -> None:
    assert tensor_error(np.array(value), np.array(reference)) == pytest.approx(error)


def test_half_precision_is_compared_in_double_precision() -> None:
    value, reference = np.array([60000.0, 3.0], np.float16), np.array([60000.0, 4.0], np.float32)
    assert tensor_error(value, reference) == pytest.approx(1 / 60000, rel=1e-3)


def test_the_inputs_are_those_of_real_answers(fake: Path) -> None:
    feeds = sample_feeds(read_package(fake))
    prompt, token = feeds[DECODER]
    assert (prompt["past_key_values.0.key"].shape[2], token["inputs_embeds"].shape[1]) == (0, 1)
    assert token["attention_mask"].shape[1] == prompt["attention_mask"].shape[1] + 1
    assert len(feeds["vision_encoder"]) == 1


def test_linked_weights_are_found(tiny_linked_export: ExportResult) -> None:
    linked, manifest = tiny_linked_export.output, tiny_linked_export.manifest
    assert manifest.graphs[DECODER].weights == ("onnx/model.safetensors",)
    for result in compare_package(linked, CompareConfig()):
        assert result.passed, result.first
        assert result.compared == len(manifest.graphs[result.graph].outputs)


def test_every_tensor_of_the_decoder_is_compared(tiny_export: ExportResult) -> None:
    (result,) = compare_package(tiny_export.output, CompareConfig(graphs=(DECODER,), layers=True))
    assert result.passed, result.first
    assert result.compared > 100
    assert result.feeds == 2


def test_tensors_are_found_by_how_they_are_computed() -> None:
    """The second graph has other names, a cast, and a product more."""

    def graph(*nodes: tuple[str, str, str]) -> onnx.ModelProto:
        made = [
            helper.make_node(op, i.split(), o.split(), name=f"n_{o}", to=1)
            if op == "Cast"
            else helper.make_node(op, i.split(), o.split(), name=f"n_{o}")
            for op, i, o in nodes
        ]
        weights = [numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in ("w", "v")]
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])
        return helper.make_model(helper.make_graph(made, "g", [x], [x], weights))

    one = graph(("MatMul", "x w", "a"), ("MatMul", "x v", "b"), ("Relu", "b", "c"))
    two = graph(
        ("Cast", "x", "a"), ("MatMul", "a w", "b"), ("MatMul", "a v", "c"), ("Relu", "c", "d"), ("Exp", "d", "e")
    )
    assert same_tensors(one, two) == {"a": "b", "b": "c", "c": "d"}
    assert same_tensors(two, one) == {"b": "a", "c": "b", "d": "c"}


@pytest.mark.parametrize("share", [1, 0.5])
def test_a_mask_is_as_low_as_its_dtype_allows(share: float) -> None:
    """Such as -32752 in half and -1.7e38 in single precision, with scores of up to 5 added."""
    half, single = (
        np.array([1, share * np.finfo(dtype).min + 5, share * np.finfo(dtype).min], dtype)
        for dtype in (np.float16, np.float32)
    )
    assert tensor_error(half, single) == tensor_error(single, half) == 0
    assert tensor_error(half, np.array([1, 2, single[2]], np.float32)) > 1e3  # masked here, and there not
    assert tensor_error(half + np.array([1, 0, 0], np.float16), single) == 1


@pytest.mark.parametrize(("graph", "number"), [("vision_encoder", 0), ("vision_encoder", 5), (DECODER, 9)])
def test_an_injected_fault_is_traced_to_the_node_that_has_the_weight(
    tiny_export: ExportResult, tmp_path: Path, graph: str, number: int
) -> None:
    model = onnx.load(tiny_export.output / "onnx" / f"{graph}.onnx", load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) >= 2 and tensor.external_data}
    readers = [node for node in model.graph.node if weights & set(node.input) and node.op_type != "Gather"]
    chosen = readers[number]
    (weight,) = weights & set(chosen.input)
    package = perturbed(tiny_export.output, tmp_path, graph, weight, 1.1)
    config = CompareConfig(reference=tiny_export.output, graphs=(graph,), layers=True)
    (result,) = compare_package(package, config)
    assert result.first is not None
    assert (result.first.tensor, result.first.node) == (chosen.output[0], f"{chosen.op_type} {chosen.name}")
    assert result.first.error == pytest.approx(0.1, rel=1e-3)
    (unhurt,) = compare_package(tiny_export.output, CompareConfig(graphs=(graph,), layers=True))
    assert unhurt.passed


@pytest.mark.slow
def test_half_precision_is_close_to_single_in_every_tensor_they_share(
    tiny_fp16_export: ExportResult, tiny_export: ExportResult
) -> None:
    compare = CompareConfig(reference=tiny_export.output, graphs=(DECODER,), layers=True, tolerance=2e-2)
    (result,) = compare_package(tiny_fp16_export.output, compare)
    assert result.passed, result.first
    assert result.compared > 100
    assert 1e-5 < max(output.error for output in result.outputs) < 1e-2


@pytest.mark.parametrize("package", [pytest.param("tiny_export", marks=pytest.mark.slow), "tiny_linked_export"])
def test_tensorrt_builds_every_graph_with_every_tensor_as_an_output(
    package: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real parser and builder, as the backend calls them; only to run an engine takes a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    monkeypatch.setattr(toolkit, "current_target", lambda: "sm89")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")  # what the backend sets, put back after the test
    monkeypatch.setattr(polygraphy.config, "USE_TENSORRT_RTX", True)
    built: list[tuple[str, list[str]]] = []

    def build(name: str, subject: GraphToRun) -> BaseRunner:
        assert type(RUNNERS["tensorrt-rtx"](name, subject)).__name__ == "TrtRunner"
        graph = onnx.load(subject.file, load_external_data=False).graph
        built.append((subject.file.stem, [output.name for output in graph.output]))
        return RUNNERS["onnxruntime"](name, subject)

    monkeypatch.setattr(pipeline, "RUNNERS", {**RUNNERS, "tensorrt-rtx": build})
    export: ExportResult = request.getfixturevalue(package)
    results = compare_package(export.output, CompareConfig(backend="tensorrt-rtx", layers=True))
    assert [result.graph for result in results] == list(export.manifest.graphs)
    for result in results:
        marked = [outputs for graph, outputs in built if graph == result.graph]
        assert marked[0] == [output.name for output in export.manifest.graphs[result.graph].outputs]
        assert result.passed
        assert result.compared == sum(map(len, marked))
    assert sum(result.compared for result in results) > 500


def test_a_package_with_other_graphs_is_refused(fake: Path, tiny_export: ExportResult) -> None:
    with pytest.raises(PackageError, match="has no token_selector; expected the graphs of"):
        compare_package(tiny_export.output, CompareConfig(reference=fake))


def test_a_graph_with_boolean_inputs_is_compared(tmp_path: Path) -> None:
    """The selector of LLaVA-NeXT has a boolean input, the mask of padding; answering does not run it."""
    package = with_graph(tmp_path / "package", "token_selector", build_selector(16, 8, 4, token_mask=True))
    (feed,) = sample_feeds(read_package(package))["token_selector"]
    assert (feed["token_mask"].dtype, feed["token_mask"].tolist()) == (np.bool_, [[True] * 16])
    config = CompareConfig(graphs=("token_selector",))
    (result,) = compare_package(package, config)
    assert result.passed, result.first
    assert result.compared == 5


@pytest.mark.parametrize("graphs", [(), ("counter",)])
def test_a_graph_without_inputs_to_run_it_on_is_no_success(tmp_path: Path, graphs: tuple[str, ...]) -> None:
    counter = make_graph({"n": ("int64", [1])}, {"m": ("int64", [1])}, {}, ("Abs", "n", "m"))
    package = with_graph(tmp_path / "package", "counter", counter)
    expected = "no sample inputs for graph counter.*expected one of vision_encoder, .*choose others with --gr"
    with pytest.raises(ConfigError, match=expected):
        compare_package(package, CompareConfig(graphs=graphs))
    (result,) = compare_package(package, CompareConfig(graphs=("vision_encoder",)))
    assert result.passed


def test_nothing_compared_is_no_success() -> None:
    assert not GraphComparison(graph="g", feeds=1, outputs=(), first=None, compared=0).passed


def test_an_output_is_compared_that_no_node_computes(tmp_path: Path) -> None:
    value = {"value": numpy_helper.from_array(np.array([7.0], np.float32))}
    outputs = {name: ("float32", [1]) for name in ("made", "constant", "weight")}
    nodes = [("Relu", "x", "made"), ("Constant", "", "constant", value)]
    graph = make_graph({"x": ("float32", [1])}, outputs, {"weight": np.ones(1, np.float32)}, *nodes)
    other = make_graph({"x": ("float32", [1])}, outputs, {"weight": np.full(1, 2, np.float32)}, *nodes)
    packages = [with_graph(tmp_path / f"{index}", "extra", graph) for index, graph in enumerate((graph, other))]
    (result,) = compare_package(packages[0], CompareConfig(reference=packages[1], graphs=("extra",)))
    assert {output.tensor: output.error for output in result.outputs} == {"made": 0, "constant": 0, "weight": 0.5}
    assert not result.passed


def test_what_a_backend_raises_is_one_line(fake: Path, tmp_path: Path) -> None:
    """ONNX Runtime's exceptions have no common base class."""
    graph = onnx.load(fake / "onnx" / "vision_encoder.onnx")
    graph.graph.node[0].domain = "strange"
    graph.opset_import.append(helper.make_opsetid("strange", 1))
    package = with_graph(tmp_path / "package", "vision_encoder", graph)
    with pytest.raises(BackendError, match=r"vision_encoder.onnx cannot be loaded .*strange") as caught:
        compare_package(package, CompareConfig(reference=fake))
    assert "\n" not in str(caught.value)


def test_a_package_with_other_outputs_is_refused(fake: Path, tmp_path: Path) -> None:
    """One without pruning has no kept indices."""
    write_fake_package(tmp_path / "whole", FakeModel(keep_tokens=NUM_TOKENS))
    expected = (
        r"vision_encoder.onnx has no output saliency_count, .*, token_indices; expected those of .*vision_encoder"
    )
    with pytest.raises(PackageError, match=expected):
        compare_package(fake, CompareConfig(reference=tmp_path / "whole"))


def test_nothing_is_left_in_the_package(fake: Path) -> None:
    before = sorted(fake.rglob("*"))
    compare_package(fake, CompareConfig(layers=True))
    assert sorted(fake.rglob("*")) == before


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime-cuda"])
def test_a_backend_that_needs_a_gpu_says_so_in_one_line(fake: Path, backend: str) -> None:
    try:
        current_target()
    except BackendError:
        pass
    else:
        pytest.skip("there is a GPU here")
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    outcome = run(main, str(fake), "--backend", backend, "--against", "onnxruntime")
    assert outcome.exit_code == 1
    assert "no NVIDIA driver" in outcome.error_lines[-1]


def test_the_command_names_the_backends_of_the_table() -> None:
    assert tuple(RUNNERS) == BACKENDS


def test_the_command_compares_and_reports(fake: Path, tmp_path: Path) -> None:
    write_fake_package(tmp_path / "copy")
    same = run(main, str(fake), "--reference", str(tmp_path / "copy"), "--layers")
    assert same.exit_code == 0, same.stderr
    assert "vision_encoder: " in same.stdout
    assert same.stdout.count("all within 0.02") == 3
    write_fake_package(tmp_path / "other", FakeModel(seed=1))
    other = run(main, str(fake), "--reference", str(tmp_path / "other"), "--json")
    assert other.exit_code == 1
    graphs = {graph["graph"]: graph for graph in json.loads(other.stdout)["graphs"]}
    assert not graphs["embed_tokens"]["passed"]
    assert graphs["embed_tokens"]["first"]["tensor"] == "inputs_embeds"


def test_the_command_describes_graphs(fake: Path) -> None:
    outcome = run(main, str(fake), "--inspect", "--graph", "embed_tokens")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.startswith("embed_tokens\n")
    assert "Gather" in outcome.stdout
    assert "TopK" not in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--backend", "abacus", "--against", "onnxruntime"], 1, "received backend 'abacus'; expected one of onnxr"),
        (
            ["--backend", "tensorrt", "--against", "onnxruntime", "--graph", "head"],
            1,
            "received graph 'head'; expected one of vision_encoder",
        ),
        (["--against", "onnxruntime", "--tolerance", "-1"], 1, "received tolerance = -1; expected a finite number"),
        (["--layers"], 2, "without --against or --reference; expected one of those two"),
        (["--reference", "/nowhere"], 1, "/nowhere is not an exported package"),
    ],
)
def test_mistakes_are_one_line(fake: Path, arguments: list[str], exit_code: int, message: str) -> None:
    outcome = run(main, str(fake), *arguments)
    assert outcome.exit_code == exit_code
    assert message in outcome.error_lines[-1]
    assert len(outcome.error_lines) == 1


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="received tolerance = nan"):
        CompareConfig(tolerance=float("nan"))
