"""The KV cache, compared with lists of vectors: each row keeps its own tokens while others join or leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promprune.package.manifest import TensorRecord
from promprune.runtime.engine import cache as module
from promprune.runtime.engine.cache import CachedPrefix, KVCache, KVCacheManager, Slot, padded_tokens
from promprune.runtime.sessions import DeviceTensor, Session, Value

HEADS, SIZE = 2, 3
NAMES = ("past_key_values.0.key", "past_key_values.0.value")


class Tensor:
    """A tensor on the host; satisfies :class:`DeviceTensor`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype, self.shape, self.nbytes = array, str(array.dtype), array.shape, array.nbytes

    def numpy(self) -> np.ndarray:
        return self.array


class Appending(Session):
    """A decoder whose keys are its inputs, [batch, sequence, HEADS * SIZE], and whose values are their negatives."""

    name, device = "appending", "CPU"

    def __init__(self, copies_on_device: bool = False) -> None:
        self.copies_on_device = copies_on_device
        past = ("batch", HEADS, "past", SIZE)
        present = ("batch", HEADS, "total", SIZE)
        self.inputs = {
            "inputs_embeds": TensorRecord(
                name="inputs_embeds", dtype="float32", shape=("batch", "sequence", HEADS * SIZE)
            ),
            "attention_mask": TensorRecord(name="attention_mask", dtype="int64", shape=("batch", "total")),
            **{name: TensorRecord(name=name, dtype="float32", shape=past) for name in NAMES},
        }
        outputs = [name.replace("past_key_values", "present") for name in NAMES]
        self.outputs = {name: TensorRecord(name=name, dtype="float32", shape=present) for name in outputs}
        self.masks: list[np.ndarray] = []

    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        embeds: Any = inputs["inputs_embeds"]
        new = embeds.reshape(*embeds.shape[:2], HEADS, SIZE).transpose(0, 2, 1, 3)
        self.masks.append(np.array(inputs["attention_mask"]))
        past = {name: np.asarray(getattr(inputs[name], "array", inputs[name])) for name in NAMES}
        key, value = (
            np.concatenate([past[name], sign * new], axis=2) for name, sign in zip(NAMES, (1, -1), strict=True)
        )
        return dict(zip((*self.outputs, "logits"), map(Tensor, (key, value, new)), strict=True))

    def close(self) -> None: ...


def held(slot: Slot) -> np.ndarray:
    """Return the content of a row, [length, HEADS * SIZE]."""
    key, value = (np.asarray(getattr(t, "array", t))[slot.row] for t in slot.cache.tensors.values())
    np.testing.assert_array_equal(key, -value)
    own = slot.cache.mask[slot.row] == 1
    return key[:, : slot.cache.length][:, own].transpose(1, 0, 2).reshape(-1, HEADS * SIZE)


def prefill(manager: KVCacheManager, rows: list[np.ndarray]) -> KVCache:
    longest = max(map(len, rows))
    embeds, mask = np.zeros((len(rows), longest, HEADS * SIZE), np.float32), np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        embeds[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return manager.run({"inputs_embeds": embeds}, manager.empty(len(rows)), mask)[1]


def check(slots: Mapping[int, Slot], expected: Mapping[int, np.ndarray]) -> None:
    for number, slot in slots.items():
        np.testing.assert_array_equal(held(slot), expected[number])
        assert slot.length == len(expected[number])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_rows_hold_their_own_tokens_whatever_joins_and_leaves(
    in_place: bool, on_device: bool, data: st.DataObject
) -> None:
    """Random prefills, steps, leaving and joining; a step may run twice, as in a chat turn that is repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CAPACITY_STEP", 4)
        random, manager = np.random.default_rng(0), KVCacheManager(Appending(on_device), in_place=in_place)
        expected: dict[int, np.ndarray] = {}
        slots: dict[int, Slot] = {}
        for _ in range(data.draw(st.integers(1, 8))):
            for number in data.draw(st.lists(st.sampled_from(sorted(slots) or [0]), max_size=2)):
                slots.pop(number, None)
            lengths = data.draw(st.lists(st.integers(1, 6), max_size=3))
            if slots:
                cache = manager.gather(list(slots.values()))
                assert cache.length == max(slot.length for slot in slots.values())  # no padding in common
                for _ in range(data.draw(st.integers(1, 2))):
                    new = random.normal(size=(len(slots), 1, HEADS * SIZE)).astype(np.float32)
                    following = manager.run({"inputs_embeds": new}, cache, np.ones((len(slots), 1), np.int64))[1]
                check({number: Slot(cache, row) for row, number in enumerate(slots)}, expected)
                for row, number in enumerate(slots):
                    expected[number] = np.concatenate([expected[number], new[row]])
                slots = {number: Slot(following, row) for row, number in enumerate(slots)}
            if lengths:
                rows = [random.normal(size=(n, HEADS * SIZE)).astype(np.float32) for n in lengths]
                joined, first = prefill(manager, rows), len(expected)
                expected |= {first + number: row for number, row in enumerate(rows)}
                slots |= {first + number: Slot(joined, number) for number in range(len(rows))}
            check(slots, expected)


def test_gathering_a_whole_cache_copies_nothing() -> None:
    manager = KVCacheManager(Appending())
    cache = prefill(manager, [np.ones((3, HEADS * SIZE)), np.ones((2, HEADS * SIZE))])
    assert manager.gather([Slot(cache, 0), Slot(cache, 1)]) is cache
    assert manager.gather([Slot(cache, 1), Slot(cache, 0)]) is not cache
    alone = manager.gather([Slot(cache, 1)])
    assert (alone.batch, alone.length, alone.mask.tolist()) == (1, 2, [[1, 1]])
    assert alone.nbytes == 2 * manager.bytes_per_token
    assert Slot(cache, 0).nbytes == 3 * manager.bytes_per_token  # its share, padding included


@pytest.mark.parametrize("in_place", [False, True])
def test_a_truncated_cache_goes_on_without_what_was_cut(in_place: bool) -> None:
    manager = KVCacheManager(session := Appending(), in_place=in_place)
    rows = np.random.default_rng(1).normal(size=(1, 6, HEADS * SIZE)).astype(np.float32)
    whole = prefill(manager, [rows[0]])
    other = np.ones((1, 1, HEADS * SIZE), np.float32)
    cut = manager.run({"inputs_embeds": other}, whole.truncate(4), np.ones((1, 1), np.int64))[1]
    np.testing.assert_array_equal(held(Slot(cut, 0)), np.concatenate([rows[0, :4], other[0]]))
    np.testing.assert_array_equal(held(Slot(whole, 0)), rows[0])
    assert session.masks[-1].sum() == 5


def test_a_prefix_is_as_long_as_both_agree_and_leaves_a_token_to_prefill() -> None:
    prefix = CachedPrefix(np.array([5, 6, 7]), KVCacheManager(Appending()).empty(1))
    prompts = {(5, 6, 7, 8): 3, (5, 6, 7): 2, (5, 9, 7, 8): 1, (4,): 0, (5,): 0, (5, 6, 8): 2}
    assert {prompt: prefix.common_length(np.array(prompt)) for prompt in prompts} == prompts


def test_the_memory_of_rows_is_that_of_the_longest_each() -> None:
    assert padded_tokens([3, 9, 2]) == 27
    assert padded_tokens([]) == 0
