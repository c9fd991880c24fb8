"""Engines built by the real TensorRT for RTX, whose builder needs no GPU; only its failures are faked.

Without a GPU an engine cannot be loaded again, not even for inspection. Every build checks the inputs and outputs of
the network; these tests also check them in the text that TensorRT for RTX stores inside an engine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from promprune.errors import BackendError, ConfigError, MissingDependencyError, PackageError
from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from promprune.export.engine import Toolkit, build, build_engines, engine_from_onnx, load_toolkit, network, profiles_of
from promprune.export.engine import toolkit as toolkit_module
from promprune.export.families import FAMILIES
from promprune.package.engines import (
    EngineConfig,
    ProfileRecord,
    ShapeRange,
    current_target,
    engine_folder,
    read_engines,
    timing_cache_file,
)
from promprune.package.manifest import DECODER, GraphRecord, TensorRecord, read_manifest
from promprune.runtime.sessions.tensorrt import modules
from promprune.runtime.sessions.tensorrt.modules import log_of
from tests.support.fake_package import FakeModel, make_graph, rewrite_manifest, write_fake_package
from tests.support.progress import RecordedProgress
from tests.support.tiny_models import save_tiny_llava

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")

TARGETS = ("sm89", "sm120")


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return load_toolkit("tensorrt-rtx")


@pytest.fixture(scope="module")
def fake_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a few nodes with engines for sm89; not to be changed."""
    folder = tmp_path_factory.mktemp("built") / "package"
    write_fake_package(folder)
    build_engines(folder, EngineConfig(targets=("sm89",)))
    return folder


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    write_fake_package(tmp_path / "package")
    return tmp_path / "package"


def copied(package: Path, folder: Path) -> Path:
    return Path(shutil.copytree(package, folder / package.name))


# The program inside an engine has one line for each tensor, with its sizes (numbers, or names if they vary), and
# with its name, to which the builder adds a number.
TENSOR_LINE = re.compile(r"tensor=\{ .*?dims=\{ ([^}]*)\}.*? name=\"([\w.]+?)(?:\.\d+)?\".* type=(\w+)")
ENGINE_DTYPES = {"float": "float32", "half": "float16", "int64": "int64", "bool": "bool"}


def tensors_inside(plan: bytes) -> dict[str, TensorRecord]:
    """Return the tensors of an engine's program by name; a size that varies is called "?"."""
    found = {}
    for sizes, name, dtype in TENSOR_LINE.findall(plan.decode("latin-1")):
        shape = tuple(int(size) if size.isdigit() else "?" for size in sizes.split())
        found[name] = TensorRecord(name=name, dtype=ENGINE_DTYPES.get(dtype, dtype), shape=shape)
    return found


