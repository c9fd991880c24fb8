"""The KV cache of a lowered decoder: one buffer per layer, in which every row has its own slot and length.

There is no padding, and steps copy nothing: the decoder appends new keys and values to each slot in place. Slots are
copied only if a row joins a running batch, if a row leaves it and another one takes its slot, if the capacity is
used up, or if an earlier state is continued in a different way, for example after a chat turn failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from promprune.package.lowered import SEQLENS, TOTAL_LENGTH
from promprune.runtime.engine.cache import PAST, PRESENT, Mask, Slot, cache_bytes_per_token, fixed_size, to_host
from promprune.runtime.sessions import Array, BoundRun, Session, Value

__all__ = ["SlotCache", "SlotCacheManager"]

_CAPACITY_STEP: Final = 256  # positions by which the capacity of the slots grows

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Buffers:
    """Keys and values of some slots.

    Attributes:
        tensors: name of the graph input -> [slots, kv heads, capacity, head dim].
        written: int64 [slots]; positions of each slot that any cache uses.
        bound: the session's run on some adjacent slots, by the first and their number.
    """

    tensors: Mapping[str, Array]
    written: Lengths
    bound: dict[tuple[int, int], BoundRun] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Positions per slot."""
        return int(next(iter(self.tensors.values())).shape[2])

    def bind(self, session: Session, begin: int, count: int, updated: Mapping[str, str]) -> BoundRun:
        """Return the session's run on ``count`` slots, the first of which is ``begin``; bound the first time."""
        if (begin, count) not in self.bound:
            views = {name: tensor[begin : begin + count] for name, tensor in self.tensors.items()}
            self.bound[begin, count] = session.bind_buffers(views, updated)
        return self.bound[begin, count]


@dataclass(frozen=True, eq=False)
class SlotCache:
    """Keys and values of a batch. Every run of the decoder returns the next one, which shares the buffers.

    Attributes:
        buffers: buffers of the batch, possibly with slots of other rows.
        slots: int64 [batch]; the slot of each row.
        lengths: int64 [batch]; positions of each row.
        rope_delta: int64 [batch]; rotary position of the next token, minus the number of tokens of its row.
    """

    buffers: _Buffers
    slots: npt.NDArray[np.int64]
    lengths: Lengths
    rope_delta: npt.NDArray[np.int64]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.slots)

    @property
    def nbytes(self) -> int:
        """Memory of the slots of the batch, in bytes; on the CPU, parts that were never written use no memory."""
        return sum(tensor[:1].nbytes for tensor in self.buffers.tensors.values()) * self.batch

    def truncate(self, length: int) -> SlotCache:
        """Return a cache of the first ``length`` positions, which shares the buffers.

        With a ``rope_delta``, the positions of the tokens that follow must be given to the decoder.
        """
        return replace(self, lengths=np.minimum(self.lengths, length))


