"""The KV cache of a lowered decoder: slots of one buffer with separate lengths, copied only if necessary."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest

from promprune.errors import BackendError
from promprune.package.manifest import TensorRecord
from promprune.runtime.engine.cache import Slot
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.engine.slots import SlotCache, SlotCacheManager
from promprune.runtime.sessions import BoundRun, DeviceTensor, Session, Value

Array = np.ndarray[Any, Any]
HIDDEN = 4
KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"


class HostTensor:
    """An array as a :class:`DeviceTensor`."""

    def __init__(self, array: Array) -> None:
        self.array, self.dtype, self.shape, self.nbytes = array, str(array.dtype), array.shape, array.nbytes

    def numpy(self) -> Array:
        return self.array


def spec(name: str, dtype: str, shape: tuple[int | str, ...]) -> TensorRecord:
    return TensorRecord(name=name, dtype=dtype, shape=shape)


class SummingDecoder(Session):
    """A lowered decoder whose keys are the embeddings, and whose logits are their sum over the text, position-weighted.

    Attributes:
        runs: the number of rows and of new positions of every run.
        fails: whether the next run fails, after it wrote to the buffers.
    """

    name, device = "decoder", "CPU"

    def __init__(self) -> None:
        past = ("batch", 1, "capacity", HIDDEN)
        self.inputs = {
            "inputs_embeds": spec("inputs_embeds", "float32", ("batch", "sequence", HIDDEN)),
            "position_ids": spec("position_ids", "int64", ("batch", "sequence")),
            "seqlens_k": spec("seqlens_k", "int32", ("batch",)),
            "total_sequence_length": spec("total_sequence_length", "int32", (1,)),
            **{name: spec(name, "float32", past) for name in (KEY, VALUE)},
        }
        self.outputs = {
            "logits": spec("logits", "float32", ("batch", 1, HIDDEN)),
            **{name: spec(name, "float32", past) for name in ("present.0.key", "present.0.value")},
        }
        self.runs: list[tuple[int, int]] = []
        self.fails = False

    def bind_buffers(self, buffers: Mapping[str, Array], updated: Mapping[str, str]) -> BoundRun:
        assert updated == {"present.0.key": KEY, "present.0.value": VALUE}
        return lambda inputs: self.run_on(buffers[KEY], inputs)

    def run_on(self, keys: Array, inputs: Mapping[str, Value]) -> dict[str, DeviceTensor]:
        self._begin(inputs, bound=(KEY, VALUE))
        embeds, positions = (np.asarray(inputs[name]) for name in ("inputs_embeds", "position_ids"))
        totals = np.asarray(inputs["seqlens_k"]) + 1
        assert np.asarray(inputs["total_sequence_length"]).item() == totals.max()
        assert len(keys) == len(embeds)
        count = embeds.shape[1]
        assert count == 1 or len(embeds) == 1, "the operator appends several positions to one row only"
        self.runs.append((len(embeds), count))
        for row, total in enumerate(totals):
            assert (positions[row] == np.arange(total - count, total)).all()
            keys[row, 0, total - count : total] = embeds[row]
        if self.fails:
            raise BackendError("no memory")
        return {"logits": HostTensor(np.stack([logits_of(keys[row, 0, :n]) for row, n in enumerate(totals)])[:, None])}

    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        raise AssertionError("a lowered decoder runs into its buffers")

    def close(self) -> None:
        pass


def logits_of(text: Array) -> Array:
    """What the decoder answers to [length, hidden]; depends on the order."""
    return np.asarray((text * np.arange(1, len(text) + 1, dtype=np.float32)[:, None]).sum(axis=0))


class Texts:
    """A decoder, and texts whose caches are compared with what they should hold after every run."""

    def __init__(self, prefill_chunk: int | None = None) -> None:
        self.session = SummingDecoder()
        self.decoder = Decoder(self.session, prefill_chunk)
        assert isinstance(self.decoder.caches, SlotCacheManager)
        self.random = np.random.default_rng(0)

    def new(self, length: int) -> Array:
        return self.random.integers(-3, 4, (length, HIDDEN)).astype(np.float32)

    def prefill(self, *texts: Array, cache: SlotCache | None = None, capacity: int = 0) -> SlotCache:
        longest = max(len(text) for text in texts)
        embeds = np.stack([np.pad(text, ((longest - len(text), 0), (0, 0))) for text in texts])
        mask = np.array([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        before = self.decoder.caches.empty(len(texts), capacity) if cache is None else cache
        logits, after = self.decoder.forward(embeds, before, mask)
        if cache is None:
            np.testing.assert_array_equal(logits, [logits_of(text) for text in texts])
        assert isinstance(after, SlotCache)
        return after

    def step(self, texts: list[Array], slots: list[Slot[SlotCache]]) -> tuple[list[Array], SlotCache]:
        """Append one token to every text."""
        tokens = self.new(len(texts))
        logits, cache = self.decoder.forward(tokens[:, None], self.decoder.caches.gather(slots))
        texts = [np.concatenate([text, token[None]]) for text, token in zip(texts, tokens, strict=True)]
        np.testing.assert_array_equal(logits, [logits_of(text) for text in texts])
        return texts, cache


def rows(cache: SlotCache, *chosen: int) -> list[Slot[SlotCache]]:
    return [Slot(cache, row) for row in chosen or range(cache.batch)]


def test_steps_copy_nothing_and_rows_need_no_padding() -> None:
    run = Texts()
    texts = [run.new(length) for length in (5, 40, 1)]
    cache = run.prefill(*texts)
    assert run.session.runs == [(1, 5), (1, 40), (1, 1)]
    buffer = cache.buffers.tensors[KEY]
    for _ in range(10):
        texts, cache = run.step(texts, rows(cache))
        assert cache.buffers.tensors[KEY] is buffer
    assert cache.lengths.tolist() == [15, 50, 11]
    assert run.session.runs[3:] == [(3, 1)] * 10


def test_rows_leave_and_join_in_any_order() -> None:
    run = Texts()
    texts = [run.new(length) for length in (9, 3, 6, 2)]
    cache = run.prefill(*texts)
    texts, cache = run.step([texts[i] for i in (3, 0, 2)], rows(cache, 3, 0, 2))  # row 1 leaves
    assert sorted(cache.slots.tolist()) == [0, 1, 2]
    joining = [run.new(7), run.new(12)]
    others = [run.prefill(text) for text in joining]
    slots = [Slot(others[0], 0), *rows(cache), Slot(others[1], 0)]
    texts, cache = run.step([joining[0], *texts, joining[1]], slots)
    assert len(cache.buffers.written) == 8  # a batch that grows has room for twice as many rows
    for keep in ([4, 1, 0], [2, 0], [1], [0]):
        texts, cache = run.step([texts[i] for i in keep], rows(cache, *keep))


def test_capacity_grows_unless_it_was_reserved() -> None:
    run = Texts()
    for reserved, buffers in ((0, 2), (300, 1)):
        texts = [run.new(250)]
        cache = run.prefill(*texts, capacity=reserved)
        seen = {id(cache.buffers)}
        for _ in range(20):
            texts, cache = run.step(texts, rows(cache))
            seen.add(id(cache.buffers))
        assert len(seen) == buffers
        assert cache.buffers.capacity == 512


def test_going_back_leaves_the_longer_text_as_it_was() -> None:
    run = Texts()
    text = run.new(20)
    whole = run.prefill(text)
    first = run.prefill(run.new(3), cache=whole.truncate(12))
    assert first.buffers is not whole.buffers
    np.testing.assert_array_equal(whole.buffers.tensors[KEY][0, 0, :20], text)
    longer = run.prefill(run.new(4), cache=whole)  # nothing is lost: it continues in place
    assert longer.buffers is whole.buffers
    again = run.prefill(run.new(4), cache=whole)  # and once more, from the same place
    assert again.buffers is not whole.buffers
    np.testing.assert_array_equal(again.buffers.tensors[KEY][0, 0, :20], text)


def test_a_run_that_fails_leaves_the_cache_usable() -> None:
    run = Texts()
    texts = [run.new(5), run.new(8)]
    cache = run.prefill(*texts)
    run.session.fails = True
    with pytest.raises(BackendError):
        run.step(texts, rows(cache))
    run.session.fails = False
    run.step(texts, rows(cache))


def test_a_row_that_is_kept_is_not_changed_by_its_batch() -> None:
    run = Texts()
    texts = [run.new(5), run.new(8)]
    cache = run.prefill(*texts)
    kept = run.decoder.caches.extract(Slot(cache, 1))
    text = texts[1]
    for _ in range(3):
        texts, cache = run.step(texts, rows(cache))
    np.testing.assert_array_equal(kept.buffers.tensors[KEY][0, 0, :8], text)
    run.step([text], rows(kept))
    alone = run.prefill(run.new(4))
    assert run.decoder.caches.extract(Slot(alone, 0)) is alone


def test_prompts_are_read_in_chunks() -> None:
    run = Texts(prefill_chunk=4)
    run.prefill(run.new(9), run.new(3), run.new(6))
    assert run.session.runs == [(1, 1), (1, 4), (1, 2), (1, 4), (1, 3), (1, 4)]


def test_memory_is_stated() -> None:
    run = Texts()
    cache = run.prefill(run.new(3), run.new(5))
    assert run.decoder.caches.bytes_per_token == 2 * HIDDEN * 4
    assert cache.nbytes == 2 * 256 * 2 * HIDDEN * 4
