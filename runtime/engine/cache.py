"""The KV cache: keys and values of the tokens that the decoder has processed, one slot (batch row) per request.

The rows of one cache are padded on the left to a common length, and ``mask`` says where. Requests that join or leave a
batch are gathered into a new cache, which copies it: once per change of the batch, not once per step.

This file and ``slots.py``, for lowered decoders, alone know how keys and values are laid out and handed to the graph;
the other files of the engine pass a :class:`Cache` and :class:`Slot` around.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.manifest import TensorRecord
from promprune.runtime.sessions import Array, RowCopy, Session, Value

__all__ = [
    "PAST",
    "PRESENT",
    "Cache",
    "CacheManager",
    "CachedPrefix",
    "KVCache",
    "KVCacheManager",
    "Slot",
    "cache_bytes_per_token",
    "fixed_size",
    "padded_tokens",
    "to_host",
]

PAST: Final = "past_key_values."  # graph inputs begin with it
PRESENT: Final = "present."  # graph outputs
_UNLIMITED: Final = 1 << 62
_CAPACITY_STEP: Final = 256  # positions by which the capacity grows if decode steps write in place

TokenIds = npt.NDArray[np.int64]
Mask = npt.NDArray[np.int64]
CacheT = TypeVar("CacheT", bound="Cache")


class Cache(Protocol):
    """Keys and values of a batch, as the engine sees them."""

    @property
    def rope_delta(self) -> npt.NDArray[np.int64]:
        """int64 [batch]; rotary position of the next token, minus the number of tokens of its row."""

    @property
    def batch(self) -> int:
        """Number of rows."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [batch]; positions of each row, without padding."""

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes."""

    def truncate(self, length: int) -> Self:
        """Return a cache of the first ``length`` positions, which shares its tensors with this one."""


class CacheManager(Protocol):
    """Makes, extends and gathers the caches of one decoder, all of one kind."""

    inputs: set[str]
    outputs: set[str]
    bytes_per_token: int

    def empty(self, batch: int, capacity: int = 0) -> Any:
        """Return the cache of a batch that has no tokens yet, whose longest row will have ``capacity``."""

    def run(self, feeds: Mapping[str, Value], cache: Any, new: Mask) -> tuple[Array, Any]:
        """Run the graph on new positions; return its logits, and the cache that includes them."""

    def gather(self, slots: Sequence[Slot[Any]]) -> Any:
        """Return one cache of these rows, in their order; it may take the place of those that they are from."""

    def extract(self, slot: Slot[Any]) -> Any:
        """Return a cache of one row that others of its batch do not change."""


@dataclass(eq=False)
class _Written:
    """How many positions of tensors are taken, if several caches share them."""

    length: int


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of a batch; never changed: every run of the decoder returns the next one.

    Attributes:
        tensors: by name of the graph input, [batch, kv_heads, capacity, head_dim] each; positions from ``length`` on
            are zeros, or belong to other caches that share the tensors.
        mask: int64 [batch, length]; 0 for padding.
        rope_delta: int64 [batch]; rotary position of the next token, minus the number of tokens of its row.
        written: positions of the tensors that any of the caches sharing them uses.
    """

    tensors: Mapping[str, Value]
    mask: Mask
    rope_delta: npt.NDArray[np.int64]
    written: _Written = field(default_factory=lambda: _Written(0))

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.mask)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [batch]; positions of each row, without the padding on its left."""
        lengths: npt.NDArray[np.int64] = self.mask.sum(axis=1)
        return lengths

    @property
    def length(self) -> int:
        """Positions per row, padding included."""
        return int(self.mask.shape[1])

    @property
    def capacity(self) -> int:
        """Positions per row that the tensors can hold."""
        return next(iter(self.tensors.values())).shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def truncate(self, length: int) -> KVCache:
        """Return a cache of the first ``length`` positions, which shares its tensors with this one.

        With a ``rope_delta``, the positions of the tokens that follow must be given to the decoder.
        """
        return replace(self, mask=self.mask[:, :length])


class Slot(NamedTuple, Generic[CacheT]):
    """One row of a cache: what a running request holds."""

    cache: CacheT
    row: int

    @property
    def length(self) -> int:
        """Positions of the row, without padding."""
        return int(self.cache.lengths[self.row])

    @property
    def nbytes(self) -> int:
        """The row's share of the cache's memory, in bytes."""
        return self.cache.nbytes // self.cache.batch


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A token sequence with its keys and values, for a prompt that begins alike: the next turn of a chat.

    Attributes:
        token_ids: int64 [length].
        cache: of one row, without padding.
    """

    token_ids: TokenIds
    cache: Cache

    def common_length(self, prompt_ids: TokenIds) -> int:
        """Return how many tokens of a prompt need no prefill; at least one is left, for its logits.

        Placeholders of images are equal whatever the image: use it only for prompts whose images are those of this
        prefix, followed by others.
        """
        shorter = min(len(self.token_ids), len(prompt_ids) - 1)
        different = np.flatnonzero(self.token_ids[:shorter] != prompt_ids[:shorter])
        return int(different[0]) if len(different) else shorter


