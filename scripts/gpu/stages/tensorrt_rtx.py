"""Whether TensorRT for RTX, made for other GPUs, starts on this one; the exact messages if it does not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes


def run(sizes: Sizes, record: Record) -> None:
    """Record rows of ``package`` and ``what``: an engine of one layer, and the engines of the embedded model."""
    import tensorrt_rtx as trt

    record.fact("tensorrt_rtx", trt.__version__)
    record.attempt(lambda: one_layer(trt), package="one layer", what="engine for this GPU")
    if sizes.device == "cuda":
        record.attempt(_embedded, package="embedded model", what="engines for this GPU")


def one_layer(trt: Any) -> dict[str, Any]:
    """Build and load an engine of one activation; fail with what TensorRT logged."""
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:  # the most severe is the lowest
                messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    layer = network.add_activation(network.add_input("x", trt.float32, (1, 8)), trt.ActivationType.RELU)
    network.mark_output(layer.get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = None if plan is None else trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(" | ".join(messages[-4:]) or "no engine, and no message")
    return {"result": f"built, {memoryview(plan).nbytes} bytes, and loaded"}


def _embedded() -> dict[str, Any]:
    from promprune.export import export_package
    from promprune.export.config import ExportConfig
    from promprune.export.engine.build import build_engines
    from promprune.package.engines import EngineConfig

    with tempfile.TemporaryDirectory() as scratch:
        package = export_package(ExportConfig(output=Path(scratch) / "package", verify=False)).output
        (built,) = build_engines(package, EngineConfig(backend="tensorrt-rtx"))
        return {"result": f"built {', '.join(built.manifest.engines)}"}
