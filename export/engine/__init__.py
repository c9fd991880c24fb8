"""From ONNX graphs to engines: TensorRT and TensorRT for RTX, whose Python APIs are the same, behind one interface.

Needs one of the two modules, and neither torch nor onnx. TensorRT builds for the GPU of this machine; TensorRT for
RTX builds for any target it knows, on machines without a GPU as well.

Networks are strongly typed: precision is what the graph says. TF32 is off, because the Gram product of the
selection needs whole fp32 products.
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