def check_built(package: Path, results: tuple[Any, ...], capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """Compare every engine with its graph, and print what it cost.

    Returns:
        By ``target graph``, the inputs and outputs that were found inside the engine, dtypes and sizes as they should
        be.
    """
    manifest, checked = read_manifest(package), {}
    for result in results:
        target = result.manifest.identity.target
        found = read_engines(engine_folder(package, "tensorrt-rtx", target), check_digests=True)
        assert found == result.manifest
        for name, record in found.engines.items():
            assert (record.inputs, record.outputs) == (manifest.graphs[name].inputs, manifest.graphs[name].outputs)
            tensors = tensors_inside((result.folder / record.file).read_bytes())
            checked[f"{target} {name}"] = {
                tensor.name
                for tensor in (*record.inputs, *record.outputs)
                if tensor.name in tensors and same_tensor(tensors[tensor.name], tensor)
            }
            with capsys.disabled():
                print(f"\n{manifest.family} {target} {name}: ", end="")
                print(f"{record.build_seconds:.1f} s, {record.size_bytes / 1e6:.1f} MB", end="")
    return checked


def same_tensor(found: TensorRecord, stated: TensorRecord) -> bool:
    """Same dtype and fixed sizes; a dynamic size may be fixed if the engine's profiles allow only one."""
    return (found.dtype, len(found.shape)) == (stated.dtype, len(stated.shape)) and all(
        size == dim or (isinstance(dim, str) and size in ("?", 1))
        for size, dim in zip(found.shape, stated.shape, strict=True)
    )


def all_tensors(package: Path, targets: tuple[str, ...]) -> dict[str, set[str]]:
    """Return what :func:`check_built` should find."""
    return {
        f"{target} {name}": {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for target in targets
        for name, graph in read_manifest(package).graphs.items()
    }


GRANITE = "llava_next with SigLIP and several feature layers"
# The fixture with a tiny exported package of each family, and of each vision tower.
TINY_EXPORTS = {
    "llava": "tiny_export",
    "llava with SigLIP": "siglip_export",
    "llava_next": "next_export",
    GRANITE: "granite_export",
    "llava_onevision": "onevision_export",
    "qwen2_5_vl": "tiny_qwen_export",
    "qwen2_vl": "tiny_qwen2_export",
}


def test_engines_of_all_families_are_built() -> None:
    assert set(FAMILIES) <= set(TINY_EXPORTS)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llava", TARGETS),
        *((family, TARGETS[:1]) for family in TINY_EXPORTS if family not in ("llava", GRANITE)),
        pytest.param(GRANITE, TARGETS[:1], marks=pytest.mark.slow),
        *(pytest.param(family, TARGETS[1:], marks=pytest.mark.slow) for family in TINY_EXPORTS if family != "llava"),
    ],
)
def test_every_family_is_built(
    family: str,
    targets: tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = copied(request.getfixturevalue(TINY_EXPORTS[family]).output, tmp_path)
    results = build_engines(package, EngineConfig(targets=targets))
    assert check_built(package, results, capsys) == all_tensors(package, targets)


@pytest.mark.parametrize("target", [pytest.param("sm89", marks=pytest.mark.slow), "sm120"])
def test_the_embedded_model_is_built(
    target: str, embedded_export: ExportResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = copied(embedded_export.output, tmp_path)
    results = build_engines(package, EngineConfig(targets=(target,), max_batch=4, decode_profile=True))
    expected = all_tensors(package, (target,))
    # With a dynamic batch, a separate layer removes the axis of the single position.
    expected[f"{target} {DECODER}"].remove("logits")
    assert check_built(package, results, capsys) == expected


def test_attention_in_half_precision_is_one_kernel(tmp_path: Path, toolkit: Toolkit) -> None:
    """In every layer of an exported decoder; there is no such kernel in fp32."""
    checkpoint = save_tiny_llava(tmp_path / "checkpoint", text={"hidden_size": 128, "num_attention_heads": 4})
    config = ExportConfig(model=str(checkpoint), ratio=1.0, dtype="fp16", output=tmp_path / "out", verify=False)
    export_package(config)
    manifest = read_manifest(tmp_path / "out")
    graph, profiles = manifest.graphs[DECODER], profiles_of(DECODER, manifest, EngineConfig())
    plan = engine_from_onnx(toolkit, tmp_path / "out" / graph.file, graph, profiles=profiles, target="sm89")
    assert bytes(memoryview(plan)).count(b"function={ name=_gemm_mha") == 2


@pytest.mark.gpu
def test_an_engine_of_this_gpu_can_be_loaded(fake: Path, toolkit: Toolkit) -> None:
    try:
        current_target()
    except BackendError as error:
        pytest.skip(str(error))
    (result,) = build_engines(fake, EngineConfig())
    for record in result.manifest.engines.values():
        content = (result.folder / record.file).read_bytes()
        loaded = trt.Runtime(trt.Logger()).deserialize_cuda_engine(content)
        names = {loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)}
        assert names == {tensor.name for tensor in (*record.inputs, *record.outputs)}


def test_the_profiles_lie_around_the_tokens_that_are_kept(fake: Path) -> None:
    manifest = read_manifest(fake)  # T = 4, a context of 256
    config = EngineConfig(max_prompt_tokens=100, max_new_tokens=50, max_batch=3, decode_profile=True)
    prefill, decode = profiles_of(DECODER, manifest, config)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    (alone,) = profiles_of(DECODER, manifest, EngineConfig(max_prompt_tokens=100, max_new_tokens=50, max_batch=3))
    assert (alone.name, alone.shapes) == ("any", prefill.shapes)
    embeds, past = prefill.shapes["inputs_embeds"], prefill.shapes["past_key_values.0.key"]
    assert (embeds.min, embeds.opt, embeds.max) == ((1, 1, 16), (1, 68, 16), (3, 104, 16))
    assert (past.min[2], past.opt[2], past.max[2]) == (0, 0, 153)
    mask = decode.shapes["attention_mask"]
    assert decode.shapes["inputs_embeds"].max == (3, 1, 16)
    assert (mask.min, mask.opt, mask.max) == ((1, 2), (1, 69), (3, 154))


@pytest.mark.parametrize("context_length", [2, 5, 60, 256])
@pytest.mark.parametrize("max_prompt_tokens", [1, 10, 10_000])
def test_every_profile_is_in_order_and_inside_the_context(
    fake: Path, context_length: int, max_prompt_tokens: int
) -> None:
    rewrite_manifest(fake, read_manifest(fake), context_length=context_length)
    manifest = read_manifest(fake)
    for name in manifest.graphs:
        for profile in profiles_of(
            name, manifest, EngineConfig(max_prompt_tokens=max_prompt_tokens, decode_profile=True)
        ):
            for shape in profile.shapes.values():
                assert all(a <= b <= c for a, b, c in zip(shape.min, shape.opt, shape.max, strict=True))
            if "attention_mask" in profile.shapes:
                assert profile.shapes["attention_mask"].max[1] <= context_length


def test_an_unknown_dynamic_dimension_is_refused(fake: Path) -> None:
    manifest = read_manifest(fake)
    tensor = TensorRecord(name="pixel_values", dtype="float32", shape=("crops", 3))
    graph = GraphRecord(file="onnx/vision_encoder.onnx", inputs=(tensor,), outputs=(), tokens=manifest.tokens_of())
    manifest.graphs["vision_encoder"] = graph
    with pytest.raises(PackageError, match="dynamic dimension 'crops' in pixel_values"):
        profiles_of("vision_encoder", manifest, EngineConfig())


def test_engines_that_are_up_to_date_are_not_built_again(
    fake_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = copied(fake_built, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(build, "engine_from_onnx", lambda *args, **kwargs: pytest.fail("built again"))
        (result,) = build_engines(package, EngineConfig(targets=("sm89", "8.9")))
    assert not result.built
    before = read_engines(result.folder)
    (again,) = build_engines(package, EngineConfig(targets=("sm89",), rebuild=True))
    assert again.built
    assert again.manifest.identity == before.identity


def change_options(package: Path) -> EngineConfig:
    del package
    return EngineConfig(targets=("sm89",), max_batch=2)


def change_weights(package: Path) -> EngineConfig:
    manifest = read_manifest(package)
    shutil.rmtree(package / "onnx")
    for file in package.glob("*.json"):
        file.unlink()
    engines = package.parent / "engines"
    shutil.move(package / "engines", engines)
    shutil.rmtree(package)
    write_fake_package(package, FakeModel(seed=1), tools=manifest.tools)
    shutil.move(engines, package / "engines")
    return EngineConfig(targets=("sm89",))


def change_tool(package: Path) -> EngineConfig:
    file = package / "engines" / "tensorrt-rtx-sm89" / "engine.json"
    file.write_text(file.read_text().replace(trt.__version__, "0.9"))
    return EngineConfig(targets=("sm89",))


def damage_engine(package: Path) -> EngineConfig:
    (package / "engines" / "tensorrt-rtx-sm89" / "embed_tokens.engine").write_bytes(b"")
    return EngineConfig(targets=("sm89",))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_options, "are stale .built with max_batch = 1, not 2.*add --rebuild to replace them"),
        (change_weights, "are stale .built from another decoder_model_merged.onnx or other weights"),
        (change_tool, f"are stale .built by tensorrt-rtx 0.9; this is {trt.__version__}"),
        (damage_engine, "embed_tokens.engine in .* was changed since it was built; run promprune-build with --rebuild"),
    ],
)
def test_stale_engines_are_refused_with_the_reason(fake_built: Path, tmp_path: Path, change: Any, reason: str) -> None:
    package = copied(fake_built, tmp_path)
    config = change(package)
    with pytest.raises(PackageError, match=reason):
        build_engines(package, config)


