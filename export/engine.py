"""From ONNX graphs to engines: TensorRT and TensorRT for RTX, whose Python APIs are the same, behind one interface.

Needs one of the two modules, and neither torch nor onnx. TensorRT builds for the GPU of this machine; TensorRT for
RTX builds for any target it knows, on machines without a GPU as well.

Networks are strongly typed: precision is what the graph says. TF32 is off, because the Gram product of the
selection needs whole fp32 products.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from promprune.config import EngineBackend, EngineConfig
from promprune.engines import (
    CURRENT,
    EngineIdentity,
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    ShapeRange,
    current_target,
    difference,
    engine_folder,
    graph_digests,
    identity_of,
    make_log,
    parse_target,
    read_engines,
    write_engine_manifest,
    writing_engines,
)
from promprune.errors import BackendError, ConfigError, MissingDependencyError, PackageError
from promprune.package import DECODER, GraphRecord, Manifest, TensorRecord, read_manifest

__all__ = [
    "NO_BUILD_PROGRESS",
    "BuildProgress",
    "BuiltEngines",
    "Toolkit",
    "build_engines",
    "engine_from_onnx",
    "load_toolkit",
    "profiles_of",
]

# Prompts engines are tuned for: this many tokens besides those of one image.
TYPICAL_PROMPT_TOKENS: Final = 64

_MODULES: Final[Mapping[EngineBackend, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DTYPES: Final[Mapping[str, str]] = {  # TensorRT's names -> numpy's
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_MEMORY_WORDS: Final = (
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "cannot allocate",
    "resource temporarily unavailable",
)

Report = Callable[[float, str], None]


class BuildProgress(Protocol):
    """Told of every engine when its build begins, and of how far it is."""

    def building(self, description: str) -> contextlib.AbstractContextManager[Report]:
        """Begin an engine; the context gives a function to call with a fraction in [0, 1] and the current phase."""
        ...


class _NoBuildProgress:
    def building(self, description: str) -> contextlib.AbstractContextManager[Report]:
        del description
        return contextlib.nullcontext(lambda fraction, phase: None)


NO_BUILD_PROGRESS: BuildProgress = _NoBuildProgress()


@dataclass(frozen=True)
class Toolkit:
    """One of the two TensorRT modules.

    Attributes:
        backend: its name on the command line.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: of the module.
    """

    backend: EngineBackend
    module: Any
    version: str

    @property
    def cross_targets(self) -> dict[str, Any]:
        """Targets it builds for without their GPU, as ``sm89`` -> the module's constant; empty for TensorRT."""
        capability = getattr(self.module, "ComputeCapability", None)
        members: dict[str, Any] = getattr(capability, "__members__", {})
        return {name.lower(): value for name, value in members.items() if name.startswith("SM")}

    def resolve(self, text: str) -> str:
        """Return the target meant by ``text``, such as ``"sm89"``.

        Raises:
            ConfigError: not a target, or not one this toolkit builds for here.
            BackendError: it means the GPU of this machine, and there is none.
        """
        target, known = parse_target(text), self.cross_targets
        if target in known:
            return target
        if known and target != CURRENT:
            raise ConfigError(
                f"received target {text!r}, which {self.backend} {self.version} does not know",
                expected=f"one of {', '.join(known)}, {CURRENT}",
                fix="choose a target of that list, or build with --backend tensorrt on a machine with that GPU",
            )
        here = current_target()
        if target not in (CURRENT, here):
            raise ConfigError(
                f"received target {text!r}, but this machine has {here}",
                expected=f"{here} or {CURRENT}: {self.backend} builds for the GPU at hand only",
                fix="build where that GPU is, or use --backend tensorrt-rtx",
            )
        return here


def load_toolkit(backend: EngineBackend) -> Toolkit:
    """Import the module of a backend.

    Raises:
        MissingDependencyError: it is not installed.
        BackendError: it is, but does not load.
    """
    name = _MODULES[backend]
    try:
        module = importlib.import_module(name)
        return Toolkit(backend, module, str(module.__version__))
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"backend {backend} needs {error.name}, which is not installed", fix=f"pip install 'promprune[{backend}]'"
        ) from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise BackendError(
            f"backend {backend} is installed but does not load ({_first_line(error)})",
            fix=f"pip install --force-reinstall 'promprune[{backend}]'",
        ) from error


@dataclass(frozen=True, kw_only=True)
class BuiltEngines:
    """The engines of one target.

    Attributes:
        folder: where they lie.
        manifest: what ``engine.json`` says.
        built: False where they were up to date.
        seconds: wall time of building all of them; 0 where they were up to date.
        notes: what was asked for and could not be done, in words.
    """

    folder: Path
    manifest: EngineManifest
    built: bool
    seconds: float
    notes: tuple[str, ...] = ()


