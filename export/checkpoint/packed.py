"""Weights that a checkpoint stores as packed integers with scales: GPTQ, AWQ and compressed-tensors.

Every format packs 32 / bits integers into an int32, lowest bits first, and has one scale and one zero point for each
group of neighbours along K: ``weight = scale * (integer - zero point)``.

============================  ===========================  ==================================================
method                        integers                     zero points
============================  ===========================  ==================================================
GPTQ                          ``qweight [K / 8, N]``       ``qzeros [K / group, N / 8]``, minus 1 in version 1
AWQ (gemm)                    ``qweight [K, N / 8]``,      ``qzeros [K / group, N / 8]``, in the same order
                              in the order 0 2 4 6 1 3 5 7
compressed-tensors            ``weight_packed [N, K / 8]`` none if symmetric; else
(pack-quantized)                                           ``weight_zero_point [N / 8, K / group]``
============================  ===========================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promprune.errors import ModelError, UnsupportedModelError
from promprune.export.checkpoint.weights import StoredTensor
from promprune.package.manifest import WeightRecord

__all__ = ["PackedTensor", "PackedWeights", "packed_weights"]

Integers = NDArray[np.int8]
Method = Literal["gptq", "awq", "compressed-tensors"]

_AWQ_ORDER: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # position in the int32 of each of eight neighbours
_INTEGERS: Final = ("qweight", "weight_packed")  # the last part of a key
_SCALES: Final = ("scales", "weight_scale")
_ZERO_POINTS: Final = ("qzeros", "weight_zero_point")
_GROUPS: Final = ("g_idx", "weight_g_idx")
_EXPECTED: Final = "GPTQ, AWQ (gemm) or compressed-tensors (pack-quantized) with 4 or 8 bits, or floating point"


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """How a checkpoint packs its weights.

    Attributes:
        method: the format.
        bits: bits per integer, 4 or 8.
        group_size: neighbours along K with one scale; None for an entire column.
        zero_offset: number to add to the stored zero points.
    """

    method: Method
    bits: int
    group_size: int | None
    zero_offset: int = 0

    @property
    def record(self) -> WeightRecord:
        """The format of a package that keeps these integers."""
        return WeightRecord(format="int4" if self.bits == 4 else "int8", block_size=self.group_size)

    def combine(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Return a checkpoint's tensors with each packed weight as one tensor, under its key in an unpacked model."""
        prefixes = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in _INTEGERS}
        parts = (*_INTEGERS, *_SCALES, *_ZERO_POINTS, *_GROUPS, "weight_shape")
        combined = {
            key: tensor
            for key, tensor in tensors.items()
            if key.rpartition(".")[0] not in prefixes or key.rpartition(".")[2] not in parts
        }
        for prefix in prefixes:
            own = {part: tensors[f"{prefix}.{part}"] for part in parts if f"{prefix}.{part}" in tensors}
            combined[f"{prefix}.weight"] = PackedTensor.of(f"{prefix}.weight", own, self)
        return combined