def test_weights_that_were_changed_are_not_built_from(tiny_export: ExportResult, tmp_path: Path) -> None:
    package = copied(tiny_export.output, tmp_path)
    file = package / "onnx" / "embed_tokens.onnx_data"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(PackageError, match=r"embed_tokens.onnx_data .* was changed"):
        build_engines(package, EngineConfig(targets=("sm89",)))
    assert not engine_folder(package, "tensorrt-rtx", "sm89").exists()


def replace_vision(package: Path, graph: onnx.ModelProto) -> None:
    """Replace the graph of the vision encoder, and update the manifest."""
    onnx.save(graph, package / "onnx" / "vision_encoder.onnx")
    rewrite_manifest(package, read_manifest_unchecked(package))


def read_manifest_unchecked(package: Path) -> Any:
    from promprune.package.manifest import _parse_manifest

    return _parse_manifest(package)


def test_an_operator_it_does_not_know_is_named_with_its_node_and_file(fake: Path) -> None:
    graph = onnx.load(fake / "onnx" / "vision_encoder.onnx")
    graph.graph.node.append(helper.make_node("Det", ["W"], ["determinant"], name="/head/Det_3"))
    replace_vision(fake, graph)
    expected = r"onnx/vision_encoder.onnx has the node '/head/Det_3' \(Det\), which tensorrt_rtx .* cannot import"
    with pytest.raises(BackendError, match=expected):
        build_engines(fake, EngineConfig(targets=("sm89",)))


