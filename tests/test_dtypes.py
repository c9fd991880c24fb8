"""The one table of element types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives numpy its "bfloat16"
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from promprune.dtypes import (
    BY_NAME,
    BY_NUMPY,
    BY_ONNXRUNTIME,
    BY_SAFETENSORS,
    BY_TENSORRT,
    DTYPES,
    ELEMENT_TYPES,
    ElementType,
)

ROOT = Path(__file__).parent.parent
NAMES = {name for table in (BY_NAME, BY_NUMPY, BY_ONNXRUNTIME, BY_SAFETENSORS, BY_TENSORRT) for name in table} | {
    row.numpy.removesuffix("fn") for row in ELEMENT_TYPES
}


def dtype_tables(source: str) -> Iterator[int]:
    """Yield the lines of dict literals that map two or more names of element types to other names or whole numbers.

    Tables of limits map them to fractions: those say how exact a type is, not what it is called.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            keys = [key for key in node.keys if key is not None and is_dtype(key)]
            plain = all(is_name_or_number(value) for value in node.values)
            if len(keys) >= 2 and plain:
                yield node.lineno


def is_name_or_number(value: ast.expr) -> bool:
    return isinstance(value, ast.Attribute) or (isinstance(value, ast.Constant) and not isinstance(value.value, float))


def is_dtype(key: ast.expr) -> bool:
    """Such as ``"float32"``, ``"fp32"``, ``torch.float32`` or ``TensorProto.FLOAT``."""
    if isinstance(key, ast.Constant):
        return key.value in NAMES
    return isinstance(key, ast.Attribute) and key.attr in NAMES


def test_there_is_one_table_of_element_types() -> None:
    files = [file for part in ("promprune", "runtime", "export") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in dtype_tables(file.read_text())]
    assert not found, f"dtype tables {1 + len(found)}: {found}; expected promprune/dtypes.py alone"


@pytest.mark.parametrize("table", ['{"float32": 1, "float16": 2}', '{torch.float32: "F32", torch.float16: "F16"}'])
def test_another_table_would_be_found(table: str) -> None:
    assert list(dtype_tables(f"TABLE = {table}")) == [1]


def test_no_name_stands_twice() -> None:
    for table in (BY_NAME, BY_NUMPY):
        assert len(table) == len(ELEMENT_TYPES)
    for column in ("onnx", "onnxruntime", "tensorrt", "safetensors"):
        names = [value for row in ELEMENT_TYPES if (value := getattr(row, column))]
        assert len(names) == len(set(names))
    assert set(DTYPES) <= BY_NAME.keys()


@pytest.mark.parametrize("row", ELEMENT_TYPES, ids=lambda row: row.name)
def test_the_libraries_call_it_so(row: ElementType) -> None:
    assert onnx.helper.tensor_dtype_to_np_dtype(row.onnx).name == row.numpy
    if row.name != "int4":  # numpy holds one in a byte
        assert np.dtype(row.numpy).itemsize * 8 == row.bits
    if row.onnxruntime:
        value = ort.OrtValue.ortvalue_from_shape_and_type([1], row.onnx, "cpu")
        assert value.data_type() == row.onnxruntime


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("row", [row for row in ELEMENT_TYPES if row.safetensors], ids=lambda row: row.name)
def test_torch_calls_it_so(row: ElementType) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    dtype = getattr(torch, row.numpy)
    assert dtype.itemsize * 8 == row.bits
    assert f'"{row.safetensors}"'.encode() in safetensors.save({"a": torch.zeros(1, dtype=dtype)})
    if row.torch_storage:
        assert getattr(torch, row.torch_storage).dtype == dtype


def test_tensorrt_calls_it_so() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (Linux x86-64 only)")
    for row in ELEMENT_TYPES:
        if row.tensorrt:
            assert row.tensorrt in trt.DataType.__members__
