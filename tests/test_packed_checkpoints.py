"""Checkpoints whose weights are quantized already: GPTQ, AWQ and compressed-tensors, made here from a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from promprune.errors import ModelError, UnsupportedModelError
from promprune.export import export_package
from promprune.export.checkpoint.meta_model import build_meta_model
from promprune.export.checkpoint.packed import PackedTensor
from promprune.export.checkpoint.weights import linked
from promprune.export.config import ExportConfig
from promprune.export.quantize.weights import QuantizedWeight, WeightQuantization
from promprune.package.manifest import DECODER, WeightRecord

MODEL_CLASS = "LlavaForConditionalGeneration"
GROUP = 16
METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": GROUP, "symmetric": True, "strategy": "group", "type": "int"},
                "input_activations": None,
            }
        },
    },
}


def pack(values: Tensor, dim: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Pack eight neighbours along ``dim`` into an int32; neighbour ``order[i]`` takes the i-th four bits."""
    words = values.to(torch.int64).unfold(dim, 8, 8)  # the neighbours are the last dimension
    packed = sum(words[..., neighbour] << (4 * place) for place, neighbour in enumerate(order))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed_tensors(prefix: str, weight: Tensor, method: str, symmetric: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize a weight ``[N, K]`` in the format of a method; return its tensors, and the dequantized weight."""
    count, length = weight.shape
    groups = weight.reshape(count, -1, GROUP)
    if symmetric:
        scales, zeros = groups.abs().amax(-1) / 7, torch.full(groups.shape[:2], 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 15).long()
    scales = scales.half()
    integers = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).long()
    restored = ((integers - zeros[..., None]) * scales.float()[..., None]).reshape(count, length)
    q = integers.reshape(count, length)
    if method.startswith("gptq"):
        stored = zeros - (1 if method == "gptq" else 0)
        return {
            f"{prefix}.qweight": pack(q.T, 0),
            f"{prefix}.qzeros": pack(stored.T, 1),
            f"{prefix}.scales": scales.T.contiguous(),
            f"{prefix}.g_idx": (torch.arange(length) // GROUP).to(torch.int32),
        }, restored
    if method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            f"{prefix}.qweight": pack(q.T, 1, order),
            f"{prefix}.qzeros": pack(zeros.T, 1, order),
            f"{prefix}.scales": scales.T.contiguous(),
        }, restored
    zero_points = {} if symmetric else {f"{prefix}.weight_zero_point": pack(zeros, 0)}
    return {
        f"{prefix}.weight_packed": pack(q, 1),
        f"{prefix}.weight_scale": scales,
        f"{prefix}.weight_shape": torch.tensor([count, length]),
        **zero_points,
    }, restored


def save_packed(source: Path, folder: Path, method: str, *, symmetric: bool) -> tuple[Path, Path]:
    """Write a checkpoint in a packed form, and beside it the same values unpacked."""
    packed, plain = Path(shutil.copytree(source, folder / "packed")), Path(shutil.copytree(source, folder / "plain"))
    tensors = load_file(source / "model.safetensors")
    stored, restored = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if "language_model" in key and key.endswith("proj.weight"):
            del stored[key]
            parts, restored[key] = packed_tensors(key.removesuffix(".weight"), value, method, symmetric)
            stored.update(parts)
    save_file({key: value.contiguous() for key, value in stored.items()}, packed / "model.safetensors")
    save_file({key: value.contiguous() for key, value in restored.items()}, plain / "model.safetensors")
    set_quantization(packed, SETTINGS[method])
    return packed, plain


def test_packed_weights_without_their_settings_are_named(tiny_llava: Path, tmp_path: Path) -> None:
    packed, _ = save_packed(tiny_llava, tmp_path, "awq", symmetric=True)
    config = json.loads((packed / "config.json").read_text())
    settings = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"packed weights, such as .*qweight, and config.json does not say how"):
        build_meta_model(packed, MODEL_CLASS, torch.float32)
    config["text_config"]["quantization_config"] = settings
    (packed / "config.json").write_text(json.dumps(config))
    assert build_meta_model(packed, MODEL_CLASS, torch.float32).packed_weights.method == "awq"


def set_quantization(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_packed_weight_reads_as_its_values(
    tiny_llava: Path, tmp_path: Path, method: str, symmetric: bool
) -> None:
    packed, plain = save_packed(tiny_llava, tmp_path, method, symmetric=symmetric)
    model = build_meta_model(packed, MODEL_CLASS, torch.float32)
    wanted = dict(LlavaForConditionalGeneration.from_pretrained(plain).named_parameters())
    read = 0
    for name, parameter in model.named_parameters():
        weight = linked(parameter)
        assert weight is not None
        torch.testing.assert_close(weight.stored.read(torch.float32), wanted[name].data, rtol=0, atol=1e-7)
        read += isinstance(weight.stored, PackedTensor)
    assert read == 14


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_integers_are_kept_and_others_fit_in_eight_bits(
    tiny_llava: Path, tmp_path: Path, method: str
) -> None:
    for symmetric in (True, False):
        packed, _ = save_packed(tiny_llava, tmp_path / str(symmetric), method, symmetric=symmetric)
        model = build_meta_model(packed, MODEL_CLASS, torch.float32)
        weight = linked(model.model.language_model.layers[0].mlp.down_proj.weight)
        assert weight is not None
        values = weight.stored.read(torch.float32)
        int4, int8 = (
            QuantizedWeight(stored=weight.stored, quantization=WeightQuantization(bits=bits, block_size=GROUP)).read()
            for bits in (4, 8)
        )
        assert torch.equal(int8, values)
        assert torch.equal(int4, values) == symmetric
        assert torch.linalg.norm(int4 - values) < 0.1 * torch.linalg.norm(values)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gguf"},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tiny_llava: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    set_quantization(folder, settings)
    with pytest.raises(UnsupportedModelError, match=rf"is quantized \({settings['quant_method']}\); expected GPTQ"):
        build_meta_model(folder, MODEL_CLASS, torch.float32)


@pytest.mark.parametrize(("method", "symmetric", "options"), [("gptq", True, {}), ("awq", False, {"int8": True})])
def test_an_exported_checkpoint_gives_the_logits_of_its_dequantized_model(
    tiny_llava: Path, tmp_path: Path, method: str, symmetric: bool, options: dict[str, bool]
) -> None:
    packed, plain = save_packed(tiny_llava, tmp_path, method, symmetric=symmetric)
    model = LlavaForConditionalGeneration.from_pretrained(plain).eval()
    config = ExportConfig(
        model=str(packed),
        output=tmp_path / "out",
        ratio=1.0,
        verify=False,
        weight_format="int8" if options else None,
    )
    manifest = export_package(config).manifest
    assert manifest.weights is not None
    assert manifest.weights.language == WeightRecord(format="int8" if options else "int4", block_size=GROUP)
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(str(tmp_path / "out" / manifest.graphs[DECODER].file), settings)
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1:]
        wanted = head_as_packaged(model, manifest.weights.language)(hidden).numpy()
    past = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    feeds = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in past}
    feeds |= {"inputs_embeds": embeds.numpy(), "attention_mask": np.ones((1, 11), np.int64)}
    logits = session.run(["logits"], {**feeds, "position_ids": np.arange(11)[None]})[0]
    assert np.abs(logits - wanted).max() / wanted.std() < 1e-3


def head_as_packaged(model: Any, record: WeightRecord) -> Any:
    """The head, which these checkpoints do not quantize, as the package has it."""
    from promprune.export.quantize.quantizer import dequantize_blocks, quantize_blocks

    weight = model.lm_head.weight.detach().numpy().T
    integers, scales = quantize_blocks(weight, bits=4 if record.format == "int4" else 8, block_size=GROUP)
    restored = torch.from_numpy(dequantize_blocks(integers, scales, block_size=GROUP).T.copy())
    return lambda hidden: torch.nn.functional.linear(hidden, restored)
