"""The language model: prefill and decode with one graph, whose keys and values stay on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.runtime.images.positions import Positions, PromptPositions
from promprune.runtime.sessions import Array, Session, TensorSpec, Value

__all__ = ["Cache", "Decoder"]

_PAST = "past_key_values."
_PRESENT = "present."
_UNLIMITED: Final = 1 << 62
_ROOM: Final = 256  # positions by which keys and values grow when steps are made in place


@dataclass(eq=False)
class _Reach:
    """How far tensors that several caches share are taken, by the longest of these."""

    length: int


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of everything the model has read; never changed, every step makes the next one.

    Attributes:
        tensors: by the name of the graph input, [batch, kv_heads, capacity, head_dim] each; what lies behind ``length``
            is zeros, or of other caches.
        mask: int64 [batch, length]; 0 where a row is padded.
        rope_delta: int64 [batch]; how much further on the next rotary position is than the number of tokens read.
        reach: of the tensors, with whichever caches share them.
    """

    tensors: Mapping[str, Value]
    mask: npt.NDArray[np.int64]
    rope_delta: npt.NDArray[np.int64]
    reach: _Reach = field(default_factory=lambda: _Reach(0))

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return int(self.mask.shape[1])

    @property
    def capacity(self) -> int:
        """Positions that the tensors have room for."""
        return next(iter(self.tensors.values())).shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def truncated(self, length: int) -> Cache:
        """Return a cache of the first ``length`` positions, which shares its tensors with this one.

        What is read next needs its positions stated, where the cache has a ``rope_delta``.
        """
        return replace(self, mask=self.mask[:, :length])

    def of_rows(self, rows: Sequence[int]) -> Cache:
        """Return a cache of some of the rows; copies them through the host."""
        if list(rows) == list(range(len(self.mask))):
            return self
        kept = {name: _on_host(tensor)[list(rows), :, : self.length] for name, tensor in self.tensors.items()}
        return Cache(kept, self.mask[list(rows)], self.rope_delta[list(rows)])