def build_engines(
    package: Path, config: EngineConfig, *, progress: BuildProgress = NO_BUILD_PROGRESS
) -> tuple[BuiltEngines, ...]:
    """Build the engines of a package for every target, except those that are up to date.

    Engines of one target appear together, by one rename; targets that are done stay when a later one fails.

    Raises:
        PackageError: not a package, or damaged; or its engines are stale and ``config.rebuild`` is off.
        ConfigError, BackendError, MissingDependencyError: the backend or a target is not to be had here.
        BackendError: a graph cannot be built; the message names it, and the node where there is one.
        OutputError: the package cannot be written to.
    """
    manifest = read_manifest(package)
    toolkit = load_toolkit(config.backend)
    targets = tuple(dict.fromkeys(toolkit.resolve(target) for target in config.targets))
    return tuple(_build_target(package, manifest, toolkit, target, config, progress) for target in targets)


def _build_target(
    package: Path, manifest: Manifest, toolkit: Toolkit, target: str, config: EngineConfig, progress: BuildProgress
) -> BuiltEngines:
    folder = engine_folder(package, config.backend, target)
    identity = identity_of(manifest, config, tool_version=toolkit.version, target=target)
    if folder.exists() and not config.rebuild:
        return BuiltEngines(folder=folder, manifest=_up_to_date(folder, identity), built=False, seconds=0.0)
    read_manifest(package, check_weights=True)  # an engine keeps whatever it is built from
    started = time.perf_counter()
    records: dict[str, EngineRecord] = {}
    notes: tuple[str, ...] = ()
    with writing_engines(folder) as partial:
        for name in graph_digests(manifest):
            with progress.building(f"{target} {name}") as report:
                records[name], note = _build_one(package, manifest, name, toolkit, target, config, partial, report)
            notes += (note,) if note else ()
        written = write_engine_manifest(partial, identity, records)
    seconds = time.perf_counter() - started
    notes = tuple(dict.fromkeys(notes))
    return BuiltEngines(folder=folder, manifest=written, built=True, seconds=seconds, notes=notes)


def _up_to_date(folder: Path, identity: EngineIdentity) -> EngineManifest:
    """Return the manifest of engines that are the wanted ones; refuse others, which took their time to build."""
    found = read_engines(folder)
    reason = difference(found.identity, identity)
    if reason is not None:
        raise PackageError(
            f"the engines in {folder} are stale ({reason})",
            expected="engines of this package, tool, target and settings",
            fix="add --rebuild to replace them",
        )
    return found


def _build_one(
    package: Path,
    manifest: Manifest,
    name: str,
    toolkit: Toolkit,
    target: str,
    config: EngineConfig,
    folder: Path,
    report: Report,
) -> tuple[EngineRecord, str]:
    """Build one graph into ``folder``; return its record, and a note where the inspector could not be asked."""
    graph = manifest.graphs[name]
    profiles = profiles_of(name, manifest, config)
    started = time.perf_counter()
    plan = engine_from_onnx(
        toolkit,
        package / graph.file,
        graph,
        profiles=profiles,
        target=target,
        workspace_mib=config.workspace_mib,
        detailed=config.keep_inspector_json,
        report=report,
    )
    seconds = time.perf_counter() - started
    content = memoryview(plan)
    file = folder / f"{name}.engine"
    file.write_bytes(content)
    record = EngineRecord(
        file=file.name,
        size_bytes=content.nbytes,
        sha256=hashlib.sha256(content).hexdigest(),
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=profiles,
        build_seconds=round(seconds, 3),
    )
    note = _write_inspection(toolkit, plan, folder / f"{name}.layers.json") if config.keep_inspector_json else ""
    return record, note


def profiles_of(name: str, manifest: Manifest, config: EngineConfig) -> tuple[ProfileRecord, ...]:
    """Return the optimisation profiles of one graph.

    One serves every length. With ``config.decode_profile`` the decoder has two: ``prefill`` for prompts (also those
    that go on from a cache), and ``decode`` for one token per row. All are tuned for one image of T tokens and a
    prompt of ``TYPICAL_PROMPT_TOKENS``.

    Raises:
        PackageError: the graph has a dynamic dimension of an unknown name.
    """
    kept, context = manifest.selection.keep_tokens, manifest.context_length
    longest = min(kept + config.max_prompt_tokens, context)
    total = min(longest + config.max_new_tokens, context)
    typical = min(kept + TYPICAL_PROMPT_TOKENS, longest)
    batch = {"batch": (1, 1, config.max_batch)}
    lengths = {
        "prefill": {
            "sequence_length": (1, typical, longest),
            "past_sequence_length": (0, 0, total - 1),
            "total_sequence_length": (1, typical, total),
        },
        "decode": {
            "sequence_length": (1, 1, 1),
            "past_sequence_length": (1, min(typical, total - 1), total - 1),
            "total_sequence_length": (2, min(typical + 1, total), total),
        },
    }
    graph = manifest.graphs[name]
    if name == DECODER and config.decode_profile:
        return tuple(_profile(phase, graph, {**batch, **sizes}) for phase, sizes in lengths.items())
    return (_profile("any", graph, {**batch, **lengths["prefill"]}),)


