"""An encoded image, and the selection of its visual tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from promprune.method.config import SelectionPolicy
from promprune.runtime.images.positions import ImagePositions
from promprune.runtime.sessions import Array, DeviceTensor

__all__ = ["EncodedImage", "TokenGrid", "TokenSelection"]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """A grid of patches of an image, with one visual token per patch.

    Attributes:
        rows, columns: number of patches.
        left, top, width, height: the box of the grid in ``ImageEncoder.view(image)``, in pixels.
    """

    rows: int
    columns: int
    left: int
    top: int
    width: int
    height: int

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens of the grid."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Which visual tokens of one image were kept, and why.

    Attributes:
        grids: the grids of patches that the tokens come from; LLaVA-1.5 has one.
        token_indices: int64 [T]; indices of the kept tokens, numbered grid by grid, each in raster order.
        saliency_mask: bool [T]; true for tokens kept for their saliency (stage 1), false for coverage (stage 2). None
            in a package without selection, which keeps every token.
        spectral_entropies: normalised spectral entropy in [0, 1], one per run of the selection; LLaVA-1.5 has one run
            per image. Empty in a package without selection.
        policy: the policy that chose them; with "random" no token was kept for its saliency, nor for coverage.
    """

    grids: tuple[TokenGrid, ...]
    token_indices: npt.NDArray[np.int64]
    saliency_mask: npt.NDArray[np.bool_] | None = None
    spectral_entropies: tuple[float, ...] = ()
    policy: SelectionPolicy = "promprune"

    @property
    def num_tokens(self) -> int:
        """N, the number of visual tokens before selection."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def spectral_entropy(self) -> float | None:
        """The spectral entropy, or the mean of several; None in a package without selection."""
        return sum(self.spectral_entropies) / len(self.spectral_entropies) if self.spectral_entropies else None

    @property
    def ran(self) -> bool:
        """Whether a selection ran; if not, every token was kept."""
        return self.saliency_mask is not None

    @property
    def keep_tokens(self) -> int:
        """T, the number of kept tokens."""
        return len(self.token_indices)

    @property
    def saliency_count(self) -> int | None:
        """T_sal, the number of tokens kept for their saliency; None in a package without selection."""
        return None if self.saliency_mask is None else int(self.saliency_mask.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, for JSON."""
        mask = self.saliency_mask
        return {
            "ran": self.ran,
            "policy": self.policy,
            "num_tokens": self.num_tokens,
            "keep_tokens": self.keep_tokens,
            "saliency_count": self.saliency_count,
            "spectral_entropy": self.spectral_entropy,
            "spectral_entropies": list(self.spectral_entropies),
            "grids": [asdict(grid) for grid in self.grids],
            "token_indices": self.token_indices.tolist(),
            "saliency_mask": None if mask is None else mask.tolist(),
        }


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The kept visual tokens of one image; can be used in place of the image in any prompt for the same package.

    Attributes:
        image_features: float32 or float16 [placeholders, D], one feature per placeholder of the image; read-only.
            Usually there is one placeholder per kept token.
        selection: which tokens were kept.
        positions: their positions, for a language model with several rotary positions per token; else None.
        on_device: the same features as [1, T, D] on the device of the vision encoder; None if only on the host.
    """

    image_features: Array
    selection: TokenSelection
    positions: ImagePositions | None = None
    on_device: DeviceTensor | None = field(default=None, repr=False)

    @property
    def num_placeholders(self) -> int:
        """Number of tokens of the image in a prompt."""
        return len(self.image_features)
