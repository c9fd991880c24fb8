"""Exports of checkpoints that need not fit into memory: repeated layers, linked weights, out-of-core verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from promprune.dtypes import Dtype
from promprune.errors import BackendError, OutputError, PackageError
from promprune.export import ExportResult, export_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.checkpoint.out_of_core import PiecewiseSession, available_memory
from promprune.export.config import ExportConfig
from promprune.export.graphs.passes.layers import alike
from promprune.export.verify.verification import verify_package
from promprune.package.manifest import read_manifest
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.commands import run as run_command
from tests.support.command_line import run
from tests.support.tiny_models import HUB_PREFIXES, reshape_checkpoint, save_tiny_llava

LAYERS = 5


@pytest.fixture(scope="module")
def deep_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that is deep enough for repeated layers, in shards, with the hub's keys, through symbolic links."""
    folder = tmp_path_factory.mktemp("deep")
    plain = save_tiny_llava(
        folder / "plain", text={"num_hidden_layers": LAYERS}, vision={"num_hidden_layers": LAYERS + 1}
    )
    return reshape_checkpoint(plain, folder, shards=3, prefixes=HUB_PREFIXES, hub=True)


@pytest.fixture(scope="module")
def deep_export(deep_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """Its package, linked rather than copied; verified against transformers, including answers."""
    output = tmp_path_factory.mktemp("packages") / "deep"
    return export_package(ExportConfig(model=str(deep_llava), ratio=0.25, output=output, copy_weights=False))


def test_repeated_layers_compute_what_transformers_does(deep_export: ExportResult) -> None:
    """The verification compares features, logits of prefill and decode steps, and answers with the full torch model."""
    verification = deep_export.manifest.verification
    assert verification is not None
    assert verification.passed
    assert verification.not_verified == ()
    assert {"decode logits, relative error", "greedy answers equal to torch's"} <= {c.name for c in verification.checks}


@pytest.mark.parametrize(("graph", "layers"), [("decoder_model_merged", LAYERS), ("vision_encoder", LAYERS)])
def test_every_layer_has_its_own_weights(deep_export: ExportResult, graph: str, layers: int) -> None:
    model = onnx.load(deep_export.output / f"onnx/{graph}.onnx", load_external_data=False)
    names = [tensor.name for tensor in model.graph.initializer if ".q_proj.weight" in tensor.name]
    assert len(names) == len(set(names)) == layers
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    assert len({(entries[name]["location"], entries[name]["offset"]) for name in names}) == len(names)


def test_linked_weights_are_the_checkpoints_files(deep_export: ExportResult, deep_llava: Path) -> None:
    onnx_files = {path.name for path in (deep_export.output / "onnx").iterdir()}
    shards = {path.name for path in deep_llava.glob("*.safetensors")}
    assert shards <= onnx_files
    for name in shards:
        linked, source = deep_export.output / "onnx" / name, (deep_llava / name).resolve()
        assert not linked.is_symlink()
        assert linked.read_bytes() == source.read_bytes()
    manifest = read_manifest(deep_export.output, check_weights=True)
    weights = {file for record in manifest.graphs.values() for file in record.weights}
    assert {f"onnx/{name}" for name in shards} <= weights <= {record.path for record in manifest.files}


def test_a_changed_shard_is_noticed(deep_export: ExportResult, tmp_path: Path) -> None:
    package = Path(shutil.copytree(deep_export.output, tmp_path / "package"))
    shard = next((package / "onnx").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    read_manifest(package)
    with pytest.raises(PackageError, match="was changed"):
        read_manifest(package, check_weights=True)


def test_a_link_that_cannot_be_made_is_refused_and_leaves_nothing(
    deep_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Any, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("promprune.export.graphs.external_data.os.link", no_link)
    config = ExportConfig(model=str(deep_llava), output=tmp_path / "out", copy_weights=False, verify=False)
    with pytest.raises(OutputError, match=r"cannot be linked .*Invalid cross-device link.*--copy-weights"):
        export_package(config)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_have_to_be_converted_are_not_linked(deep_llava: Path, tmp_path: Path) -> None:
    config = ExportConfig(model=str(deep_llava), dtype="fp16", output=tmp_path / "out", copy_weights=False)
    with pytest.raises(
        OutputError, match=r"cannot be linked: it is stored as F32.*choose the checkpoint's own --dtype"
    ):
        export_package(config)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def out_of_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory, and pieces of a few nodes."""
    monkeypatch.setattr("promprune.export.verify.verification.available_memory", lambda: 0)
    monkeypatch.setattr("promprune.export.checkpoint.out_of_core.PIECE_BYTES", 20_000)
    monkeypatch.setattr("promprune.export.checkpoint.out_of_core.KEPT_BYTES", 100)


@pytest.mark.usefixtures("out_of_core")
def test_an_out_of_core_verification_agrees(deep_export: ExportResult, deep_llava: Path) -> None:
    record = verify_package(deep_export.package, load_checkpoint(str(deep_llava)))
    assert record.passed
    assert "answers, token for token" in record.not_verified
    assert deep_export.manifest.verification is not None
    whole = {check.name for check in deep_export.manifest.verification.checks}
    assert whole - {check.name for check in record.checks} == {"greedy answers equal to torch's"}


@pytest.mark.parametrize(
    ("checkpoint", "package"),
    [
        ("tiny_siglip", "siglip_export"),
        ("tiny_llava_next", "next_export"),
        ("tiny_qwen", "tiny_qwen_export"),
        ("tiny_qwen2", "tiny_qwen2_export"),
    ],
)
def test_every_tower_runs_out_of_core(checkpoint: str, package: str, request: pytest.FixtureRequest) -> None:
    """Also with weights of a module that is not called, such as the patch embedding of Qwen."""
    export: ExportResult = request.getfixturevalue(package)
    source = load_checkpoint(str(request.getfixturevalue(checkpoint)))
    request.getfixturevalue("out_of_core")  # not before the package is there, which other tests use as well
    assert verify_package(export.package, source).passed


@pytest.mark.usefixtures("out_of_core")
def test_an_out_of_core_verification_notices_one_wrong_layer(
    deep_export: ExportResult, deep_llava: Path, tmp_path: Path
) -> None:
    """One projection of one repeated layer differs in the checkpoint that the package is compared with."""
    other = Path(shutil.copytree(deep_llava, tmp_path / "other"))
    for shard in other.glob("*.safetensors"):
        tensors = load_file(shard)
        wrong = {k: v * 1.5 for k, v in tensors.items() if k.endswith("model.layers.3.self_attn.o_proj.weight")}
        if wrong:
            save_file({**tensors, **wrong}, shard)
    record = verify_package(deep_export.package, load_checkpoint(str(other)))
    failed = {check.name for check in record.checks if not check.passed}
    assert {"prefill logits, relative error", "decode logits, relative error"} <= failed
    assert "image features, relative error" not in failed


def test_pieces_compute_what_the_whole_graph_does(deep_export: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    path = deep_export.output / "onnx/vision_encoder.onnx"
    pixels = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)
    whole = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    monkeypatch.setattr("promprune.export.checkpoint.out_of_core.PIECE_BYTES", 5_000)
    pieces = PiecewiseSession(path)
    assert len(pieces._pieces) > LAYERS
    assert [value.name for value in pieces.get_outputs()] == [value.name for value in whole.get_outputs()]
    feeds = {"pixel_values": pixels}
    for got, want in zip(pieces.run(None, feeds), whole.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_available_memory_is_that_of_this_machine() -> None:
    import os

    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_layers_that_differ_in_a_setting_are_not_alike() -> None:
    a, b = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    assert alike([a, b])
    b[0].scaling = 2.0  # type: ignore[assignment]
    assert not alike([a, b])
    assert not alike([a, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(3))])


@pytest.mark.parametrize(("stored", "dtype"), [("fp16", "fp16"), ("bf16", "fp16"), ("fp16", "fp32")])
def test_a_checkpoint_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, dtype: Dtype
) -> None:
    """Half precision on disk: linked if it is the package's dtype, else converted; all graphs get weights alike."""
    monkeypatch.setattr("promprune.export.graphs.external_data.LINK_MIN_BYTES", 0)
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[stored]
    checkpoint = save_tiny_llava(tmp_path / "checkpoint", dtype=torch_dtype)
    config = ExportConfig(model=str(checkpoint), ratio=0.25, dtype=dtype, vision_only=True, output=tmp_path / "out")
    result = export_package(config)
    assert result.manifest.verification is not None
    assert result.manifest.verification.passed
    linked = (result.output / "onnx/model.safetensors").exists()
    assert linked == (stored == dtype)
    assert (result.output / "onnx/vision_encoder.onnx_data").exists() != linked


def test_a_bf16_package_is_verified_and_refused_on_the_cpu(tiny_bf16_export: ExportResult) -> None:
    result, output = tiny_bf16_export, tiny_bf16_export.output
    verification = result.manifest.verification
    assert verification is not None
    assert verification.passed
    assert any("bf16" in what for what in verification.not_verified)
    dtypes = {value.name: value.dtype for value in result.manifest.graphs["decoder_model_merged"].inputs}
    assert dtypes["inputs_embeds"] == dtypes["past_key_values.0.key"] == "bfloat16"
    with pytest.raises(BackendError, match="use a GPU for it, or export with --dtype fp32"):
        VisionLanguagePipeline.from_package(output, provider="cpu")
    image = Path(__file__).with_name("missing.png")
    outcome = run(run_command.main, str(output), "--image", str(image), "--prompt", "?", "--provider", "cpu")
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1


def test_features_near_the_end_of_fp16_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promprune.export.verify.verification.FP16_WARNING", 1e-6)
    checkpoint = save_tiny_llava(tmp_path / "checkpoint")
    config = ExportConfig(model=str(checkpoint), dtype="fp16", vision_only=True, output=tmp_path / "out")
    verification = export_package(config).manifest.verification
    assert verification is not None
    assert any("fp16 ends at 65504" in warning for warning in verification.warnings)


def test_code_in_a_checkpoint_is_never_run(tiny_llava: Path, tmp_path: Path) -> None:
    """Every file of a checkpoint that can refer to code does so; the code would write a file."""
    checkpoint, marker = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint")), tmp_path / "was-run"
    (checkpoint / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    auto_map = dict.fromkeys(kinds, "evil.Evil") | {"AutoImageProcessor": "evil.Evil"}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, "auto_map": auto_map, "trust_remote_code": True}))
    loaded = load_checkpoint(str(checkpoint))
    assert type(loaded.meta_model).__module__.startswith("transformers.")
    assert type(loaded.model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_copied_weights_open_with_the_onnx_package(tiny_export: ExportResult) -> None:
    """Small checkpoints are copied; the ``onnx`` package refuses files with more than one hard link."""
    for record in tiny_export.manifest.graphs.values():
        assert all(path.endswith(".onnx_data") for path in record.weights)
        onnx.load(tiny_export.output / record.file)