def _profile(phase: str, graph: GraphRecord, sizes: Mapping[str, tuple[int, int, int]]) -> ProfileRecord:
    shapes = {}
    for tensor in graph.inputs:
        for dim in tensor.shape:
            if isinstance(dim, str) and dim not in sizes:
                raise PackageError(
                    f"{graph.file} has the dynamic dimension {dim!r} in {tensor.name}",
                    expected=f"one of {', '.join(sizes)}",
                    fix="export the package again",
                )
        low, typical, high = (
            tuple(sizes[dim][i] if isinstance(dim, str) else dim for dim in tensor.shape) for i in range(3)
        )
        shapes[tensor.name] = ShapeRange(min=low, opt=typical, max=high)
    return ProfileRecord(name=phase, shapes=shapes)


def engine_from_onnx(
    toolkit: Toolkit,
    path: Path,
    graph: GraphRecord,
    *,
    profiles: tuple[ProfileRecord, ...],
    target: str,
    workspace_mib: int | None = None,
    detailed: bool = False,
    report: Report = lambda fraction, phase: None,
) -> Any:
    """Build one engine.

    Args:
        toolkit: which TensorRT.
        path: the ONNX file; external weights lie beside it.
        graph: what the file must have as inputs and outputs.
        profiles: shape ranges of the inputs.
        target: as :meth:`Toolkit.resolve` returns it.
        workspace_mib: scratch memory the engine may use, in MiB; ``None``: no limit.
        detailed: keep what the inspector needs in the engine.
        report: called with a fraction in [0, 1] and the builder's phase.

    Returns:
        The serialized engine, which offers the buffer protocol and lives as long as the object.

    Raises:
        BackendError: the graph cannot be built; out of memory; or the target's GPU is needed and not there.
        PackageError: the file's inputs or outputs are not those of ``graph``.
        KeyboardInterrupt: while building; the builder stops at its next step.
    """
    trt, log = toolkit.module, make_log(toolkit.module)
    try:
        builder = trt.Builder(log)
        network = builder.create_network(_network_flags(trt))
        _parse(trt, network, log, path)
        _check_tensors(network, graph, path)
        _allow_decomposition(trt, network)
        settings = builder.create_builder_config()
        _configure(toolkit, builder, settings, profiles, target, workspace_mib, detailed)
        with _holding_signals() as pending:
            settings.progress_monitor = monitor = _make_monitor(trt, report, pending)
            plan = builder.build_serialized_network(network, settings)
    except MemoryError as error:
        raise _build_error(path, target, ["out of memory"]) from error
    except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
        raise _build_error(path, target, [*log.errors, _first_line(error)]) from error
    del monitor  # alive until here: the builder does not keep it
    if plan is None:
        raise _build_error(path, target, log.errors)
    return plan


def _network_flags(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)  # where the flag is gone, there is nothing else


def _parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    node = next((error for error in errors if error.node_name() or error.node_operator()), None)
    if node is not None:
        raise BackendError(
            f"{path} has the node {node.node_name()!r} ({node.node_operator()}), which {trt.__name__} "
            f"{trt.__version__} cannot import ({_trimmed(node.desc())})",
            expected="operators it supports",
            fix="export with another --opset, or run the package with ONNX Runtime",
        )
    reasons = [message for message in log.errors if "Failed to open" in message] or [e.desc() for e in errors]
    reason = _trimmed((reasons or log.errors or ["no reason given"])[0])
    raise BackendError(
        f"{path} cannot be read by {trt.__name__} {trt.__version__} ({reason})",
        fix="copy the package again, or export it again",
    )


