"""Reading a checkpoint without loading it: safetensors headers, key renames, tied weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from promprune.errors import ModelError, UnsupportedModelError
from promprune.export.checkpoint.meta_model import build_meta_model
from promprune.export.checkpoint.weights import linked, read_linked, stored_tensors, weight_files
from tests.support.tiny_models import HUB_PREFIXES, MODULE_PREFIXES, reshape_checkpoint, save_tiny_llava

MODEL_CLASS = "LlavaForConditionalGeneration"


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"shards": 3},
        {"prefixes": HUB_PREFIXES},
        {"prefixes": MODULE_PREFIXES},
        {"shards": 2, "prefixes": HUB_PREFIXES, "hub": True},
    ],
)
def test_every_parameter_is_linked_to_what_transformers_loads(
    tiny_llava: Path, tmp_path: Path, form: dict[str, Any]
) -> None:
    """As one file, in shards, with the keys of other versions, and through the symbolic links of a hub cache."""
    folder = reshape_checkpoint(tiny_llava, tmp_path, **form)
    meta_model = build_meta_model(folder, MODEL_CLASS, torch.float32)
    loaded = dict(LlavaForConditionalGeneration.from_pretrained(folder).named_parameters())
    links = {name: linked(parameter) for name, parameter in meta_model.named_parameters()}
    assert links.keys() == loaded.keys()
    for name, weight in links.items():
        assert weight is not None
        assert weight.name == name
        torch.testing.assert_close(weight.stored.read(torch.float32), loaded[name].data, rtol=0, atol=0)


def test_the_buffers_are_those_of_a_loaded_model(tiny_llava: Path) -> None:
    meta_model = dict(build_meta_model(tiny_llava, MODEL_CLASS, torch.float32).named_buffers())
    loaded = dict(LlavaForConditionalGeneration.from_pretrained(tiny_llava).named_buffers())
    assert meta_model.keys() == loaded.keys()
    for name, buffer in meta_model.items():
        torch.testing.assert_close(buffer, loaded[name], rtol=0, atol=0)


def test_a_tensor_is_converted_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promprune.export.checkpoint.weights.CHUNK_ELEMENTS", 7)
    values = {"a": torch.randn(5, 9), "b": torch.randn(3, 4).to(torch.bfloat16), "c": torch.tensor(1.5)}
    save_file(values, tmp_path / "model.safetensors")
    tensors = stored_tensors(tmp_path)
    for key, value in values.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(tensors[key].read(dtype), value.to(dtype))


def test_tied_weights_are_one(tmp_path: Path) -> None:
    folder = save_tiny_llava(tmp_path / "checkpoint", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    assert "lm_head.weight" not in {key.removeprefix("language_model.") for key in stored_tensors(folder)}
    meta_model = build_meta_model(folder, MODEL_CLASS, torch.float32)
    assert meta_model.lm_head.weight is meta_model.model.language_model.embed_tokens.weight
    tensors = load_file(folder / "model.safetensors")
    embeddings = next(value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embeddings.clone()}, folder / "model.safetensors")
    assert linked(build_meta_model(folder, MODEL_CLASS, torch.float32).lm_head.weight) is not None
    save_file({**tensors, "lm_head.weight": embeddings + 1}, folder / "model.safetensors")
    untied = build_meta_model(folder, MODEL_CLASS, torch.float32)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    assert untied.lm_head.weight is not untied.model.language_model.embed_tokens.weight
    assert torch.equal(read_linked(untied.lm_head.weight), theirs.lm_head.weight)
    assert torch.equal(
        read_linked(untied.model.language_model.embed_tokens.weight), theirs.model.language_model.embed_tokens.weight
    )


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 70_000.0]), "b": torch.tensor([torch.inf])}, tmp_path / "model.safetensors")
    tensors = stored_tensors(tmp_path)
    assert tensors["a"].read(torch.bfloat16).isfinite().all()
    assert tensors["b"].read(torch.float16).isinf().all()
    with pytest.raises(ModelError, match=r"values up to 7e\+04, which torch.float16 cannot hold.*--dtype bf16 or fp32"):
        tensors["a"].read(torch.float16)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")


def other_shape(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def no_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def escaping_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    weight_map = {"a": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "lies outside the file"),
        (long_header, "its header is longer than the file"),
        (other_shape, r"has 8 bytes, not those of F32 \[3\]"),
        (no_json, "cannot be loaded"),
        (pickled, r"pickled \.bin files can run code and are not read"),
        (lost_shard, "names 'model-00002-of-00002.safetensors', which is not there"),
        (escaping_shard, "names '../model.safetensors', which is not there"),
        (broken_index, "cannot be read"),
    ],
)
def test_damaged_weights_are_refused(
    tiny_llava: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(ModelError, match=message):
        stored_tensors(folder)


def test_quantized_weights_are_refused(tiny_llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.weight"))
    save_file({**tensors, key: tensors[key].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"is stored as I8; .*quantized checkpoints are not exported"):
        build_meta_model(folder, MODEL_CLASS, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        build_meta_model(folder, MODEL_CLASS, torch.float32)


def test_the_index_says_which_files_count(tiny_llava: Path, tmp_path: Path) -> None:
    folder = reshape_checkpoint(tiny_llava, tmp_path, shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"no weights of this model")
    assert [path.name for path in weight_files(folder)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
