"""Weights of a checkpoint as integers and scales of a graph, quantized while they are written."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from promprune.dtypes import Dtype
from promprune.errors import ModelError
from promprune.export.checkpoint.packed import PackedTensor
from promprune.export.checkpoint.weights import LazyWeight, StoredTensor
from promprune.export.quantize.quantizer import (
    Bits,
    NotFiniteError,
    QuantizedBlocks,
    dequantize_blocks,
    pack_int4,
    quantize_blocks,
)
from promprune.package.manifest import WeightRecord

__all__ = ["MIN_BLOCK_SIZE", "QuantizedTensor", "QuantizedWeight", "WeightQuantization"]

MIN_BLOCK_SIZE: Final = 16  # the smallest that ONNX Runtime and TensorRT have kernels for
_ELEMENTS_AT_ONCE: Final = 16 * 1024 * 1024  # elements of a weight in fp32
_INTEGER_DTYPES: Final[dict[Bits, ir.DataType]] = {4: ir.DataType.INT4, 7: ir.DataType.INT8, 8: ir.DataType.INT8}

Part = Literal["integers", "scales"]


@dataclass(frozen=True, kw_only=True)
class WeightQuantization:
    """How a weight is quantized.

    Attributes:
        bits: bits per integer.
        block_size: neighbours along K that share one scale; None for an entire column.
        scale_dtype: fp16, also in graphs that compute in fp32; bf16 in graphs that compute in bf16.
    """

    bits: Bits
    block_size: int | None
    scale_dtype: ir.DataType = ir.DataType.FLOAT16

    @classmethod
    def of(cls, record: WeightRecord, dtype: Dtype) -> WeightQuantization:
        """Return the quantization of a package's record; ``dtype`` is the package's.

        With activations in int8, weights have 7 bits: processors with AVX2 add two products of 8-bit integers in 16
        bits, which would saturate.
        """
        bits: Bits = 4 if record.format == "int4" else 7 if record.int8_activations else 8
        scale_dtype = ir.DataType.BFLOAT16 if dtype == "bf16" else ir.DataType.FLOAT16
        return cls(bits=bits, block_size=record.block_size, scale_dtype=scale_dtype)

    def block_of(self, length: int) -> int | None:
        """Return the block size for K = ``length``: the largest that divides it; None if there is none.

        TensorRT supports complete blocks only, and so does ONNX Runtime for its smallest block size.
        """
        block = self.block_size
        while block is not None and block >= MIN_BLOCK_SIZE and length % block:
            block //= 2
        return length if block is None else block if block >= MIN_BLOCK_SIZE else None


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A matrix of a checkpoint, ``[N, K]`` as ``torch.nn.Linear`` stores it, as integers ``[K, N]`` and scales.

    Attributes:
        stored: the checkpoint's tensor.
        quantization: how it is quantized.
    """

    stored: StoredTensor
    quantization: WeightQuantization
    _parts: dict[Part, ir.TensorProtocol] = field(default_factory=dict, compare=False, repr=False)

    @property
    def block_size(self) -> int:
        """Neighbours along K that share a scale."""
        block = self.quantization.block_of(self.stored.shape[1])
        if block is None:
            raise ValueError(f"{self.stored.key} has {self.stored.shape[1]} columns, not a multiple of any block size")
        return block

    def quantized(self) -> QuantizedBlocks:
        """Quantize the weight, one part at a time in fp32; a checkpoint's own integers are kept if possible.

        Raises:
            ModelError: a weight is NaN or infinite, or the file became shorter.
        """
        if isinstance(self.stored, PackedTensor) and self.stored.keeps_integers(
            self.quantization.bits, self.block_size
        ):
            unpacked, group_scales = self.stored.unpacked()
            return QuantizedBlocks(unpacked, group_scales.astype(self.quantization.scale_dtype.numpy()))
        columns, length = self.stored.shape
        scale_dtype = self.quantization.scale_dtype.numpy()
        integers = np.empty((length, columns), np.int8)
        scales = np.empty((length // self.block_size, columns), scale_dtype)
        rows, begin = max(1, _ELEMENTS_AT_ONCE // length), 0
        for chunk in self.stored.chunks(rows * length):
            weights = chunk.float().view(-1, length).numpy().T
            part = slice(begin, begin + weights.shape[1])
            try:
                integers[:, part], scales[:, part] = quantize_blocks(
                    weights, bits=self.quantization.bits, block_size=self.block_size, scale_dtype=scale_dtype
                )
            except NotFiniteError as error:
                raise ModelError(f"{self.stored.key} has values that are NaN or infinite") from error
            begin = part.stop
        return QuantizedBlocks(integers, scales)

    def read(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantized weight: ``[N, K]``."""
        integers, scales = self.quantized()
        return torch.from_numpy(dequantize_blocks(integers, scales, block_size=self.block_size)).T.to(dtype)

    def tensors(self, name: str) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Return the integers and the scales as values of a graph's initializers.

        Integers are ``[K, N]``; scales ``[K / block_size, N]``, or ``[N]`` with one scale per column.
        """
        length, columns = self.stored.shape[1], self.stored.shape[0]
        shape = (columns,) if self.block_size == length else (length // self.block_size, columns)
        integers = _INTEGER_DTYPES[self.quantization.bits]
        return (
            QuantizedTensor(self, "integers", integers, (length, columns), f"{name}_quantized"),
            QuantizedTensor(self, "scales", self.quantization.scale_dtype, shape, f"{name}_scale"),
        )

    def take(self, part: Part, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Return one part and release it: the weight is quantized only once if each part is taken once."""
        if part not in self._parts:
            integers, scales = self.quantized()
            self._parts["integers"] = self._integer_tensor(integers)
            self._parts["scales"] = ir.Tensor(scales.reshape(-1, *shape[1:]), dtype=self.quantization.scale_dtype)
        return self._parts.pop(part)

    def _integer_tensor(self, integers: NDArray[np.int8]) -> ir.TensorProtocol:
        if self.quantization.bits == 4:
            return ir.PackedTensor(pack_int4(integers), ir.DataType.INT4, shape=ir.Shape(integers.shape))
        return ir.Tensor(integers, dtype=ir.DataType.INT8)


class QuantizedTensor(LazyWeight):
    """The integers or the scales of a weight; computed when they are used."""

    def __init__(
        self, weight: QuantizedWeight, part: Part, dtype: ir.DataType, shape: tuple[int, ...], name: str
    ) -> None:
        super().__init__(lambda: weight.take(part, shape), dtype, ir.Shape(shape), name=name)
        self.weight = weight
        self.part = part

    @property
    def identity(self) -> Hashable:
        """A key that equal tensors share."""
        return (self.weight, self.part)
