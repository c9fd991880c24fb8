"""The interface of image processors, one for each kind of image handling, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, PackageError
from promprune.package.agree import UNKNOWN
from promprune.package.manifest import VISION_ENCODER, GraphRecord, TensorRecord, TokenCounts
from promprune.package.package import Package
from promprune.runtime.images.encoded import EncodedImage, TokenSelection
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageProcessor", "PreprocessedImage", "SelectedTokens", "expect", "expected_graph", "selected_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreprocessedImage:
    """The inputs of a vision graph for one image.

    Attributes:
        graph: name of that graph in the manifest.
        feeds: its inputs, by name.
        digest: of what the graph will see; equal digests stand for equal results.
        num_placeholders: tokens that the image will take in a prompt, known before anything runs.
    """

    graph: str
    feeds: Mapping[str, Array]
    digest: bytes
    num_placeholders: int


class ImageProcessor(ABC):
    """Turns a picture into the inputs of a vision graph, and the graph's outputs into an encoded image.

    Safe to use from several threads at once.

    Args:
        package: whose images these are.

    Attributes:
        graphs: names of the vision graphs in the manifest.
    """

    graphs: tuple[str, ...] = (VISION_ENCODER,)

    @abstractmethod
    def __init__(self, package: Package) -> None:
        """Read what preprocessing and postprocessing need of the package.

        Raises:
            PackageError: a file is unusable, or does not fit the manifest.
        """

    @abstractmethod
    def expected(self, graph: str) -> GraphRecord:
        """Return the inputs and outputs that a vision graph must have for preprocessing and postprocessing."""

    @abstractmethod
    def view(self, image: Image) -> Image:
        """Return what the model sees of an 8-bit RGB image; ``TokenSelection.grids`` are boxes in it."""

    @abstractmethod
    def preprocess(self, image: Image) -> PreprocessedImage:
        """Return the inputs of the vision graph for an 8-bit RGB image."""

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, Array], image: PreprocessedImage) -> EncodedImage:
        """Return ``image.num_placeholders`` features, and say which tokens they are.

        Raises:
            BackendError: the outputs are not what the manifest promises, or not numbers.
        """

    @abstractmethod
    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return how many tokens an encoded image of this package takes in a prompt."""


@dataclass(frozen=True, eq=False)
class SelectedTokens:
    """What a vision graph with selection inside returned for one row of its batch.

    Attributes:
        features: ``[T, D]``.
        indices: int64 [T].
        saliency_mask: bool [T]; ``None`` in a package without selection.
        spectral_entropy: ``None`` in a package without selection.
    """

    features: Array
    indices: npt.NDArray[np.int64]
    saliency_mask: npt.NDArray[np.bool_] | None = None
    spectral_entropy: float | None = None


def selected_tokens(outputs: Mapping[str, Array], row: int, counts: TokenCounts) -> SelectedTokens:
    """Check what a vision graph returned for one row of its batch, and give it its names.

    Args:
        outputs: of the vision graph; a package that keeps every token has only ``image_features``.
        row: of the batch.
        counts: N and T of the graph.

    Raises:
        BackendError: features or entropy are not numbers, or the selection is not T distinct tokens of N.
    """
    features = outputs["image_features"][row]
    if not np.isfinite(features).all():
        raise _not_numbers("image features")
    if "token_indices" not in outputs:
        return SelectedTokens(features, np.arange(counts.keep_tokens))
    indices, mask = outputs["token_indices"][row], outputs["saliency_mask"][row]
    entropy, count = float(outputs["spectral_entropy"][row, 0]), int(outputs["saliency_count"][row, 0])
    if not np.isfinite(entropy):
        raise _not_numbers("a spectral entropy")
    distinct = np.unique(indices)
    valid = len(distinct) == counts.keep_tokens and distinct[0] >= 0 and distinct[-1] < counts.num_tokens
    if not valid or count != int(mask.sum()):
        raise BackendError(
            f"the vision graph selected {len(distinct)} distinct tokens in {distinct[0]} ... {distinct[-1]}, "
            f"{int(mask.sum())} of them for saliency with a count of {count}",
            expected=f"{counts.keep_tokens} distinct tokens of {counts.num_tokens}",
            fix="export the package again",
        )
    return SelectedTokens(features, indices, mask, entropy)


def expected_graph(
    package: Package, graph: str, *, width: int | str = UNKNOWN, **inputs: tuple[str, tuple[int, ...]]
) -> GraphRecord:
    """Return the tensors that a vision graph should have, given its N and T.

    Args:
        package: that the graph is of.
        graph: its name.
        width: of a visual token.
        **inputs: dtype of every input, and its sizes after the first dimension.
    """
    record, counts = package.manifest.graphs[graph], package.manifest.tokens_of(graph)
    dtype = next((output.dtype for output in record.outputs if output.name == "image_features"), "float32")
    outputs: dict[str, tuple[str, tuple[int | str, ...]]] = {"image_features": (dtype, (counts.keep_tokens, width))}
    if counts.is_pruned:
        outputs["token_indices"] = ("int64", (counts.keep_tokens,))
        outputs["saliency_mask"] = ("bool", (counts.keep_tokens,))
        outputs["saliency_count"] = ("int64", (1,))
        outputs["spectral_entropy"] = ("float32", (1,))
    return GraphRecord(file=record.file, inputs=_records(inputs), outputs=_records(outputs))


def _records(tensors: Mapping[str, tuple[str, tuple[int | str, ...]]]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name=name, dtype=dtype, shape=(UNKNOWN, *sizes)) for name, (dtype, sizes) in tensors.items()
    )


def expect(what: str, found: object, expected: object) -> None:
    """Refuse a package of which a part is not as it is stated elsewhere.

    Raises:
        PackageError: ``found`` differs from ``expected``.
    """
    if found != expected:
        raise PackageError(f"{what}: {_shown(found)}", expected=_shown(expected), fix="export the package again")


def _shown(value: object) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, (set, frozenset)) else str(value)


def _not_numbers(what: str) -> BackendError:
    return BackendError(
        f"the vision encoder returned {what} that are not finite numbers",
        expected="finite values",
        fix="export with --dtype fp32: fp16 overflows in some models",
    )
