"""Measuring the ceilings of a device for the roofline."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from promprune.errors import BackendError
from promprune.runtime.bench.report import Ceilings
from promprune.runtime.sessions import Session, Value, open_file
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = ["CeilingProbe", "open_ceiling_probe"]

_COPY, _READ = "copy", "read"  # the others are named by their dtypes
_PRODUCT_SIDE: Final = {"CPU": 2048, "CUDA": 8192}
_MEMORY_BYTES: Final = {"CPU": 2**28, "CUDA": 2**31}
_ROW: Final = 8192  # numbers per row of the array that measures memory


class CeilingProbe:
    """Large matrix products, a large copy and a large sum in ONNX Runtime; the fastest of all runs counts.

    Memory is measured in two ways, because a copy writes as much as it reads, while a decode step mostly reads.

    Args:
        dtypes: dtypes of the products: ``"fp32"``, ``"fp16"`` or ``"bf16"`` (measured as fp16, which is as fast).
        device: ``"CPU"`` or ``"CUDA"``.
        threads: number of CPU threads.

    Raises:
        BackendError: ONNX Runtime cannot use the device.
    """

    def __init__(self, dtypes: Iterable[str], *, device: str, threads: int) -> None:
        self._device = device
        config = RuntimeConfig(provider="cuda" if device == "CUDA" else "cpu", num_threads=threads)
        rows = _MEMORY_BYTES[device] // (4 * _ROW)
        self._sessions = {
            _COPY: _one_operator("Neg", ["rows", _ROW], None, config),
            _READ: _one_operator("ReduceSum", ["rows", _ROW], np.array([1]), config),
        }
        self._inputs: dict[str, Value] = {_COPY: np.ones((rows, _ROW), np.float32)}
        for dtype in dtypes:
            # Every run's input is the result before; with this factor, it neither overflows nor vanishes.
            side = _PRODUCT_SIDE[device]
            factor = np.random.default_rng(0).normal(size=(side, side)) / np.sqrt(side)
            self._inputs[dtype] = factor.astype("float32" if dtype == "fp32" else "float16")  # bf16 is as fast as fp16
            self._sessions[dtype] = _one_operator("MatMul", ["rows", side], self._inputs[dtype], config)
        self._best_s = dict.fromkeys(self._sessions, float("inf"))

    def run(self) -> None:
        """Run each operation once; from the second time on, its inputs are already on the device."""
        for name, session in self._sessions.items():
            given = self._inputs[_COPY if name == _READ else name]  # the sum reads the copied array
            start = time.perf_counter()
            made = session.run_keeping({"x": given}, keep={"y"})["y"]
            self._best_s[name] = min(self._best_s[name], time.perf_counter() - start)
            if name != _READ:
                self._inputs[name] = made

    def result(self) -> Ceilings:
        """Return the highest measured rates."""
        side, size = _PRODUCT_SIDE[self._device], _MEMORY_BYTES[self._device]
        dtypes = [name for name in self._sessions if name not in (_COPY, _READ)]
        return Ceilings(
            device=self._device,
            product_flops_per_s={dtype: 2 * side**3 / self._best_s[dtype] for dtype in dtypes},
            product=f"{side} x {side} x {side}",
            copy_bytes_per_s=2 * size / self._best_s[_COPY],
            read_bytes_per_s=size / self._best_s[_READ],
            memory=f"{size // 2**20} MiB",
        )

    def close(self) -> None:
        """Free the sessions and arrays."""
        for session in self._sessions.values():
            session.close()
        self._inputs.clear()


def open_ceiling_probe(dtypes: Iterable[str], *, device: str, threads: int) -> CeilingProbe | None:
    """Return a probe of the device that the packages run on; None if ONNX Runtime cannot use that device."""
    try:
        return CeilingProbe(dtypes, device=device, threads=threads)
    except BackendError:  # engines run on CUDA also if ONNX Runtime has no CUDA
        return None


def _one_operator(operator: str, shape: list[str | int], constant: Any, config: RuntimeConfig) -> Session:
    """Load a graph of one operator, y = operator(x, constant); x has the constant's dtype if it is a matrix product."""
    dtype = constant.dtype if operator == "MatMul" else np.dtype("float32")
    constants = [] if constant is None else [numpy_helper.from_array(constant, "w")]
    node = helper.make_node(operator, ["x", *(tensor.name for tensor in constants)], ["y"])
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    x, y = (helper.make_tensor_value_info(*value) for value in (("x", kind, shape), ("y", kind, ["rows", "columns"])))
    graph = helper.make_graph([node], "ceiling", [x], [y], constants)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{operator}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
        return open_file(path, config)