def _check_tensors(network: Any, graph: GraphRecord, path: Path) -> None:
    """Compare the parsed network's inputs and outputs with the manifest: names, dtypes and fixed dimensions."""
    for kind, records, count, get in (
        ("input", graph.inputs, network.num_inputs, network.get_input),
        ("output", graph.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: tensor for tensor in map(get, range(count))}
        for name in sorted(found.keys() | {record.name for record in records}):
            record = next((record for record in records if record.name == name), None)
            if name not in found or record is None or not _same_tensor(found[name], record):
                raise PackageError(
                    f"{path} has {kind} {name}: {_described(found.get(name))}",
                    expected=f"{_stated(record)}, as the manifest says",
                    fix="export the package again",
                )


def _same_tensor(tensor: Any, record: TensorRecord) -> bool:
    shape = tuple(tensor.shape)
    return (
        _DTYPES.get(tensor.dtype.name) == record.dtype
        and len(shape) == len(record.shape)
        and all(size in (-1, dim) for size, dim in zip(shape, record.shape, strict=True))
    )


def _described(tensor: Any) -> str:
    return "none" if tensor is None else f"{_DTYPES.get(tensor.dtype.name, tensor.dtype.name)}{list(tensor.shape)}"


def _stated(record: TensorRecord | None) -> str:
    return "none" if record is None else f"{record.dtype}[{', '.join(map(str, record.shape))}]"


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention layers without a kernel of their own (those in fp32) be built of simpler ones."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(
    toolkit: Toolkit,
    builder: Any,
    settings: Any,
    profiles: tuple[ProfileRecord, ...],
    target: str,
    workspace_mib: int | None,
    detailed: bool,
) -> None:
    trt = toolkit.module
    settings.clear_flag(trt.BuilderFlag.TF32)
    if workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib * 1024 * 1024)
    if detailed:
        settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for record in profiles:
        profile = builder.create_optimization_profile()
        for name, shape in record.shapes.items():
            profile.set_shape(name, shape.min, shape.opt, shape.max)
        settings.add_optimization_profile(profile)
    if toolkit.cross_targets:
        settings.num_compute_capabilities = 1
        capability = toolkit.cross_targets.get(target, trt.ComputeCapability.CURRENT)
        settings.set_compute_capability(capability, 0)


def _make_monitor(trt: Any, report: Report, pending: list[int]) -> Any:
    """Make a progress monitor that turns the builder's nested phases into one fraction.

    It stops the builder at its next step once ``pending`` holds a signal.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, list[int]] = {}  # innermost last: steps done, steps in all
            self.furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, max(num_steps, 1)]
            self.tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][0] = step + 1
            self.tell()
            return not pending

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def tell(self) -> None:
            fraction = 0.0
            for done, total in reversed(self.phases.values()):
                fraction = min((done + fraction) / total, 1.0)
            self.furthest = max(self.furthest, fraction)
            report(self.furthest, next(reversed(self.phases), ""))

    return Monitor()


@contextlib.contextmanager
def _holding_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and termination, and raise them when the block is left.

    The builder is C++, and swallows whatever a signal raises while it calls back into Python.
    """
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: pending.append(number)) for number in numbers]
    try:
        yield pending
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
        if pending:
            signal.raise_signal(pending[0])


def _build_error(path: Path, target: str, messages: list[str]) -> BackendError:
    text = " ".join(messages).lower()
    reason = _trimmed(messages[0]) if messages else "the builder gave no reason"
    if any(word in text for word in _MEMORY_WORDS):
        return BackendError(
            f"building {path} for {target} ran out of memory ({reason})",
            expected="more free memory",
            fix="lower --workspace-mib, --max-batch or --max-prompt-tokens, or close other programs",
        )
    if "driver version is insufficient" in text or "cudaerror 35" in text:
        return BackendError(
            f"building {path} for {target} needs a GPU, and the driver here is missing or too old ({reason})",
            expected="a current NVIDIA driver",
            fix="update the driver, or name a target that can be built without its GPU, such as --target sm89",
        )
    if "cannot compile operation" in text or "compute capability" in text:
        return BackendError(
            f"{path} cannot be built for {target} ({reason})",
            fix="choose a newer target; the selection computes in fp32 whatever --dtype the package has",
        )
    return BackendError(
        f"{path} cannot be built for {target} ({reason})",
        fix="export with another --opset or --dtype, or run the package with ONNX Runtime",
    )


def _write_inspection(toolkit: Toolkit, plan: Any, file: Path) -> str:
    """Write what the builder made of every layer; return a note where the engine cannot be loaded here."""
    trt, log = toolkit.module, make_log(toolkit.module)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        reason = _trimmed(log.errors[0]) if log.errors else "no reason given"
        return f"no inspector JSON: an engine can only be inspected on its own kind of GPU ({reason})"
    file.write_text(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _trimmed(message: str) -> str:
    return " ".join(message.split())[:300]