def test_other_inputs_than_the_manifest_says_are_refused(fake: Path) -> None:
    graph = make_graph(
        {"pixel_values": ("float32", ["batch_size", 3, 8, 8])},
        {"image_features": ("float32", ["batch_size", 3, 8, 8])},
        {},
        ("Relu", "pixel_values", "image_features"),
    )
    replace_vision(fake, graph)
    with pytest.raises(
        PackageError, match=r"input pixel_values: float32\[\?, 3, 8, 8\]; expected float32\[batch_size, 3, 32"
    ):
        build_engines(fake, EngineConfig(targets=("sm89",)))


def test_a_file_that_is_no_graph_is_refused(fake: Path, toolkit: Toolkit) -> None:
    graph = read_manifest(fake).graphs["embed_tokens"]
    (fake / "garbage.onnx").write_bytes(b"garbage" * 99)
    with pytest.raises(BackendError, match=r"garbage.onnx cannot be read .*Failed to parse the ONNX model"):
        engine_from_onnx(toolkit, fake / "garbage.onnx", graph, profiles=(), target="sm89")


def test_missing_weights_are_named(tiny_export: ExportResult, tmp_path: Path, toolkit: Toolkit) -> None:
    file = Path(shutil.copy(tiny_export.output / "onnx" / "embed_tokens.onnx", tmp_path))
    graph = tiny_export.manifest.graphs["embed_tokens"]
    with pytest.raises(BackendError, match=r"cannot be read .*Failed to open file: .*embed_tokens.onnx_data"):
        engine_from_onnx(toolkit, file, graph, profiles=(), target="sm89")


