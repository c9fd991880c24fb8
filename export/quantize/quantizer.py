"""Rounding weights to signed integers with one scale per block, in numpy.

A block is ``block_size`` neighbours along K, the dimension that a matrix product sums over. Quantization is symmetric:
``weight = scale * integer``, with integers in [-8, 7] for 4 bits, [-64, 63] for 7 and [-128, 127] for 8.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "Bits",
    "NotFiniteError",
    "QuantizedBlocks",
    "dequantize_blocks",
    "integer_range",
    "pack_int4",
    "quantize_blocks",
    "unpack_int4",
]

Bits = Literal[4, 7, 8]
Floats = NDArray[np.float32]

# A block's scale is its largest magnitude divided by one of these numbers. With 4 bits, clipping the largest weight of
# a block often costs less than the finer steps gain; with 8 bits the steps are fine enough.
_DIVISORS: Final[dict[Bits, tuple[float, ...]]] = {
    4: (7.0, 7.5, 8.0, 8.6, 9.2, 10.0),
    7: (63.0, 64.0),
    8: (127.0, 128.0),
}
_ELEMENTS_AT_ONCE: Final = 64 * 1024  # fits the processor's cache
_COLUMNS_AT_ONCE: Final = 1024
_LEAST_SCALE: Final = 2.0**-24  # the smallest positive number of fp16; scales must be positive


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


class QuantizedBlocks(NamedTuple):
    """A quantized weight.

    Attributes:
        integers: int8 ``[K, N]``.
        scales: ``[ceil(K / block_size), N]``, positive.
    """

    integers: NDArray[np.int8]
    scales: NDArray[Any]


def integer_range(bits: Bits) -> tuple[int, int]:
    """Return the lowest and the highest signed integer of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize_blocks(
    weights: Floats, *, bits: Bits, block_size: int, scale_dtype: DTypeLike = np.float16
) -> QuantizedBlocks:
    """Quantize a weight; each block gets the scale with the smallest squared error among several.

    Args:
        weights: fp32 ``[K, N]``, in any memory order; K need not be a multiple of ``block_size``.
        bits: 4, 7 or 8.
        block_size: neighbours along K that share one scale.
        scale_dtype: dtype of the scales; integers are computed with the scale after rounding to it.

    Raises:
        NotFiniteError: a weight is NaN or infinite.
    """
    length, columns = weights.shape
    quantized = QuantizedBlocks(
        np.empty((length, columns), np.int8), np.empty((-(-length // block_size), columns), scale_dtype)
    )
    parts = _parts(length, columns, block_size)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda part: _quantize_part(weights, quantized, part, bits, block_size), parts):
            pass
    return quantized


def dequantize_blocks(integers: NDArray[np.int8], scales: NDArray[Any], *, block_size: int) -> Floats:
    """Dequantize integers ``[K, N]`` with scales ``[ceil(K / block_size), N]``: fp32 ``[K, N]``."""
    weights = integers.astype(np.float32)
    for index, scale in enumerate(scales.astype(np.float32)):
        weights[index * block_size : (index + 1) * block_size] *= scale
    return weights


def pack_int4(integers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack integers in [-8, 7] in pairs, the first in the lower half of the byte, as ONNX stores them; flat."""
    pairs: NDArray[np.uint8] = integers.reshape(-1).view(np.uint8)
    if pairs.size % 2:
        pairs = np.append(pairs, np.uint8(0))
    low, high = pairs[0::2] & np.uint8(0xF), pairs[1::2] << np.uint8(4)
    packed: NDArray[np.uint8] = np.bitwise_or(low, high)
    return packed


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Invert :func:`pack_int4`."""
    pairs = np.empty((packed.size, 2), np.int8)
    pairs[:, 0] = (packed << 4).view(np.int8) >> 4
    pairs[:, 1] = packed.view(np.int8) >> 4
    return pairs.reshape(-1)[: int(np.prod(shape))].reshape(shape)


class _Part(NamedTuple):
    """Blocks and columns of a weight: first block, last block + 1, columns."""

    begin: int
    end: int
    columns: slice


def _parts(length: int, columns: int, block_size: int) -> list[_Part]:
    blocks = -(-length // block_size)
    step = max(1, _ELEMENTS_AT_ONCE // (block_size * min(columns, _COLUMNS_AT_ONCE)))
    return [
        _Part(begin, min(begin + step, blocks), slice(first, first + _COLUMNS_AT_ONCE))
        for first in range(0, columns, _COLUMNS_AT_ONCE)
        for begin in range(0, blocks, step)
    ]


def _quantize_part(weights: Floats, quantized: QuantizedBlocks, part: _Part, bits: Bits, block_size: int) -> None:
    rows = slice(part.begin * block_size, part.end * block_size)
    values = np.ascontiguousarray(weights[rows, part.columns])
    length, columns = values.shape
    if padding := (part.end - part.begin) * block_size - length:
        values = np.concatenate([values, np.zeros((padding, columns), np.float32)])
    scales, integers = _quantize(values.reshape(-1, block_size, columns), bits, quantized.scales.dtype)
    quantized.scales[part.begin : part.end, part.columns] = scales
    quantized.integers[rows, part.columns] = integers.reshape(-1, columns)[:length]


def _quantize(blocks: Floats, bits: Bits, scale_dtype: np.dtype[Any]) -> tuple[Floats, Floats]:
    """Return the scales ``[blocks, columns]`` and the integers of ``[blocks, block_size, columns]``, as fp32."""
    peaks = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    if not np.isfinite(peaks).all():
        raise NotFiniteError("a weight is NaN or infinite")
    search = _Search(blocks, bits)
    for divisor in _DIVISORS[bits]:
        search.try_scales(_as_stored(peaks / np.float32(divisor), scale_dtype))
    # The best scale for these integers by least squares; rounding with it may give other integers.
    integers = search.round(search.scales)
    products = np.einsum("bkn,bkn->bn", integers, blocks)
    squares = np.einsum("bkn,bkn->bn", integers, integers)
    search.try_scales(_as_stored(products / np.maximum(squares, 1), scale_dtype))
    scales = np.where(peaks == 0, np.float32(1), search.scales)
    return scales, search.round(scales)


def _as_stored(scales: Floats, dtype: np.dtype[Any]) -> Floats:
    """Round positive scales to ``dtype``."""
    stored: Floats = np.maximum(scales, np.float32(_LEAST_SCALE)).astype(dtype).astype(np.float32)
    return stored


class _Search:
    """The scales with the smallest squared error so far.

    Args:
        blocks: fp32 ``[blocks, block_size, columns]``.
        bits: bits per integer.
    """

    def __init__(self, blocks: Floats, bits: Bits) -> None:
        self._blocks = blocks
        self._range = integer_range(bits)
        self._integers, self._errors = np.empty_like(blocks), np.empty_like(blocks)
        self._least = np.full((len(blocks), blocks.shape[2]), np.inf, np.float32)
        self.scales = np.ones_like(self._least)

    def round(self, scales: Floats) -> Floats:
        """Return the integers for scales, as fp32; valid until the next call."""
        np.multiply(self._blocks, (1 / scales)[:, None], out=self._integers)
        np.rint(self._integers, out=self._integers)
        return np.clip(self._integers, *self._range, out=self._integers)

    def try_scales(self, scales: Floats) -> None:
        """Keep those of ``scales [blocks, columns]`` that have a smaller error."""
        np.multiply(self.round(scales), scales[:, None], out=self._errors)
        np.subtract(self._blocks, self._errors, out=self._errors)
        error = np.einsum("bkn,bkn->bn", self._errors, self._errors)
        better = error < self._least
        self.scales = np.where(better, scales, self.scales)
        self._least = np.where(better, error, self._least)