def padded_tokens(lengths: Sequence[int]) -> int:
    """Return the positions that rows of these lengths take in one cache: all have the length of the longest."""
    return len(lengths) * max(lengths, default=0)


class KVCacheManager:
    """Makes, extends and gathers the caches of one decoder.

    Args:
        session: the loaded decoder; ``past_key_values.*`` [batch, kv_heads, past, head_dim] are its inputs,
            ``present.*`` its outputs.
        in_place: run single tokens on tensors with spare capacity, and write the new keys and values there, so that
            all steps have the same shapes until the capacity is used up. The spare positions are masked, between the
            past and the new token; a model with a sliding window would count them.

    Attributes:
        inputs: names of the graph's inputs that this class feeds.
        outputs: names of the graph's outputs that it takes.
        bytes_per_token: memory of the keys and values of one position, in bytes.
    """

    def __init__(self, session: Session, *, in_place: bool = False) -> None:
        self._session = session
        self._in_place = in_place
        self._past = {name: spec for name, spec in session.inputs.items() if name.startswith(PAST)}
        self._present = {PRESENT + name.removeprefix(PAST): name for name in self._past}
        self.inputs = {"attention_mask", *self._past}
        self.outputs = set(self._present)
        self.bytes_per_token = cache_bytes_per_token(session)

    def empty(self, batch: int, capacity: int = 0) -> KVCache:
        """Return the cache of a batch that has no tokens yet; its tensors grow, whatever their ``capacity`` will be."""
        del capacity
        tensors: dict[str, Value] = {
            name: np.zeros((batch, fixed_size(spec, 1), 0, fixed_size(spec, 3)), spec.dtype)
            for name, spec in self._past.items()
        }
        return KVCache(tensors, np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64))

    def run(self, feeds: Mapping[str, Value], cache: KVCache, new: Mask) -> tuple[Array, KVCache]:
        """Run the graph on new positions.

        Args:
            feeds: the inputs of the graph that are not in ``inputs``.
            cache: of the positions before them.
            new: int64 [batch, sequence]; 0 for padding.

        Returns:
            The graph's ``logits``, and the cache that includes the new positions.

        Raises:
            BackendError: the backend fails; ``cache`` can still be used.
        """
        mask = np.concatenate([cache.mask, new], axis=1)
        spacious = self._reserve(cache) if self._in_place and new.shape[1] == 1 else None
        if spacious is not None:
            spare = np.zeros((cache.batch, spacious.capacity - cache.length), np.int64)
            masked = {"attention_mask": np.concatenate([cache.mask, spare, new], axis=1)}
            inputs = {**feeds, **masked, **spacious.tensors}
            outputs = self._session.run_in_place(inputs, self._present, at=cache.length)
            spacious.written.length = mask.shape[1]
            return outputs["logits"].numpy(), replace(spacious, mask=mask)
        inputs = {**feeds, "attention_mask": mask, **self._trim(cache).tensors}
        outputs = self._session.run_keeping(inputs, keep=self._present)
        present = {past: outputs[name] for name, past in self._present.items()}
        return outputs["logits"].numpy(), KVCache(present, mask, cache.rope_delta, _Written(mask.shape[1]))

    def extract(self, slot: Slot[KVCache]) -> KVCache:
        """Return a cache of one row."""
        return self.gather([slot])

    def gather(self, slots: Sequence[Slot[KVCache]]) -> KVCache:
        """Return one cache of these rows, in their order, without padding that all of them have in common.

        If the rows are exactly those of one cache, it is returned unchanged. Otherwise they are copied, on the
        session's device if it supports that, else through the host.
        """
        first = slots[0].cache
        if [slot.row for slot in slots] == list(range(first.batch)) and all(slot.cache is first for slot in slots):
            return first
        length = max(slot.length for slot in slots)
        mask = np.zeros((len(slots), length), np.int64)
        for row, slot in enumerate(slots):
            mask[row, length - slot.length :] = slot.cache.mask[slot.row, _begin(slot) :]
        gather = self._gather_on_device if self._session.copies_on_device else self._gather_on_host
        tensors = {name: gather(name, slots, length) for name in self._past}
        delta = np.array([slot.cache.rope_delta[slot.row] for slot in slots])
        return KVCache(tensors, mask, delta, _Written(length))

    def _gather_on_host(self, name: str, slots: Sequence[Slot[KVCache]], length: int) -> Value:
        spec = self._past[name]
        gathered = np.zeros((len(slots), fixed_size(spec, 1), length, fixed_size(spec, 3)), spec.dtype)
        sources = {id(slot.cache): to_host(slot.cache.tensors[name]) for slot in slots}
        for row, slot in enumerate(slots):
            source = sources[id(slot.cache)][slot.row, :, _begin(slot) : slot.cache.length]
            gathered[row, :, length - slot.length :] = source
        return gathered

    def _gather_on_device(self, name: str, slots: Sequence[Slot[KVCache]], length: int) -> Value:
        """Copy head by head: the positions of one head are adjacent."""
        spec = self._past[name]
        heads = fixed_size(spec, 1)
        copies = [
            RowCopy(
                slot.cache.tensors[name],
                start=(slot.row * heads + head) * slot.cache.capacity + _begin(slot),
                count=slot.length,
                at=(row * heads + head + 1) * length - slot.length,
            )
            for row, slot in enumerate(slots)
            for head in range(heads)
        ]
        return self._session.copy_rows((len(slots), heads, length, fixed_size(spec, 3)), spec.dtype, copies)

    def _reserve(self, cache: KVCache) -> KVCache | None:
        """Return a cache with capacity for one more position that no other cache uses; None if there can be none."""
        needed = cache.length + 1
        if needed <= cache.capacity and cache.written.length == cache.length:
            return cache
        most = min(self._session.limits.get(str(spec.shape[2]), _UNLIMITED) for spec in self._past.values())
        capacity = min(-(-needed // _CAPACITY_STEP) * _CAPACITY_STEP, most)
        return self._resize(cache, capacity) if needed <= capacity else None

    def _trim(self, cache: KVCache) -> KVCache:
        """Return a cache whose tensors hold its positions only."""
        return cache if cache.capacity == cache.length else self._resize(cache, cache.length)

    def _resize(self, cache: KVCache, capacity: int) -> KVCache:
        tensors = {n: self._session.resize(tensor, cache.length, capacity) for n, tensor in cache.tensors.items()}
        return replace(cache, tensors=tensors, written=_Written(cache.length))


def _begin(slot: Slot[KVCache]) -> int:
    """Return the first position of a row that is not padding."""
    return slot.cache.length - slot.length


def cache_bytes_per_token(session: Session) -> int:
    """Return the memory of the keys and values of one position of a decoder, in bytes."""
    past = [spec for name, spec in session.inputs.items() if name.startswith(PAST)]
    return sum(fixed_size(spec, 1) * fixed_size(spec, 3) * np.dtype(spec.dtype).itemsize for spec in past)


def fixed_size(spec: TensorRecord, axis: int) -> int:
    """Return the size of an axis.

    Raises:
        PackageError: it is dynamic.
    """
    size = spec.shape[axis]
    if not isinstance(size, int):
        raise PackageError(
            f"{spec.name} has a dynamic axis {axis}: {spec}", expected="a fixed size", fix="export again"
        )
    return size


def to_host(tensor: Value) -> Array:
    """Return a tensor as an array on the host."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