def test_fp32_attention_is_decomposed(tmp_path: Path, toolkit: Toolkit) -> None:
    """Opset 23 has an Attention operator, for which TensorRT has no kernel in fp32."""
    shape = [1, 2, 8, 16]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkvy"}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    graph = helper.make_graph([node], "g", [values["q"], values["k"], values["v"]], [values["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "a.onnx")
    records = {name: TensorRecord(name=name, dtype="float32", shape=tuple(shape)) for name in "qkvy"}
    record = GraphRecord(file="a.onnx", inputs=tuple(records[n] for n in "qkv"), outputs=(records["y"],))
    plan = engine_from_onnx(toolkit, tmp_path / "a.onnx", record, profiles=(), target="sm89")
    assert memoryview(plan).nbytes > 1000


CAPACITY = 16


def static_attention(folder: Path, dtype: int) -> Path:
    """Attention of new positions over a cache of constant size, which the same run updates at ``begin``."""
    dims = {"q": "new", "k": "new", "past": CAPACITY, "present": CAPACITY, "y": "new"}
    tensor = helper.make_tensor_value_info
    values = {name: tensor(name, dtype, [1, 2, length, 16]) for name, length in dims.items()}
    begin, mask = tensor("begin", TensorProto.INT64, [1]), tensor("mask", TensorProto.BOOL, [1, 1, "new", CAPACITY])
    keys = helper.make_node("TensorScatter", ["past", "k", "begin"], ["present"], axis=2)
    attention = helper.make_node("Attention", ["q", "present", "present", "mask"], ["y"])
    inputs = [*(values[name] for name in ("q", "k", "past")), begin, mask]
    graph = helper.make_graph([keys, attention], "static", inputs, [values["y"], values["present"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save(model, folder / "static.onnx")
    return folder / "static.onnx"


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["fp32", "fp16"])
def test_attention_over_a_static_cache_builds_with_one_shape_per_step(
    dtype: int, tmp_path: Path, toolkit: Toolkit
) -> None:
    """The basis of a decoder without copies; docs/engines.md says what is missing."""
    file = static_attention(tmp_path, dtype)
    step = dict.fromkeys("qk", (1, 2, 1, 16)) | {"mask": (1, 1, 1, CAPACITY)}
    shapes = {name: ShapeRange(min=shape, opt=shape, max=shape) for name, shape in step.items()}
    for target in TARGETS:
        profile = ProfileRecord(name="decode", shapes=shapes)
        assert memoryview(engine_from_onnx(toolkit, file, None, profiles=(profile,), target=target)).nbytes > 1000


def test_attention_over_a_static_cache_is_causal_attention(tmp_path: Path) -> None:
    session = onnxruntime.InferenceSession(static_attention(tmp_path, TensorProto.FLOAT))
    random = np.random.default_rng(0)
    queries, keys = random.normal(size=(2, 2, 7, 16)).astype(np.float32)
    past, begin, found = np.full((1, 2, CAPACITY, 16), 1e4, np.float32), 0, []
    for count in (4, 1, 2):
        places = slice(begin, begin + count)
        mask = np.arange(CAPACITY) <= np.arange(begin, begin + count)[:, None]
        feeds = {"q": queries[None, :, places], "k": keys[None, :, places], "past": past}
        y, past = session.run(["y", "present"], feeds | {"begin": np.array([begin]), "mask": mask[None, None]})
        found.append(y[0])
        begin += count
    scores = np.where(np.tri(7, dtype=bool), queries @ keys.swapaxes(1, 2) / 4, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(np.concatenate(found, axis=1), weights @ keys, atol=1e-5)


def test_a_gpu_too_old_for_fp32_products_is_refused_with_the_operation(fake: Path) -> None:
    with pytest.raises(BackendError, match=r"vision_encoder.onnx cannot be built for sm75 .*choose a newer target"):
        build_engines(fake, EngineConfig(targets=("sm75",)))


def test_an_unknown_target_is_refused_before_anything_is_built(fake: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'sm90', which tensorrt-rtx .* does not know; expected one of .*sm89.*current"
    ):
        build_engines(fake, EngineConfig(targets=("sm89", "sm90")))
    assert not (fake / "engines").exists()


def test_tensorrt_builds_for_the_gpu_at_hand_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = Toolkit("tensorrt", SimpleNamespace(), "11.0")
    monkeypatch.setattr(toolkit_module, "current_target", lambda: "sm90")
    assert tensorrt.resolve("current") == tensorrt.resolve("sm90") == "sm90"
    with pytest.raises(
        ConfigError, match="received target 'sm89', but this machine has sm90; expected sm90 or current"
    ):
        tensorrt.resolve("sm89")


def test_a_module_that_is_not_installed_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises((MissingDependencyError, BackendError), match=r"pip install .*'promprune\[tensorrt\]'"):
        load_toolkit("tensorrt")


def test_a_module_that_does_not_load_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(modules.importlib, "import_module", broken)
    with pytest.raises(BackendError, match=r"tensorrt is installed but does not load .libnvinfer.so.11: cannot open"):
        load_toolkit("tensorrt")


@contextmanager
def failing_builder(toolkit: Toolkit, message: str | None, error: Exception | None = None) -> Iterator[Toolkit]:
    """The real module, but the last step of a build fails as it does without enough memory or a driver."""

    class Builder:
        def __init__(self, log: Any) -> None:
            self.real, self.log = trt.Builder(log), log

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def build_serialized_network(self, network: Any, config: Any) -> None:
            if error is not None:
                raise error
            if message is not None:
                self.log.log(trt.ILogger.ERROR, message)

    members = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("_")}
    names = {"__name__": "tensorrt_rtx", "__version__": trt.__version__}
    yield Toolkit(toolkit.backend, SimpleNamespace(**members | names | {"Builder": Builder}), toolkit.version)


@pytest.mark.parametrize(
    ("message", "error", "expected"),
    [
        ("Error Code 1: Myelin (Unexpected exception std::bad_alloc)", None, "ran out of memory .*--workspace-mib"),
        ("Error Code 2: OutOfMemory (Requested size was 99 bytes.)", None, "ran out of memory"),
        ("Cuda Runtime (cudaError 2: out of memory)", None, "ran out of memory"),
        (None, MemoryError(), "ran out of memory"),
        ("cudaError 35: CUDA driver version is insufficient", None, "driver here is missing or too old"),
        ("Error Code 9: something else", None, "cannot be built for sm89 .Error Code 9: something else"),
        (None, None, "the builder gave no reason"),
        (None, RuntimeError("null pointer"), "cannot be built for sm89 .null pointer"),
    ],
)
def test_failures_of_the_builder_are_one_clear_line(
    fake: Path, toolkit: Toolkit, message: str | None, error: Exception | None, expected: str
) -> None:
    manifest = read_manifest(fake)
    graph, path = manifest.graphs["embed_tokens"], fake / "onnx" / "embed_tokens.onnx"
    profiles = profiles_of("embed_tokens", manifest, EngineConfig())
    with failing_builder(toolkit, message, error) as failing, pytest.raises(BackendError, match=expected) as caught:
        engine_from_onnx(failing, path, graph, profiles=profiles, target="sm89")
    assert "\n" not in str(caught.value)
    assert "embed_tokens.onnx" in str(caught.value)


def test_progress_only_grows(fake: Path, toolkit: Toolkit) -> None:
    manifest, told = read_manifest(fake), []
    engine_from_onnx(
        toolkit,
        fake / "onnx" / "embed_tokens.onnx",
        manifest.graphs["embed_tokens"],
        profiles=profiles_of("embed_tokens", manifest, EngineConfig()),
        target="sm89",
        report=lambda fraction, phase: told.append((fraction, phase)),
    )
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] <= 1
    assert any(phase == "Building engine" for _, phase in told)


@pytest.mark.usefixtures("sigint_handled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(fake: Path, toolkit: Toolkit, number: signal.Signals) -> None:
    def interrupt(fraction: float, phase: str) -> None:
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), number)

    def terminate(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    sent: list[str] = []
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            build_engines(fake, EngineConfig(targets=("sm89",)), progress=RecordedProgress(interrupt))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list((fake / "engines").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_build_in_a_thread_works(fake: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(build_engines(fake, EngineConfig(targets=("sm89",)))))
    thread.start()
    thread.join()
    assert results[0].built


def test_two_builders_at_a_time_do_not_clobber_each_other(fake: Path) -> None:
    code = "from promprune.export.commands.build import main; main()"
    command = [sys.executable, "-c", code, str(fake), "--target", "sm89", "--rebuild"]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outcomes = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outcomes
    read_engines(engine_folder(fake, "tensorrt-rtx", "sm89"), check_digests=True)
    assert [path.name for path in (fake / "engines").iterdir()] == ["tensorrt-rtx-sm89"]


def test_building_needs_neither_torch_nor_onnx(fake: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from promprune.package.engines import EngineConfig\n"
        "from promprune.export.engine import build_engines\n"
        f"build_engines(Path({str(fake)!r}), EngineConfig(targets=('sm89',)))\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_workspace_limit_reaches_the_builder(fake: Path, toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[Any, int]] = []
    flags: list[bool] = []
    original = network._configure

    def spy(toolkit: Toolkit, settings: Any, *rest: Any) -> None:
        original(toolkit, settings, *rest)
        limits.append(settings.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))
        flags.append(settings.get_flag(trt.BuilderFlag.TF32))

    monkeypatch.setattr(network, "_configure", spy)
    build_engines(fake, EngineConfig(targets=("sm89",), workspace_mib=64))
    assert limits == [64 * 1024 * 1024] * 3
    assert flags == [False] * 3


def test_a_vision_only_package_has_one_engine(fake: Path) -> None:
    manifest = read_manifest(fake)
    for name in ("embed_tokens", DECODER):
        (fake / "onnx" / f"{name}.onnx").unlink()
    rewrite_manifest(fake, manifest, graphs={"vision_encoder": manifest.graphs["vision_encoder"]})
    started = time.perf_counter()
    (result,) = build_engines(fake, EngineConfig(targets=("sm89",)))
    assert list(result.manifest.engines) == ["vision_encoder"]
    assert 0 < result.seconds <= time.perf_counter() - started
    assert np.isfinite(result.manifest.engines["vision_encoder"].build_seconds)


def test_kernels_that_were_measured_are_kept_beside_the_engines(
    fake: Path, toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the calls of the real module; kernels are measured only by TensorRT, which is not installed here."""
    assert not toolkit.times_kernels
    monkeypatch.setattr(build, "load_toolkit", lambda backend: Toolkit("tensorrt", trt, trt.__version__))
    given: list[bytes] = []
    config_type = trt.IBuilderConfig
    create = config_type.create_timing_cache
    monkeypatch.setattr(
        config_type, "create_timing_cache", lambda self, content: given.append(content) or create(self, content)
    )
    with pytest.warns(DeprecationWarning, match="Timing cache operations are no-ops in TensorRT-RTX"):
        build_engines(fake, EngineConfig(backend="tensorrt", targets=("sm89",)))
    file = timing_cache_file(fake, "tensorrt", "sm89")
    assert given[0] == b""
    assert [len(content) for content in given[1:]] == [file.stat().st_size] * 2
    assert sorted(path.name for path in file.parent.iterdir()) == ["tensorrt-sm89", file.name]


def test_one_log_serves_builders_and_sessions() -> None:
    """TensorRT ignores every logger of a process but the first."""
    assert log_of(trt) is log_of(SimpleNamespace(ILogger=trt.ILogger))