class Decoder:
    """Runs ``decoder_model_merged.onnx``.

    Args:
        session: the loaded graph.
        prefill_chunk: most positions that one run reads; ``None``: all of them. Chunks change no answer; what a run
            needs besides keys and values (activations, a mask of chunk times length) grows with the chunk.
        in_place: read single tokens with keys and values in room for more, and write the new ones there, so that all
            steps have the same shapes until the room is used up. The places that are free are masked, between what was
            read and the new token; a model with a sliding window would count them.

    Attributes:
        session: the loaded graph.
        hidden_size: of ``inputs_embeds``.
        embeds_dtype: of ``inputs_embeds``.
        cache_bytes_per_token: memory of one position's keys and values, in bytes.
        position_axes: rotary positions of one token: 1, or 3 for time, height and width.

    Raises:
        PackageError: the graph has not the inputs and outputs of a decoder with a cache.
    """

    def __init__(self, session: Session, prefill_chunk: int | None = None, *, in_place: bool = False) -> None:
        self.session = session
        self._prefill_chunk = prefill_chunk
        self._in_place = in_place
        self._past = {name: spec for name, spec in session.inputs.items() if name.startswith(_PAST)}
        self._present = {_PRESENT + name.removeprefix(_PAST): name for name in self._past}
        wanted = {"inputs_embeds", "attention_mask", "position_ids", *self._past}
        made = {"logits", *self._present}
        if not self._past or session.inputs.keys() != wanted or session.outputs.keys() != made:
            raise PackageError(
                f"{session.name} has inputs {sorted(session.inputs)} and outputs {sorted(session.outputs)}",
                expected="inputs_embeds, attention_mask, position_ids, past_key_values.*; logits, present.*",
                fix="export again",
            )
        embeds = session.inputs["inputs_embeds"]
        self.embeds_dtype = np.dtype(embeds.dtype)
        self.hidden_size = _fixed(embeds, -1)
        position_ids = session.inputs["position_ids"]
        self.position_axes = 1 if len(position_ids.shape) == 2 else _fixed(position_ids, 0)
        self.cache_bytes_per_token = sum(
            _fixed(spec, 1) * _fixed(spec, 3) * np.dtype(spec.dtype).itemsize for spec in self._past.values()
        )

    @property
    def device(self) -> str:
        """Where the graph runs: ``"CPU"`` or ``"CUDA"``."""
        return self.session.device

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the graph runs where and as it does, in words."""
        return self.session.notes

    def close(self) -> None:
        """Free the graph; reading afterwards is a BackendError."""
        self.session.close()

    def empty_cache(self, batch: int) -> Cache:
        """Return the cache of a model that has read nothing."""
        tensors: dict[str, Value] = {
            name: np.zeros((batch, _fixed(spec, 1), 0, _fixed(spec, 3)), spec.dtype)
            for name, spec in self._past.items()
        }
        return Cache(tensors, np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64))

    def read(
        self,
        embeds: Value,
        cache: Cache,
        mask: npt.NDArray[np.int64] | None = None,
        positions: PromptPositions | None = None,
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        """Read more positions: a prompt, the rest of one, or one token per row.

        Args:
            embeds: ``embeds_dtype`` [batch, sequence, hidden].
            cache: what was read before.
            mask: int64 [batch, sequence], 0 where a row is padded; ``None``: nowhere.
            positions: rotary positions of a model that gives every token three; ``None``: one after the other.

        Returns:
            The logits after the last position, float32 [batch, vocabulary], and the cache with the new positions.

        Raises:
            BackendError: the backend fails.
        """
        new = np.ones(tuple(embeds.shape[:2]), np.int64) if mask is None else mask
        if positions is None:
            positions = self._following(cache, new)
        cache = replace(cache, rope_delta=positions.rope_delta)
        chunks = self._chunks(embeds.shape[1])
        if len(chunks) == 1:
            return self._run(embeds, cache, new, positions.ids)
        embeds = _on_host(embeds)
        for part in chunks:
            logits, cache = self._run(embeds[:, part], cache, new[:, part], positions.ids[:, :, part])
        return logits, cache

    def _following(self, cache: Cache, new: npt.NDArray[np.int64]) -> PromptPositions:
        """Return the positions that follow what a cache holds, one after the other."""
        ids = np.maximum(cache.mask.sum(axis=1, keepdims=True) + new.cumsum(axis=1) - 1, 0) + cache.rope_delta[:, None]
        return PromptPositions(np.repeat(ids[None], self.position_axes, axis=0), cache.rope_delta)

    def _chunks(self, length: int) -> list[slice]:
        """Return the stretches to read one after the other: all of one size but the first, which is the rest."""
        size = self._prefill_chunk or length
        ends = range(length, 0, -size)
        return [slice(max(end - size, 0), end) for end in reversed(ends)]

    def _run(
        self, embeds: Value, cache: Cache, new: npt.NDArray[np.int64], positions: Positions
    ) -> tuple[npt.NDArray[np.float32], Cache]:
        mask = np.concatenate([cache.mask, new], axis=1)
        roomy = self._roomy(cache) if self._in_place and embeds.shape[1] == 1 else None
        if roomy is not None:
            free = np.zeros((len(mask), roomy.capacity - cache.length), np.int64)
            inputs = self._inputs(embeds, np.concatenate([cache.mask, free, new], axis=1), positions, roomy)
            outputs = self.session.run_in_place(inputs, self._present, at=cache.length)
            roomy.reach.length = mask.shape[1]
            return outputs["logits"].numpy()[:, -1], replace(roomy, mask=mask)
        outputs = self.session.run_keeping(
            self._inputs(embeds, mask, positions, self._exact(cache)), keep=self._present
        )
        present = {past: outputs[name] for name, past in self._present.items()}
        return outputs["logits"].numpy()[:, -1], Cache(present, mask, cache.rope_delta, _Reach(mask.shape[1]))

    def _inputs(
        self, embeds: Value, mask: npt.NDArray[np.int64], positions: Positions, cache: Cache
    ) -> dict[str, Value]:
        return {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions[0] if self.position_axes == 1 else positions,
            **cache.tensors,
        }

    def _roomy(self, cache: Cache) -> Cache | None:
        """Return a cache with room for one more position that nobody else has taken; ``None``: there cannot be any."""
        needed = cache.length + 1
        if needed <= cache.capacity and cache.reach.length == cache.length:
            return cache
        most = min(self.session.limits.get(str(spec.shape[2]), _UNLIMITED) for spec in self._past.values())
        capacity = min(-(-needed // _ROOM) * _ROOM, most)
        return self._resized(cache, capacity) if needed <= capacity else None

    def _exact(self, cache: Cache) -> Cache:
        """Return a cache whose tensors hold nothing else."""
        return cache if cache.capacity == cache.length else self._resized(cache, cache.length)

    def _resized(self, cache: Cache, capacity: int) -> Cache:
        tensors = {n: self.session.resized(tensor, cache.length, capacity) for n, tensor in cache.tensors.items()}
        return replace(cache, tensors=tensors, reach=_Reach(cache.length))


def _fixed(spec: TensorSpec, axis: int) -> int:
    size = spec.shape[axis]
    if not isinstance(size, int):
        raise PackageError(
            f"{spec.name} has a dynamic axis {axis}: {spec}", expected="a fixed size", fix="export again"
        )
    return size


def _on_host(tensor: Value) -> Array:
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
