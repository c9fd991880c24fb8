"""Configurations of hostile checkpoints are refused in one line before a module is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from promprune.errors import ModelError
from promprune.export.checkpoint.limits import check_config
from promprune.package.sources import embedded_model_folder

CHANGES: dict[str, dict[str, Any]] = {
    "text_config": {
        "num_hidden_layers": 1_000_000,
        "num_attention_heads": 0,
        "hidden_size": 10**9,
        "vocab_size": -1,
        "pad_token_id": 2**62,
        "max_position_embeddings": 0,
        "quantization_config": {"quant_method": "awq"},
    },
    "vision_config": {
        "patch_size": 0,
        "image_size": 1_000_000,
        "hidden_size": 0,
        "num_attention_heads": 10**6,
        "num_hidden_layers": -3,
        "num_channels": 1e300,
    },
}
CASES = [(section, key) for section, keys in CHANGES.items() for key in keys]
EMBEDDED = json.loads((embedded_model_folder() / "config.json").read_text())


@pytest.mark.parametrize(("section", "key"), CASES)
def test_values_out_of_range_are_refused(section: str, key: str) -> None:
    config = {**EMBEDDED, section: {**EMBEDDED[section], key: CHANGES[section][key]}}
    with pytest.raises(ModelError, match=f"{section}") as caught:
        check_config(config, Path("config.json"))
    assert "\n" not in str(caught.value)


def test_the_embedded_model_is_within_the_limits() -> None:
    check_config(EMBEDDED, Path("config.json"))


def test_deeply_nested_configurations_end() -> None:
    config: dict[str, Any] = {}
    for _ in range(500):
        config = {"a": config}
    check_config(config, Path("config.json"))


DAMAGED: dict[str, dict[str, Any]] = {
    "config.json": {"text_config": {"num_attention_heads": 7}},
    "config.json ": {"text_config": {"hidden_act": "nothing"}},
    "config.json  ": {"vision_config": {"model_type": 5}},
    "config.json   ": {"text_config": []},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*DAMAGED, "empty", "index"])
def test_what_the_libraries_raise_is_one_line(tmp_path: Path, case: str) -> None:
    from promprune.export.checkpoint.loading import load_checkpoint

    folder = tmp_path / "model"
    shutil.copytree(embedded_model_folder(), folder)
    if case == "empty":
        (folder / "generation_config.json").write_bytes(b"")
    elif case == "index":
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    else:
        path = folder / case.strip()
        content = json.loads(path.read_text())
        for key, value in DAMAGED[case].items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