@dataclass(frozen=True, kw_only=True)
class PackedTensor(StoredTensor):
    """A packed weight ``[N, K]``; reading it returns the dequantized values.

    Attributes:
        packing: how it is packed.
        integers, scales: its tensors.
        zero_points: None if all are in the middle of the range.
        groups: ``[K]``, the group of each row; None if groups are adjacent rows.
    """

    packing: PackedWeights
    integers: StoredTensor
    scales: StoredTensor
    zero_points: StoredTensor | None
    groups: StoredTensor | None

    @classmethod
    def of(cls, key: str, parts: Mapping[str, StoredTensor], packing: PackedWeights) -> PackedTensor:
        """Combine the tensors of one weight.

        Raises:
            ModelError: a tensor is missing.
        """

        def part(names: tuple[str, ...]) -> StoredTensor | None:
            return next((parts[name] for name in names if name in parts), None)

        integers, scales = part(_INTEGERS), part(_SCALES)
        if integers is None or scales is None:
            raise ModelError(f"the checkpoint has no scales for {key}", expected="integers with scales")
        rows, columns = integers.shape
        per_word = 32 // packing.bits
        shapes = {
            "gptq": (columns, rows * per_word),
            "awq": (columns * per_word, rows),
            "compressed-tensors": (rows, columns * per_word),
        }
        return cls(
            key=key,
            file=integers.file,
            dtype="F32",
            shape=shapes[packing.method],
            offset=1,  # unaligned: its bytes are never linked
            packing=packing,
            integers=integers,
            scales=scales,
            zero_points=part(_ZERO_POINTS),
            groups=part(_GROUPS),
        )

    @property
    def group_size(self) -> int:
        """Neighbours along K with one scale."""
        return self.packing.group_size or self.shape[1]

    @property
    def is_in_order(self) -> bool:
        """Whether groups are adjacent rows; GPTQ may have sorted rows by activations."""
        if self.groups is None:
            return True
        return bool((_array(self.groups) == np.arange(self.shape[1]) // self.group_size).all())

    def keeps_integers(self, bits: int, block_size: int) -> bool:
        """Whether symmetric integers of ``bits`` bits, in blocks of ``block_size``, can represent it exactly."""
        if block_size != self.group_size or not self.is_in_order:
            return False
        if bits == 8 and self.packing.bits == 4:  # integer minus zero point
            return True
        middle = 1 << (self.packing.bits - 1)
        zeros = self._zero_points()
        return bits == self.packing.bits and (zeros is None or bool((zeros == middle).all()))

    def unpacked(self) -> tuple[Integers, NDArray[np.float32]]:
        """Return integers minus their zero points, ``[K, N]``, and scales ``[groups, N]``."""
        zeros, scales = self._zero_points(), _array(self.scales).astype(np.float32)
        integers = self._unpack(_array(self.integers), of_zero_points=False)
        if self.packing.method == "compressed-tensors":
            scales = scales.T
        shift = (1 << (self.packing.bits - 1)) if zeros is None else zeros[self._group_indices(len(scales))]
        return (integers.astype(np.int16) - shift).astype(np.int8), scales

    def chunks(self, count: int | None = None) -> Iterator[Tensor]:
        """Yield its dequantized values in order, flat."""
        integers, scales = self.unpacked()
        indices, rows = self._group_indices(len(scales)), max(1, (count or self.size) // self.shape[1])
        for begin in range(0, self.shape[0], rows):
            columns = slice(begin, begin + rows)
            values = integers[:, columns] * scales[indices, columns]
            yield torch.from_numpy(np.ascontiguousarray(values.T)).flatten()

    def _group_indices(self, count: int) -> NDArray[np.int64]:
        """Return the group of each of the K rows."""
        if self.groups is not None:
            return _array(self.groups).astype(np.int64)
        return np.minimum(np.arange(self.shape[1]) // self.group_size, count - 1)

    def _zero_points(self) -> NDArray[np.int16] | None:
        if self.zero_points is None:
            return None
        stored = self._unpack(_array(self.zero_points), of_zero_points=True)
        return stored.astype(np.int16) + self.packing.zero_offset

    def _unpack(self, words: NDArray[np.int32], *, of_zero_points: bool) -> NDArray[np.uint8]:
        """Return unsigned integers as ``[K, N]`` or ``[groups, N]``."""
        method, bits = self.packing.method, self.packing.bits
        shifts = np.arange(0, 32, bits)
        values = ((words[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)
        if method == "awq":
            values = values[..., _AWQ_ORDER]
        in_rows = method == "gptq" and not of_zero_points
        if in_rows or (method == "compressed-tensors" and of_zero_points):  # packed along the first dimension
            flat = values.transpose(0, 2, 1).reshape(-1, words.shape[1])
        else:
            flat = values.reshape(len(words), -1)
        return flat.T if method == "compressed-tensors" else flat


def packed_weights(folder: Path, config: Any) -> PackedWeights | None:
    """Return how a checkpoint packs its weights, from its configuration; None if it is not quantized.

    Raises:
        UnsupportedModelError: it is quantized in an unsupported format.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        getattr(config, "text_config", None), "quantization_config", None
    )
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    found = _READERS[method](settings) if method in _READERS else None
    if found is None or found.bits not in (4, 8):
        raise UnsupportedModelError(
            f"{folder.name} is quantized ({method})", expected=_EXPECTED, fix="export the original checkpoint"
        )
    return found


def _gptq(settings: Mapping[str, Any]) -> PackedWeights:
    version_1 = settings.get("checkpoint_format", "gptq") != "gptq_v2"
    return PackedWeights(
        method="gptq",
        bits=int(settings["bits"]),
        group_size=_group_size(settings["group_size"]),
        zero_offset=1 if version_1 else 0,
    )


def _awq(settings: Mapping[str, Any]) -> PackedWeights | None:
    if str(settings.get("version", "gemm")).lower() != "gemm" or int(settings["bits"]) != 4:
        return None
    return PackedWeights(method="awq", bits=4, group_size=_group_size(settings["group_size"]))


def _compressed_tensors(settings: Mapping[str, Any]) -> PackedWeights | None:
    groups = list((settings.get("config_groups") or {}).values())
    weights = groups[0].get("weights") if len(groups) == 1 else None
    weights_only = len(groups) == 1 and groups[0].get("input_activations") is None
    if settings.get("format") != "pack-quantized" or weights is None or not weights_only:
        return None
    return PackedWeights(
        method="compressed-tensors",
        bits=int(weights["num_bits"]),
        group_size=_group_size(weights.get("group_size")),
    )


_READERS: Final = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}


def _group_size(stated: Any) -> int | None:
    return None if stated is None or int(stated) < 1 else int(stated)


def _array(stored: StoredTensor) -> NDArray[Any]:
    """Read a small or integer tensor in its stored dtype."""
    dtype = stored.numpy_dtype
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        data = stream.read(stored.size * dtype.itemsize)
    if len(data) < stored.size * dtype.itemsize:
        raise ModelError(f"{stored.file} ends inside the tensor {stored.key}", expected="a complete checkpoint")
    return cast("NDArray[Any]", np.frombuffer(data, dtype).reshape(stored.shape))
