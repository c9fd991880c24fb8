"""Building engines from ONNX graphs with TensorRT or TensorRT for RTX, which have the same Python API.

Needs one of the two modules, and neither torch nor onnx. TensorRT builds for the GPU of this machine; TensorRT for
RTX builds for any target it knows, also on machines without a GPU.

Networks are strongly typed: the graph determines the precision. TF32 is off, because the Gram matrix of the selection
needs the full precision of fp32.
"""

from __future__ import annotations

from promprune.export.engine.build import BuiltEngines, build_engines
from promprune.export.engine.network import engine_from_onnx
from promprune.export.engine.profiles import profiles_of
from promprune.export.engine.toolkit import Toolkit, load_toolkit

__all__ = [
    "BuiltEngines",
    "Toolkit",
    "build_engines",
    "engine_from_onnx",
    "load_toolkit",
    "profiles_of",
]
