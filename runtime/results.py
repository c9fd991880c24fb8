"""What the runtime returns: answers, encoded images, what was selected, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from promprune.config import SelectionPolicy
from promprune.runtime.generation import FinishReason
from promprune.runtime.positions import ImagePositions
from promprune.runtime.sessions import Array, DeviceTensor

__all__ = ["EncodedImage", "Result", "Stopwatch", "Timings", "TokenGrid", "TokenSelection"]


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


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock times of one call, in milliseconds; answers of one batch share them.

    Attributes:
        preprocess_ms: decoding and preparing the images.
        prompt_ms: chat template and tokenizer.
        vision_ms: vision encoder and selection; near 0 when every image was encoded before.
        splice_ms: token embeddings, and the image features put in their places.
        prefill_ms: the language model on the prompt.
        decode_ms: all further tokens.
        first_token_ms: from the call to the first token.
        total_ms: from the call to the end; of a stream, includes waiting for the reader.
        prompt_tokens: tokens of the prompt, visual tokens included; of the longest one of a batch.
        reused_tokens: those whose keys and values were still there from the turn before.
        new_tokens: tokens generated for this answer.
        encoded_images: images that went through the vision encoder; the others were encoded before.
        kv_cache_bytes: keys and values held at the end, by the rows of a batch that ran longest.
    """

    preprocess_ms: float
    prompt_ms: float
    vision_ms: float
    splice_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float
    total_ms: float
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    encoded_images: int
    kv_cache_bytes: int

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first; ``None`` where there are no others."""
        return (self.new_tokens - 1) / self.decode_ms * 1000 if self.new_tokens > 1 and self.decode_ms > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON; times rounded to microseconds."""
        values = {name: round(value, 3) if name.endswith("_ms") else value for name, value in asdict(self).items()}
        rate = self.decode_tokens_per_s
        return {**values, "decode_tokens_per_s": None if rate is None else round(rate, 2)}


@dataclass(frozen=True, eq=False)
class Result:
    """One answer.

    Attributes:
        text: decoded, without special tokens, up to the first stop text.
        token_ids: everything generated, the end-of-sequence token included.
        finish_reason: ``"stop"``: end-of-sequence token or stop text; ``"length"``: as many tokens as allowed.
        timings: how long each stage took.
        selection: of each image, in the order of the images.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    selection: tuple[TokenSelection, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, for JSON."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": list(self.token_ids),
            "timings": self.timings.to_dict(),
            "selection": [selection.to_dict() for selection in self.selection],
        }


class Stopwatch:
    """Adds up the time of named stages."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name] = self._stages.get(name, 0.0) + (time.perf_counter() - start) * 1000

    def mark(self, name: str) -> None:
        """Record the time since the beginning as a stage of its own."""
        self._stages[name] = (time.perf_counter() - self._start) * 1000

    def __getitem__(self, name: str) -> float:
        """Return a stage's time, in milliseconds."""
        return self._stages.get(name, 0.0)
