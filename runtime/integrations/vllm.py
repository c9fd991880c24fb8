"""Passing kept visual tokens to a language model that runs elsewhere.

An OpenAI-compatible vLLM server started with ``--enable-mm-embeds`` takes them as a part of a message::

    with ImageEncoder.from_package("llava-0.12") as encoder:
        part = image_embeds_part(encoder.encode_image("photo.jpg"))
    message = {"role": "user", "content": [part, {"type": "text", "text": "What is on the table?"}]}

The tensor inside has the format of PyTorch's ``torch.save``, which every version of that server reads; writing it does
not need PyTorch. For a Hugging Face model, put ``image_features`` at the image's placeholders in ``inputs_embeds``.
"""

from __future__ import annotations

import base64
import io
import struct
import sys
import zipfile
from typing import Any, Final

import numpy as np

from promprune.dtypes import ELEMENT_TYPES
from promprune.errors import ConfigError
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.sessions import Array

__all__ = ["image_embeds_part", "torch_bytes"]

_STORAGES: Final = {dtype.numpy: dtype.torch_storage for dtype in ELEMENT_TYPES if dtype.torch_storage}


def image_embeds_part(image: EncodedImage) -> dict[str, Any]:
    """Return the part of an OpenAI-style message that contains an image's kept tokens, [T, D]."""
    content = base64.b64encode(torch_bytes(image.image_features)).decode("ascii")
    return {"type": "image_embeds", "image_embeds": content}


def torch_bytes(array: Array) -> bytes:
    """Return the bytes that ``torch.save`` would write for a tensor; ``torch.load(..., weights_only=True)`` reads them.

    Args:
        array: float32, float16 or bfloat16 [rows, columns].

    Raises:
        ConfigError: another dtype or rank.
    """
    if array.dtype.name not in _STORAGES or array.ndim != 2:
        raise ConfigError(
            f"received an array {array.dtype}{list(array.shape)}",
            expected="float32, float16 or bfloat16 [rows, columns]",
        )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle_tensor(array))
        archive.writestr("archive/byteorder", sys.byteorder)
        archive.writestr("archive/data/0", np.ascontiguousarray(array, array.dtype.newbyteorder("=")).tobytes())
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def _pickle_tensor(array: Array) -> bytes:
    """Return the pickle (protocol 2) of ``_rebuild_tensor_v2(storage 0, offset, size, stride, False, {})``."""
    rows, columns = array.shape
    storage = b"(" + _text("storage") + _global("torch", _STORAGES[array.dtype.name])
    storage += _text("0") + _text("cpu") + _int(array.size) + b"tQ"  # a tuple, and the object it is the id of
    size = _int(rows) + _int(columns) + b"\x86"
    stride = _int(columns) + _int(1) + b"\x86"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + _int(0) + size + stride + b"\x89" + hooks + b"t"
    return b"\x80\x02" + _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R."


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
