"""Comparing the graphs of packages: run two of them on the same inputs, and find the first tensor that differs."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from polygraphy.backend.onnx.util import str_from_onnx
from polygraphy.comparator import Comparator
from polygraphy.logger.logger import G_LOGGER

from promprune.errors import ConfigError, PackageError, PrompruneError
from promprune.export.verify.backends import RUNNERS, GraphToRun, failure
from promprune.export.verify.config import CompareConfig
from promprune.export.verify.samples import check_samples
from promprune.export.verify.tensors import TensorError, compare_results, same_tensors, tensors_of
from promprune.package.engines import ProfileRecord, ShapeRange
from promprune.package.manifest import Manifest, TensorRecord
from promprune.package.package import Package, read_package
from promprune.progress import NO_PROGRESS, Progress
from promprune.runtime import ImageEncoder, VisionLanguagePipeline

__all__ = ["GraphComparison", "compare_package", "describe_graphs", "sample_feeds"]

Feed = dict[str, NDArray[Any]]

_MOST_FEEDS: Final = 2  # largest number of inputs per graph; for the decoder, a prompt and a single token
_MARKED: Final = 64  # inner tensors that one run returns besides the graph's outputs
_SIZES: Final = ((224, 224), (224, 392), (392, 224), (224, 672), (672, 224))  # height, width of the sample images


@dataclass(frozen=True, kw_only=True)
class GraphComparison:
    """The comparison of one graph.

    Attributes:
        graph: its name.
        feeds: number of inputs it was run on.
        outputs: the largest error of every output.
        first: the first tensor above the tolerance, in the order of the graph; None if there is none, or if only
            outputs were compared and they pass.
        compared: number of tensors that were compared.
    """

    graph: str
    feeds: int
    outputs: tuple[TensorError, ...]
    first: TensorError | None
    compared: int

    @property
    def passed(self) -> bool:
        """Whether at least one tensor was compared, and all of them are within the tolerance."""
        return self.compared > 0 and self.first is None and all(self.outputs)


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """One graph of one package.

    Attributes:
        path: its file.
        weights: the files of its weights.
        model: the graph without its weights, with the type of every tensor.
    """

    path: Path
    weights: tuple[Path, ...]
    model: onnx.ModelProto

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.model.graph.output]


def compare_package(
    package: Path, config: CompareConfig, *, progress: Progress = NO_PROGRESS
) -> tuple[GraphComparison, ...]:
    """Run the graphs of a package in two backends, or those of two packages, and compare their results.

    The inputs are those of the graphs while the package answers questions about rendered images.

    Raises:
        ConfigError: there is no such backend or graph, or there are no sample inputs for a graph.
        PackageError: it is not a package, or lacks a graph, or an output, of the other one.
        BackendError: a backend cannot be used on this machine, or cannot run a graph.
    """
    for name in (config.backend, config.against):
        if name not in RUNNERS:
            raise ConfigError(f"received backend {name!r}", expected=f"one of {', '.join(RUNNERS)}")
    compared = read_package(package)
    reference = compared if config.reference is None else read_package(config.reference)
    names = _names(compared.manifest, config.graphs)
    _check_alike(compared, reference)
    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1  # it logs to stdout; errors are raised as exceptions
    progress.announce(1 + len(names))
    with progress.step("sample inputs"):
        feeds = sample_feeds(reference)
    _check_fed(names, feeds)
    comparisons = []
    for name in names:
        with progress.step(f"compare {name}"):
            graphs = (_read_graph(compared, name), _read_graph(reference, name))
            comparisons.append(_compare_graph(name, graphs, feeds[name], config))
    return tuple(comparisons)


def describe_graphs(package: Path, graphs: Sequence[str] = ()) -> str:
    """Return Polygraphy's description of graphs of a package, layer by layer; of all of them by default.

    Raises:
        ConfigError: there is no such graph.
        PackageError: it is not a package.
    """
    subject = read_package(package)
    texts = []
    for name in _names(subject.manifest, graphs):
        model = onnx.load(subject.graph_file(name), load_external_data=False)
        texts.append(f"{name}\n{str_from_onnx(model, show_layers=True)}")
    return "\n\n".join(texts)


def _names(manifest: Manifest, graphs: Sequence[str]) -> list[str]:
    """Return the given graphs, or all if none is given."""
    known = list(manifest.graphs)
    for name in graphs:
        if name not in known:
            raise ConfigError(f"received graph {name!r}", expected=f"one of {', '.join(known)}")
    return list(graphs) or known


def _check_alike(package: Package, reference: Package) -> None:
    missing = set(package.manifest.graphs) - set(reference.manifest.graphs)
    if missing:
        raise PackageError(
            f"{reference.folder} has no {', '.join(sorted(missing))}",
            expected=f"the graphs of {package.folder}",
            fix="compare packages of the same model that were exported with the same options",
        )


def _check_fed(names: Sequence[str], feeds: Mapping[str, Sequence[Feed]]) -> None:
    unfed = [name for name in names if not feeds.get(name)]
    if unfed:
        raise ConfigError(
            f"no sample inputs for graph {', '.join(unfed)}: answering does not use it, and it has integer inputs",
            expected=f"one of {', '.join(feeds)}",
            fix="choose others with --graph",
        )


def _read_graph(package: Package, name: str) -> _Graph:
    record, path = package.manifest.graphs[name], package.graph_file(name)
    # TensorRT needs the types of outputs; exporters write those of some inner tensors only.
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    # Only files that the manifest lists: those are known to be inside the package.
    weights = tuple(package.folder / file.path for file in package.manifest.files if file.path in record.weights)
    return _Graph(path=path, weights=weights, model=model)


def sample_feeds(package: Package) -> dict[str, list[Feed]]:
    """Return inputs of every graph, by its name: those it receives while the package answers about rendered images.

    A graph that answering does not use, such as ``token_selector``, gets random numbers, and ``True`` for booleans; if
    it has other inputs, it is omitted.
    """
    feeds: dict[str, list[Feed]] = {}
    manifest = package.manifest

    def note(graph: str, inputs: Any) -> None:
        feed = {
            name: np.array(value if isinstance(value, np.ndarray) else value.numpy()) for name, value in inputs.items()
        }
        known = feeds.setdefault(graph, [])
        shapes = [{name: value.shape for name, value in other.items()} for other in known]
        if len(known) < _MOST_FEEDS and {name: value.shape for name, value in feed.items()} not in shapes:
            known.append(feed)

    loader = VisionLanguagePipeline if manifest.has_language_model else ImageEncoder
    with loader.from_package(package.folder, provider="cpu", image_cache_size=0, lowered=False) as running:
        for graph, session in running.sessions.items():
            session.on_run = partial(note, graph)
        for sample in check_samples(len(_SIZES), sizes=_SIZES):
            if isinstance(running, VisionLanguagePipeline):
                running.generate(sample.image, sample.question, max_new_tokens=2)
            else:
                running.encode_image(sample.image)
    random = np.random.default_rng(0)
    for graph, record in manifest.graphs.items():
        if graph not in feeds and all(tensor.dtype == "bool" or "float" in tensor.dtype for tensor in record.inputs):
            feeds[graph] = [{tensor.name: _make_random_input(tensor, random) for tensor in record.inputs}]
    return feeds


def _make_random_input(tensor: TensorRecord, random: np.random.Generator) -> NDArray[Any]:
    size = [dim if isinstance(dim, int) else 1 for dim in tensor.shape]
    return np.ones(size, bool) if tensor.dtype == "bool" else random.random(size).astype(tensor.dtype)


def _compare_graph(
    name: str, graphs: tuple[_Graph, _Graph], feeds: Sequence[Feed], config: CompareConfig
) -> GraphComparison:
    outputs = graphs[0].outputs
    missing = set(outputs) - set(graphs[1].outputs)
    if missing:
        raise PackageError(
            f"{graphs[1].path} has no output {', '.join(sorted(missing))}",
            expected=f"those of {graphs[0].path}",
            fix="compare packages of the same model that were exported with the same options",
        )
    nodes = dict.fromkeys(outputs, "no node") | tensors_of(graphs[0].model)  # an output may be a constant or an input
    # Outputs have the same name in every package; inner tensors are matched by how they are computed.
    same = {**same_tensors(*(graph.model for graph in graphs)), **{output: output for output in outputs}}
    same = {tensor: same[tensor] for tensor in nodes if tensor in same}
    compare = partial(compare_results, same=same, nodes=nodes, tolerance=config.tolerance)
    found = _run(graphs, {output: output for output in outputs}, feeds, config, compare)
    results = tuple(found[output] for output in outputs if output in found)
    first, compared = None, len(results)
    if config.layers:
        inner = [tensor for tensor in same if tensor not in outputs]
        for start in range(0, len(inner), _MARKED):
            marked = {tensor: same[tensor] for tensor in inner[start : start + _MARKED]}
            found = _run(graphs, marked, feeds, config, compare)
            compared += len(found)
            first = next((measured for measured in found.values() if not measured), None)
            if first is not None:
                break
    if first is None:
        first = next((measured for measured in results if not measured), None)
    return GraphComparison(graph=name, feeds=len(feeds), outputs=results, first=first, compared=compared)


def _run(
    graphs: tuple[_Graph, _Graph],
    marked: dict[str, str],
    feeds: Sequence[Feed],
    config: CompareConfig,
    compare: Callable[..., OrderedDict[str, TensorError]],
) -> dict[str, TensorError]:
    """Run both graphs with these tensors as outputs, and return the largest error of each over all inputs.

    Args:
        marked: name of a tensor in the first graph -> its name in the second.
    """
    profile = _profile(feeds)
    backends = (config.backend, config.against)
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # warnings from the means that Polygraphy logs
        files = [
            stack.enter_context(_with_outputs(graph, list(tensors)))
            for graph, tensors in zip(graphs, (marked, marked.values()), strict=True)
        ]
        try:
            runners = [
                RUNNERS[backend](
                    f"{number} {backend}", GraphToRun(file=file, folder=graph.path.parent, profile=profile)
                )
                for number, (backend, file, graph) in enumerate(zip(backends, files, graphs, strict=True))
            ]
            results = Comparator.run(runners, data_loader=_Cast(feeds))
            (accuracy,) = Comparator.compare_accuracy(results, compare_func=lambda a, b: compare(a, b))
        except PrompruneError:
            raise
        except Exception as error:  # every backend has its own types of errors, without a common base class
            raise failure(graphs[0].path, error) from error
    worst: dict[str, TensorError] = {}
    for iteration in next(iter(accuracy.values())):
        for tensor, measured in iteration.items():
            if tensor not in worst or measured.error > worst[tensor].error:
                worst[tensor] = measured
    return {tensor: worst[tensor] for tensor in marked if tensor in worst}


class _Cast:
    """The inputs, converted to the dtypes of the graph that takes them; Polygraphy sets ``input_metadata``."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self.input_metadata: Any = {}

    def __iter__(self) -> Iterator[Feed]:
        for feed in self._feeds:
            yield {name: value.astype(self._dtype(name), copy=False) for name, value in feed.items()}

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype = self.input_metadata[name].dtype
        return dtype if isinstance(dtype, np.dtype) else np.dtype(dtype.numpy())  # onnx_ir's dtype for bfloat16 only


