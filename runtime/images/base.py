"""What a layout provides, and what all layouts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, PackageError
from promprune.package.manifest import VISION_ENCODER, Manifest, TokenCounts
from promprune.runtime.images.encoded import EncodedImage, TokenSelection
from promprune.runtime.sessions import Array, Session

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageLayout", "PreparedImage", "SelectedTokens", "expect", "expect_graph", "selected_tokens"]

# Outputs of a graph with selection: dtype, and size of each row; None: T.
_REPORT: Final[Mapping[str, tuple[str, int | None]]] = {
    "token_indices": ("int64", None),
    "saliency_mask": ("bool", None),
    "saliency_count": ("int64", 1),
    "spectral_entropy": ("float32", 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """An image that is ready for a vision graph.

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


class ImageLayout(ABC):
    """How a picture becomes the inputs of a vision graph, and what that returns becomes an encoded image.

    Safe to use from several threads at once.

    Args:
        folder: the package.
        manifest: what it says of itself.

    Attributes:
        graphs: names of the vision graphs in the manifest.
    """

    graphs: tuple[str, ...] = (VISION_ENCODER,)

    @abstractmethod
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Read what the layout needs of the package.

        Raises:
            PackageError: a file is unusable, or does not fit the manifest.
        """

    @abstractmethod
    def check(self, graph: str, session: Session) -> None:
        """Compare a loaded vision graph with what this layout feeds it and reads from it.

        Raises:
            PackageError: they do not fit.
        """

    @abstractmethod
    def view(self, image: Image) -> Image:
        """Return what the model sees of an 8-bit RGB image; ``TokenSelection.grids`` are boxes in it."""

    @abstractmethod
    def prepare(self, image: Image) -> PreparedImage:
        """Return the inputs of the vision graph for an 8-bit RGB image."""

    @abstractmethod
    def pack(self, outputs: Mapping[str, Array], prepared: PreparedImage) -> EncodedImage:
        """Return ``prepared.num_placeholders`` features, and say which tokens they are.

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


def expect_graph(session: Session, counts: TokenCounts, inputs: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the names and sizes of a vision graph with its N and T and its inputs.

    Args:
        session: the loaded graph.
        counts: N and T of the graph.
        inputs: fixed sizes of every input after its first dimension.

    Raises:
        PackageError: they differ.
    """
    report = _REPORT if counts.is_pruned else {}
    expect("the vision encoder's inputs", {*session.inputs}, {*inputs})
    expect("the vision encoder's outputs", {*session.outputs}, {"image_features", *report})
    for name, sizes in inputs.items():
        expect(name, session.inputs[name].shape[1:], sizes)
    expect("image_features", session.outputs["image_features"].shape[1:2], (counts.keep_tokens,))
    for name, (dtype, size) in report.items():
        found = session.outputs[name]
        expect(name, (found.dtype, found.shape[1:]), (dtype, (size or counts.keep_tokens,)))


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