class SlotCacheManager:
    """Makes, extends and gathers the caches of one lowered decoder; see :class:`KVCacheManager`.

    Args:
        session: the loaded decoder.

    Attributes:
        inputs, outputs, bytes_per_token: see :class:`KVCacheManager`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._past = {name: spec for name, spec in session.inputs.items() if name.startswith(PAST)}
        self._present = {PRESENT + name.removeprefix(PAST): name for name in self._past}
        self.inputs = {SEQLENS, TOTAL_LENGTH, *self._past}
        self.outputs = set(self._present)
        self.bytes_per_token = cache_bytes_per_token(session)

    def empty(self, batch: int, capacity: int = 0) -> SlotCache:
        """Return the cache of a batch that has no tokens yet.

        Args:
            batch: number of rows.
            capacity: final number of positions of the longest row, if known, which avoids copies for growing.
        """
        zeros = np.zeros(batch, np.int64)
        return SlotCache(self._allocate(batch, capacity), np.arange(batch), zeros, zeros)

    def run(self, feeds: Mapping[str, Value], cache: SlotCache, new: Mask) -> tuple[Array, SlotCache]:
        """Run the graph on new positions: in a decode step for all rows at once, in a prefill row by row.

        Args:
            feeds: the inputs of the graph that are not in ``inputs``.
            cache: cache of the positions before them.
            new: int64 [batch, sequence]; 0 for padding, which is on the left.

        Returns:
            The ``logits``, zeros for a row without new positions, and the cache that includes the new positions.

        Raises:
            BackendError: the backend fails; ``cache`` can still be used.
        """
        counts = new.sum(axis=1)
        cache = self._reserve(cache, cache.lengths + counts)
        if new.shape[1] == 1 and counts.all():
            logits = self._run_together(feeds, cache)
        else:
            logits = self._run_apart(feeds, cache, counts)
        cache = replace(cache, lengths=cache.lengths + counts)
        cache.buffers.written[cache.slots] = cache.lengths
        return logits, cache

    def gather(self, slots: Sequence[Slot[SlotCache]]) -> SlotCache:
        """Return one cache of these rows in the first slots, in order; their old caches must not be used afterwards."""
        first = slots[0].cache
        if all(slot.cache is first and slot.row == row for row, slot in enumerate(slots)) and first.batch == len(slots):
            return first
        buffers = _common_buffers(slots)
        longest = max(slot.length for slot in slots)
        if len(buffers.written) < len(slots) or buffers.capacity <= longest:
            capacity = max(longest + 1, *(slot.cache.buffers.capacity for slot in slots))
            buffers = self._allocate(max(len(slots), 2 * len(buffers.written)), capacity)
        return self._move(slots, buffers)

    def extract(self, slot: Slot[SlotCache]) -> SlotCache:
        """Return a cache of one row, which shares no memory with the others of its batch."""
        if len(slot.cache.buffers.written) == 1:
            return slot.cache
        return self._move([slot], self._allocate(1, slot.length + 1))

    def _allocate(self, slots: int, capacity: int) -> _Buffers:
        capacity = -(-max(capacity, 1) // _CAPACITY_STEP) * _CAPACITY_STEP
        tensors = {
            name: np.zeros((slots, fixed_size(spec, 1), capacity, fixed_size(spec, 3)), spec.dtype)
            for name, spec in self._past.items()
        }
        return _Buffers(tensors, np.zeros(slots, np.int64))

    def _reserve(self, cache: SlotCache, totals: Lengths) -> SlotCache:
        """Return a cache with capacity for ``totals`` positions per row that no other cache uses."""
        buffers = cache.buffers
        if totals.max() <= buffers.capacity and (buffers.written[cache.slots] == cache.lengths).all():
            return cache
        new = self._allocate(cache.batch, max(int(totals.max()), buffers.capacity))
        return self._move([Slot(cache, row) for row in range(cache.batch)], new)

    def _move(self, slots: Sequence[Slot[SlotCache]], buffers: _Buffers) -> SlotCache:
        """Move rows to the first slots of ``buffers``, except those that are in one already."""
        places = [slot.cache.slots[slot.row] for slot in slots]
        kept = [slot.cache.buffers is buffers and place < len(slots) for slot, place in zip(slots, places, strict=True)]
        taken = {int(place) for place, keep in zip(places, kept, strict=True) if keep}
        free = iter([place for place in range(len(slots)) if place not in taken])
        targets = np.array([place if keep else next(free) for place, keep in zip(places, kept, strict=True)], np.int64)
        lengths = np.array([slot.length for slot in slots], np.int64)
        for name, tensor in buffers.tensors.items():
            for slot, place, target, length in zip(slots, places, targets, lengths, strict=True):
                source = slot.cache.buffers.tensors[name]
                if source is not tensor or place != target:
                    tensor[target, :, :length] = source[place, :, :length]
        buffers.written[targets] = lengths
        return SlotCache(buffers, targets, lengths, np.array([slot.cache.rope_delta[slot.row] for slot in slots]))

    def _run_together(self, feeds: Mapping[str, Value], cache: SlotCache) -> Array:
        """Append one position to every row."""
        order = np.argsort(cache.slots)
        if (order[1:] < order[:-1]).any():
            feeds = _select(feeds, order, 1)
        logits = self._run(feeds, cache, int(cache.slots[order[0]]), cache.lengths[order], 1)
        together: Array = logits[np.argsort(order)]
        return together

    def _run_apart(self, feeds: Mapping[str, Value], cache: SlotCache, counts: Lengths) -> Array:
        """Append positions to each row in turn."""
        spec = self._session.outputs["logits"]
        logits = np.zeros((cache.batch, 1, fixed_size(spec, 2)), spec.dtype)
        for row, count in enumerate(counts.tolist()):
            if count:
                own = _select(feeds, slice(row, row + 1), count)
                logits[row] = self._run(own, cache, int(cache.slots[row]), cache.lengths[row : row + 1], count)
        return logits

    def _run(self, feeds: Mapping[str, Value], cache: SlotCache, begin: int, lengths: Lengths, count: int) -> Array:
        """Append ``count`` positions to adjacent slots, the first of which is ``begin``."""
        totals = (lengths + count).astype(np.int32)
        run = cache.buffers.bind(self._session, begin, len(lengths), self._present)
        outputs = run({**feeds, SEQLENS: totals - np.int32(1), TOTAL_LENGTH: totals.max(keepdims=True)})
        return outputs["logits"].numpy()


def _common_buffers(slots: Sequence[Slot[SlotCache]]) -> _Buffers:
    """Return the buffers that contain the most of these rows."""
    counts = Counter(id(slot.cache.buffers) for slot in slots)
    most = counts.most_common(1)[0][0]
    return next(slot.cache.buffers for slot in slots if id(slot.cache.buffers) == most)


def _select(feeds: Mapping[str, Value], rows: npt.NDArray[np.int64] | slice, count: int) -> dict[str, Value]:
    """Return the inputs for the last ``count`` positions of some rows."""
    embeds, positions = (to_host(feeds[name]) for name in ("inputs_embeds", "position_ids"))
    return {"inputs_embeds": embeds[rows, -count:], "position_ids": positions[..., rows, -count:]}
