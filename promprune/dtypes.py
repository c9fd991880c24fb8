"""Element types of tensors and their names in every library that this project uses: the only such table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

__all__ = [
    "BY_NAME",
    "BY_NUMPY",
    "BY_ONNXRUNTIME",
    "BY_SAFETENSORS",
    "BY_TENSORRT",
    "DTYPES",
    "ELEMENT_TYPES",
    "WEIGHT_FORMATS",
    "Dtype",
    "ElementType",
    "WeightFormat",
    "is_quantized",
]

# The dtypes of a package's activations, inputs and outputs.
Dtype = Literal["fp32", "fp16", "bf16"]

DTYPES: Final = get_args(Dtype)

# Of the weights of its matrix products.
WeightFormat = Literal["fp32", "fp16", "bf16", "int8", "int4"]

WEIGHT_FORMATS: Final = get_args(WeightFormat)


def is_quantized(weight_format: WeightFormat) -> bool:
    """Whether weights in a format are integers with scales."""
    return weight_format not in DTYPES


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type; a name is empty if there is none, or if nothing here uses it.

    Attributes:
        name: in this project's options and manifests.
        numpy: numpy's name, with those of ``ml_dtypes``; also the attribute's name in ``torch``.
        onnx: number in ``onnx.TensorProto.DataType`` and ``onnx_ir.DataType``.
        onnxruntime: what ONNX Runtime calls a tensor of it.
        tensorrt: member of ``tensorrt.DataType``.
        safetensors: name in the header of a safetensors file.
        bits: size of one element.
        torch_storage: class that a file of ``torch.save`` names.
    """

    name: str
    numpy: str
    onnx: int
    onnxruntime: str
    tensorrt: str
    safetensors: str
    bits: int
    torch_storage: str = ""


ELEMENT_TYPES: Final = (
    ElementType("fp64", "float64", 11, "tensor(double)", "", "F64", 64),
    ElementType("fp32", "float32", 1, "tensor(float)", "FLOAT", "F32", 32, "FloatStorage"),
    ElementType("fp16", "float16", 10, "tensor(float16)", "HALF", "F16", 16, "HalfStorage"),
    ElementType("bf16", "bfloat16", 16, "tensor(bfloat16)", "BF16", "BF16", 16, "BFloat16Storage"),
    ElementType("fp8_e4m3", "float8_e4m3fn", 17, "", "FP8", "F8_E4M3", 8),
    ElementType("fp8_e5m2", "float8_e5m2", 19, "", "", "F8_E5M2", 8),
    ElementType("int64", "int64", 7, "tensor(int64)", "INT64", "I64", 64),
    ElementType("int32", "int32", 6, "tensor(int32)", "INT32", "I32", 32),
    ElementType("int16", "int16", 5, "", "", "I16", 16),
    ElementType("int8", "int8", 3, "tensor(int8)", "INT8", "I8", 8),
    ElementType("int4", "int4", 22, "", "INT4", "", 4),
    ElementType("uint64", "uint64", 13, "", "", "U64", 64),
    ElementType("uint32", "uint32", 12, "", "", "U32", 32),
    ElementType("uint16", "uint16", 4, "", "", "U16", 16),
    ElementType("uint8", "uint8", 2, "tensor(uint8)", "UINT8", "U8", 8),
    ElementType("bool", "bool", 9, "tensor(bool)", "BOOL", "BOOL", 8),
)

BY_NAME: Final[Mapping[str, ElementType]] = MappingProxyType({row.name: row for row in ELEMENT_TYPES})
BY_NUMPY: Final[Mapping[str, ElementType]] = MappingProxyType({row.numpy: row for row in ELEMENT_TYPES})
BY_ONNXRUNTIME: Final[Mapping[str, ElementType]] = MappingProxyType(
    {row.onnxruntime: row for row in ELEMENT_TYPES if row.onnxruntime}
)
BY_TENSORRT: Final[Mapping[str, ElementType]] = MappingProxyType(
    {row.tensorrt: row for row in ELEMENT_TYPES if row.tensorrt}
)
BY_SAFETENSORS: Final[Mapping[str, ElementType]] = MappingProxyType(
    {row.safetensors: row for row in ELEMENT_TYPES if row.safetensors}
)
