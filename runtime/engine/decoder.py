"""The decoder graph: prefill and decode steps, with keys and values in a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.lowered import SEQLENS
from promprune.runtime.engine.cache import Cache, CacheManager, KVCacheManager, fixed_size, to_host
from promprune.runtime.engine.slots import SlotCacheManager
from promprune.runtime.images.positions import PromptPositions
from promprune.runtime.sessions import Session, Value

__all__ = ["Decoder"]


class Decoder:
    """Runs ``decoder_model_merged.onnx``, portable or lowered. Safe to use from several threads at once.

    Args:
        session: the loaded graph.
        prefill_chunk: most positions per run; None for all of a prompt. Chunks change no answer; the scratch memory of
            a run (activations, a mask of chunk times length) grows with the chunk.
        in_place: see :class:`KVCacheManager`.

    Attributes:
        session: the loaded graph.
        caches: makes and gathers its KV caches.
        hidden_size: size of the last axis of ``inputs_embeds``.
        embeds_dtype: dtype of ``inputs_embeds``.
        position_axes: rotary positions of one token: 1, or 3 for time, height and width.

    Raises:
        PackageError: the graph does not have the inputs and outputs of a decoder with a cache.
    """

    def __init__(self, session: Session, prefill_chunk: int | None = None, *, in_place: bool = False) -> None:
        self.session = session
        lowered = SEQLENS in session.inputs
        self.caches: CacheManager = SlotCacheManager(session) if lowered else KVCacheManager(session, in_place=in_place)
        self._prefill_chunk = prefill_chunk
        wanted = {"inputs_embeds", "position_ids", *self.caches.inputs}
        made = {"logits", *self.caches.outputs}
        if not self.caches.outputs or session.inputs.keys() != wanted or session.outputs.keys() != made:
            raise PackageError(
                f"{session.name} has inputs {sorted(session.inputs)} and outputs {sorted(session.outputs)}",
                expected="inputs_embeds, attention_mask, position_ids, past_key_values.*; logits, present.*",
                fix="export again",
            )
        embeds, position_ids = session.inputs["inputs_embeds"], session.inputs["position_ids"]
        self.embeds_dtype = np.dtype(embeds.dtype)
        self.hidden_size = fixed_size(embeds, -1)
        self.position_axes = 1 if len(position_ids.shape) == 2 else fixed_size(position_ids, 0)

    def forward(
        self,
        embeds: Value,
        cache: Any,
        mask: npt.NDArray[np.int64] | None = None,
        positions: PromptPositions | None = None,
    ) -> tuple[npt.NDArray[np.float32], Any]:
        """Process more positions: a prompt, the rest of one, or one token per row.

        Args:
            embeds: ``embeds_dtype`` [batch, sequence, hidden].
            cache: of the positions before them.
            mask: int64 [batch, sequence], 0 for padding; None if there is none.
            positions: rotary positions, if the model has several per token; None to continue those of the cache.

        Returns:
            The logits after the last position, float32 [batch, vocabulary], and the cache that includes the new
            positions.

        Raises:
            BackendError: the backend fails.
        """
        new = np.ones(tuple(embeds.shape[:2]), np.int64) if mask is None else mask
        if positions is None:
            positions = self._next_positions(cache, new)
        cache = replace(cache, rope_delta=positions.rope_delta)
        ids = positions.ids[0] if self.position_axes == 1 else positions.ids
        chunks = self._chunks(embeds.shape[1])
        parts = [embeds] if len(chunks) == 1 else [to_host(embeds)[:, chunk] for chunk in chunks]
        for chunk, part in zip(chunks, parts, strict=True):
            feeds = {"inputs_embeds": part, "position_ids": ids[..., chunk]}
            logits, cache = self.caches.run(feeds, cache, new[:, chunk])
        return logits[:, -1], cache

    def _next_positions(self, cache: Cache, new: npt.NDArray[np.int64]) -> PromptPositions:
        """Return the positions that follow those of a cache, one after the other."""
        ids = np.maximum(cache.lengths[:, None] + new.cumsum(axis=1) - 1, 0) + cache.rope_delta[:, None]
        return PromptPositions(np.repeat(ids[None], self.position_axes, axis=0), cache.rope_delta)

    def _chunks(self, length: int) -> list[slice]:
        """Return consecutive parts of equal size, except for the first one, which is the remainder."""
        size = self._prefill_chunk or length
        ends = range(length, 0, -size)
        return [slice(max(end - size, 0), end) for end in reversed(ends)]
