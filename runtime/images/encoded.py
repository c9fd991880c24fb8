"""An encoded image, and which of its visual tokens were kept."""

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
    """A grid of patches that the model sees of an image, one visual token each.

    Attributes:
        rows, columns: patches.
        left, top, width, height: the box that it covers in ``ImageEncoder.view(image)``, in pixels.
    """

    rows: int
    columns: int
    left: int
    top: int
    width: int
    height: int

    @property
    def num_tokens(self) -> int:
        """Visual tokens of the grid."""
        return self.rows * self.columns


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Which visual tokens of one image were kept, and why.

    Attributes:
        grids: the grids of patches that the tokens come from; LLaVA-1.5 has one.
        token_indices: int64 [T]; positions of the kept tokens, counted grid by grid, each in raster order.
        saliency_mask: bool [T]; kept for its saliency (stage 1), else for coverage (stage 2). ``None`` in a
            package without selection, which keeps every token.
        spectral_entropies: normalised spectral entropy of the tokens that were chosen from, in [0, 1]; one for every
            time the selection ran, which for LLaVA-1.5 is once. Empty in a package without selection.
        policy: what chose them; under "random" no token was kept for its saliency, nor for coverage.
    """

    grids: tuple[TokenGrid, ...]
    token_indices: npt.NDArray[np.int64]
    saliency_mask: npt.NDArray[np.bool_] | None = None
    spectral_entropies: tuple[float, ...] = ()
    policy: SelectionPolicy = "promprune"

    @property
    def num_tokens(self) -> int:
        """N, visual tokens before selection."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def spectral_entropy(self) -> float | None:
        """The spectral entropy, or the mean of several; ``None`` in a package without selection."""
        return sum(self.spectral_entropies) / len(self.spectral_entropies) if self.spectral_entropies else None

    @property
    def ran(self) -> bool:
        """Whether a selection ran; if not, every token was kept."""
        return self.saliency_mask is not None

    @property
    def keep_tokens(self) -> int:
        """T, visual tokens kept."""
        return len(self.token_indices)

    @property
    def saliency_count(self) -> int | None:
        """T_sal, tokens kept for their saliency; ``None`` in a package without selection."""
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
    """The kept visual tokens of one image; can be used as an image again, in any prompt of the same package.

    Attributes:
        image_features: float32 or float16 [placeholders, D], what takes the place of the image's placeholders;
            read-only. Most often one for each kept token, T in all.
        selection: which tokens they are.
        positions: where they lie, for a language model with several rotary positions per token; else ``None``.
        on_device: the same features as [1, T, D], where the vision encoder left them; ``None``: on the host only.
    """

    image_features: Array
    selection: TokenSelection
    positions: ImagePositions | None = None
    on_device: DeviceTensor | None = field(default=None, repr=False)

    @property
    def num_placeholders(self) -> int:
        """Tokens that the image takes in a prompt."""
        return len(self.image_features)
