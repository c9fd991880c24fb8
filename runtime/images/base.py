"""The interface of image processors, and what all kinds share."""

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
        digest: digest of the inputs; equal digests mean equal results.
        num_placeholders: number of tokens of the image in a prompt, known before the graph runs.
    """

    graph: str
    feeds: Mapping[str, Array]
    digest: bytes
    num_placeholders: int


class ImageProcessor(ABC):
    """Turns a picture into the inputs of a vision graph, and the graph's outputs into an encoded image.

    Thread-safe.

    Args:
        package: the package whose vision graphs encode the images.

    Attributes:
        graphs: names of the vision graphs in the manifest.
    """

    graphs: tuple[str, ...] = (VISION_ENCODER,)

    @abstractmethod
    def __init__(self, package: Package) -> None:
        """Read what preprocessing and postprocessing need of the package.

        Raises:
            PackageError: a file is unusable, or does not match the manifest.
        """

    @abstractmethod
    def expected(self, graph: str) -> GraphRecord:
        """Return the inputs and outputs that a vision graph must have for preprocessing and postprocessing."""

    @abstractmethod
    def view(self, image: Image, *, alone: bool = True) -> Image:
        """Return the part of an 8-bit RGB image that the model sees; ``TokenSelection.grids`` are boxes in it.

        Args:
            image: the image.
            alone: whether it is the only image of its prompt.
        """

    @abstractmethod
    def preprocess(self, image: Image, *, alone: bool = True) -> PreprocessedImage:
        """Return the inputs of the vision graph for an 8-bit RGB image.

        Args:
            image: the image.
            alone: whether it is the only image of its prompt.
        """

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, Array], image: PreprocessedImage) -> EncodedImage:
        """Return ``image.num_placeholders`` features, with the selection that they are from.

        Raises:
            BackendError: the outputs contradict the manifest, or are not finite numbers.
        """

    @abstractmethod
    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return how many tokens an encoded image of this package takes in a prompt."""


@dataclass(frozen=True, eq=False)
class SelectedTokens:
    """The outputs of a vision graph for one row of its batch.

    Attributes:
        features: ``[T, D]``.
        indices: int64 [T].
        saliency_mask: bool [T]; None in a package without selection.
        spectral_entropy: None in a package without selection.
    """

    features: Array
    indices: npt.NDArray[np.int64]
    saliency_mask: npt.NDArray[np.bool_] | None = None
    spectral_entropy: float | None = None


def selected_tokens(outputs: Mapping[str, Array], row: int, counts: TokenCounts) -> SelectedTokens:
    """Check the outputs of a vision graph for one row of its batch.

    Args:
        outputs: outputs of the vision graph; only ``image_features`` in a package that keeps every token.
        row: index in the batch.
        counts: N and T of the graph.

    Raises:
        BackendError: features or entropy are not finite, or the selection is not T distinct tokens of N.
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
        package: the package of the graph.
        graph: name of the graph.
        width: number of features of a visual token.
        **inputs: name of an input -> its dtype, and its sizes after the first dimension.
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
    """Refuse a package with a part that contradicts another part.

    Raises:
        PackageError: ``found`` differs from ``expected``.
    """
    if found != expected:
        raise PackageError(
            f"{what}: {_format_value(found)}", expected=_format_value(expected), fix="export the package again"
        )


def _format_value(value: object) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, (set, frozenset)) else str(value)


def _not_numbers(what: str) -> BackendError:
    return BackendError(
        f"the vision encoder returned {what} that are not finite numbers",
        expected="finite values",
        fix="export with --dtype fp32: fp16 overflows in some models",
    )
