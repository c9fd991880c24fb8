"""How fast the device is at its best: what the roofline is drawn with."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from promprune.bench.report import Ceilings
from promprune.runtime.sessions import Session, SessionOptions, Value, open_session

__all__ = ["CeilingProbe"]

_PRODUCT_SIDE: Final = {"CPU": 2048, "CUDA": 8192}
_COPY_BYTES: Final = {"CPU": 2**28, "CUDA": 2**31}


class CeilingProbe:
    """One large matrix product and one large copy in ONNX Runtime, run as often as asked; the best of each counts.

    Args:
        dtype: of the product: ``"fp32"``, ``"fp16"`` or ``"bf16"`` (measured as fp16, which is as fast).
        provider, threads: as the contenders have them.
    """

    def __init__(self, dtype: str, *, provider: str, threads: int) -> None:
        self._dtype = np.dtype("float32" if dtype == "fp32" else "float16")
        options = SessionOptions(provider=provider, num_threads=threads)
        self._copy = _one_operator("Neg", ["length"], None, self._dtype, options)
        self._device = self._copy.device
        side, length = _PRODUCT_SIDE[self._device], _COPY_BYTES[self._device] // self._dtype.itemsize
        # Fed with its own result again and again; of this size, that neither grows nor vanishes.
        factor = (np.random.default_rng(0).normal(size=(side, side)) / np.sqrt(side)).astype(self._dtype)
        self._product = _one_operator("MatMul", ["rows", side], factor, self._dtype, options)
        self._inputs: dict[str, Value] = {"copy": np.ones(length, self._dtype), "product": factor}
        self._best_s = {"copy": float("inf"), "product": float("inf")}

    def run(self) -> None:
        """Run each once; from the second time on, with inputs that are on the device already."""
        for name, session in (("copy", self._copy), ("product", self._product)):
            start = time.perf_counter()
            self._inputs[name] = session.run_keeping({"x": self._inputs[name]}, keep={"y"})["y"]
            self._best_s[name] = min(self._best_s[name], time.perf_counter() - start)

    def result(self) -> Ceilings:
        """Return what was reached at best."""
        side, size = _PRODUCT_SIDE[self._device], _COPY_BYTES[self._device]
        return Ceilings(
            product_flops_per_s=2 * side**3 / self._best_s["product"],
            product=f"{side} x {side} x {side}, {self._dtype}, {self._device}",
            copy_bytes_per_s=2 * size / self._best_s["copy"],
            copy=f"{size // 2**20} MiB read and written, {self._device}",
        )

    def close(self) -> None:
        """Free what it holds."""
        self._copy.close()
        self._product.close()


def _one_operator(
    operator: str, shape: list[str | int], factor: Any, dtype: np.dtype[Any], options: SessionOptions
) -> Session:
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    constants = [] if factor is None else [numpy_helper.from_array(factor, "w")]
    node = helper.make_node(operator, ["x", *(tensor.name for tensor in constants)], ["y"])
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name in "xy")
    graph = helper.make_graph([node], "ceiling", [x], [y], constants)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{operator}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
        return open_session(path, options)