def _profile(feeds: Sequence[Feed]) -> ProfileRecord:
    """Return the shapes that an engine has to accept: those of these inputs."""
    shapes = {}
    for name in feeds[0]:
        sizes = [feed[name].shape for feed in feeds]
        low, high = (tuple(extreme(axis) for axis in zip(*sizes, strict=True)) for extreme in (min, max))
        shapes[name] = ShapeRange(min=low, opt=sizes[0], max=high)
    return ProfileRecord(name="any", shapes=shapes)


@contextlib.contextmanager
def _with_outputs(graph: _Graph, marked: Sequence[str]) -> Iterator[Path]:
    """Write a graph with other outputs to a new folder, with links to its weights; the package is not changed."""
    with tempfile.TemporaryDirectory(prefix="promprune-") as name:
        folder = Path(name)
        changed = onnx.ModelProto()
        changed.CopyFrom(graph.model)
        known = {value.name: value for value in (*graph.model.graph.value_info, *graph.model.graph.output)}
        del changed.graph.output[:]
        changed.graph.output.extend(known.get(tensor, onnx.ValueInfoProto(name=tensor)) for tensor in marked)
        onnx.save(changed, folder / graph.path.name)
        for weights in graph.weights:
            (folder / weights.name).symlink_to(weights.absolute())
        yield folder / graph.path.name
