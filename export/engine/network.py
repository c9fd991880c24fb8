"""Building one engine from one ONNX graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from promprune.errors import BackendError
from promprune.export.engine.failures import build_error
from promprune.export.engine.progress import Report, holding_signals, make_monitor
from promprune.export.engine.toolkit import Toolkit
from promprune.files import replace_file
from promprune.package.agree import check_graph
from promprune.package.engines import EngineConfig, ProfileRecord
from promprune.package.manifest import GraphRecord, TensorRecord
from promprune.runtime.sessions.tensorrt.modules import log_of, tensor_record, trimmed

__all__ = ["engine_from_onnx"]

DEFAULTS: Final = EngineConfig()


def engine_from_onnx(
    toolkit: Toolkit,
    path: Path,
    graph: GraphRecord | None,
    *,
    profiles: tuple[ProfileRecord, ...],
    target: str,
    config: EngineConfig = DEFAULTS,
    timing_cache: Path | None = None,
    report: Report = lambda fraction, phase: None,
) -> Any:
    """Build one engine.

    Args:
        toolkit: which TensorRT.
        path: the ONNX file; its external weights are in the same folder.
        graph: record whose inputs and outputs the file must have; None to skip this check.
        profiles: shape ranges of the inputs.
        target: a target, as returned by :meth:`Toolkit.resolve`.
        config: settings of the engine; ``profiles`` already contains those of the profiles.
        timing_cache: file with measured kernels to use and to extend, if the toolkit measures kernels.
        report: called with the fraction done, in [0, 1], and the builder's phase.

    Returns:
        The serialized engine. It supports the buffer protocol; the buffer is valid while the object exists.

    Raises:
        BackendError: the graph cannot be built; out of memory; or the target's GPU is needed and missing.
        PackageError: the file's inputs or outputs are not those of ``graph``.
        KeyboardInterrupt: while building; the builder stops at its next step.
    """
    trt, log = toolkit.module, log_of(toolkit.module)
    log.errors.clear()
    try:
        builder = trt.Builder(log)
        network = builder.create_network(_network_flags(trt))
        _parse(trt, network, log, path)
        if graph is not None:
            inputs, outputs = _tensors(network)
            check_graph(path, inputs, outputs, graph)
        _allow_decomposition(trt, network)
        settings = builder.create_builder_config()
        _configure(toolkit, settings, target, config)
        _add_profiles(builder, settings, profiles)
        with holding_signals() as pending, _timing_cache(toolkit, settings, timing_cache):
            settings.progress_monitor = monitor = make_monitor(trt, report, pending)
            plan = builder.build_serialized_network(network, settings)
    except MemoryError as error:
        raise build_error(path, target, ["out of memory"]) from error
    except (TypeError, RuntimeError) as error:  # the bindings raise these for a null pointer
        raise build_error(path, target, [*log.errors, trimmed(error)]) from error
    del monitor  # must stay alive until here: the builder holds no reference
    if plan is None:
        raise build_error(path, target, list(log.errors))
    return plan


def _network_flags(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)  # versions without the flag always use strong typing


def _parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    node = next((error for error in errors if error.node_name() or error.node_operator()), None)
    if node is not None:
        raise BackendError(
            f"{path} has the node {node.node_name()!r} ({node.node_operator()}), which {trt.__name__} "
            f"{trt.__version__} cannot import ({trimmed(node.desc())})",
            expected="operators it supports",
            fix="export with another --opset, or run the package with ONNX Runtime",
        )
    reasons = [message for message in log.errors if "Failed to open" in message] or [e.desc() for e in errors]
    reason = trimmed((reasons or list(log.errors) or ["no reason given"])[0])
    raise BackendError(
        f"{path} cannot be read by {trt.__name__} {trt.__version__} ({reason})",
        fix="copy the package again, or export it again",
    )


def _tensors(network: Any) -> tuple[list[TensorRecord], list[TensorRecord]]:
    """Return the inputs and the outputs of a parsed network."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    read = [[tensor_record(tensor.name, tensor.dtype, tensor.shape) for tensor in some] for some in (inputs, outputs)]
    return read[0], read[1]


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Allow attention layers without a fused kernel (those in fp32) to be built from simpler layers."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(toolkit: Toolkit, settings: Any, target: str, config: EngineConfig) -> None:
    trt = toolkit.module
    settings.clear_flag(trt.BuilderFlag.TF32)
    if config.workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib * 1024 * 1024)
    if toolkit.cross_targets:
        settings.num_compute_capabilities = 1
        capability = toolkit.cross_targets.get(target, trt.ComputeCapability.CURRENT)
        settings.set_compute_capability(capability, 0)


def _add_profiles(builder: Any, settings: Any, profiles: tuple[ProfileRecord, ...]) -> None:
    for record in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in record.shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        settings.add_optimization_profile(profile)


@contextlib.contextmanager
def _timing_cache(toolkit: Toolkit, settings: Any, file: Path | None) -> Iterator[None]:
    """Use earlier kernel measurements, and save the new ones; a build also works without the cache."""
    if file is None or not toolkit.times_kernels:
        yield
        return
    cache = settings.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    settings.set_timing_cache(cache, False)  # has no effect if the cache is from another device
    yield
    with contextlib.suppress(OSError):
        replace_file(file, bytes(memoryview(cache.serialize())))
