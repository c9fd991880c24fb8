"""Kept tokens as other language models take them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch

from promprune.errors import ConfigError
from promprune.runtime import EncodedImage, TokenSelection
from promprune.runtime.integrations.vllm import image_embeds_part, torch_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (69, 4096), (576, 3), (0, 5)])
def test_torch_reads_what_is_written(dtype: str, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for given in (array, np.asfortranarray(array)):
        loaded = torch.load(io.BytesIO(torch_bytes(given)), weights_only=True)
        assert (str(loaded.dtype), tuple(loaded.shape)) == (f"torch.{dtype}", shape)
        np.testing.assert_array_equal(loaded.float().numpy(), array.astype(np.float32))
        assert loaded.is_contiguous()


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((1, 2, 3), np.float32)])
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"expected float32, float16 or bfloat16 \[rows, columns\]"):
        torch_bytes(array)


def test_a_message_part_is_json() -> None:
    features = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    part = json.loads(json.dumps(image_embeds_part(EncodedImage(features, TokenSelection((), np.arange(4))))))
    assert part["type"] == "image_embeds"
    content = base64.b64decode(part["image_embeds"], validate=True)
    with torch.sparse.check_sparse_tensor_invariants():  # as the server reads it
        loaded = torch.load(io.BytesIO(content), weights_only=True).to_dense()
    np.testing.assert_array_equal(loaded.numpy(), features)
