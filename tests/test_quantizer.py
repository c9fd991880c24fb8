"""The arithmetic of quantization, on weights of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from promprune.export.quantize.quantizer import (
    Bits,
    NotFiniteError,
    dequantize_blocks,
    integer_range,
    pack_int4,
    quantize_blocks,
    unpack_int4,
)

HALF_STEP = 0.502  # of a scale, which fp16 rounds
SCALE_STEP = 2.0**-24  # between the smallest numbers of fp16


@st.composite
def weights(draw: st.DrawFn) -> NDArray[np.float32]:
    """``[K, N]``: any K, also odd; columns of zeros, outliers, and scales from 1e-4 to 1e2."""
    length, columns = draw(st.integers(1, 300)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((length, columns)) * 10.0 ** draw(st.integers(-4, 2))
    if draw(st.booleans()):
        values[:, draw(st.integers(0, columns - 1))] = 0
    if draw(st.booleans()):
        values[draw(st.integers(0, length - 1)), draw(st.integers(0, columns - 1))] *= 100
    return values.astype(np.float32) if draw(st.booleans()) else np.asfortranarray(values.astype(np.float32))


def peaks_of(values: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """The largest magnitude in the block of each weight."""
    starts = np.arange(0, len(values), block_size)
    return np.repeat(np.maximum.reduceat(np.abs(values), starts), block_size, axis=0)[: len(values)]


@settings(deadline=None, max_examples=150)
@given(weights(), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128, 300]))
def test_no_block_has_more_error_than_with_its_largest_weight_as_the_highest_integer(
    values: NDArray[np.float32], bits: Bits, block_size: int
) -> None:
    integers, scales = quantize_blocks(values, bits=bits, block_size=block_size)
    low, high = integer_range(bits)
    assert integers.shape == values.shape
    assert scales.shape == (-(-len(values) // block_size), values.shape[1])
    assert scales.dtype == np.float16
    assert (scales > 0).all()
    assert integers.min() >= low
    assert integers.max() <= high
    restored = dequantize_blocks(integers, scales, block_size=block_size)
    bound = HALF_STEP * peaks_of(values, block_size) / high + high * SCALE_STEP
    starts = np.arange(0, len(values), block_size)
    errors = np.add.reduceat(((restored - values) / bound) ** 2, starts)
    sizes = np.diff([*starts, len(values)])[:, None]
    assert (errors <= sizes * 1.001).all()


@given(weights(), st.sampled_from([4, 8]))
def test_zeros_stay_zeros(values: NDArray[np.float32], bits: Bits) -> None:
    integers, scales = quantize_blocks(values, bits=bits, block_size=32)
    assert (dequantize_blocks(integers, scales, block_size=32)[values == 0] == 0).all()


@given(st.sampled_from([4, 8]), st.sampled_from([16, 32, 128]), st.integers(0, 2**32 - 1))
def test_integers_times_powers_of_two_are_kept_exactly(bits: Bits, block_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = integer_range(bits)
    integers = rng.integers(low + 1, high + 1, (block_size * 2, 5)).astype(np.float32)
    integers[::block_size] = high  # the whole range is used
    values = integers * np.float32(2.0 ** rng.integers(-12, 3))
    restored = dequantize_blocks(*quantize_blocks(values, bits=bits, block_size=block_size), block_size=block_size)
    np.testing.assert_array_equal(restored, values)


def test_the_search_beats_the_largest_weight_over_seven() -> None:
    values = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    restored = dequantize_blocks(*quantize_blocks(values, bits=4, block_size=32), block_size=32)
    plain = np.float32(1 / 7) * peaks_of(values, 32)
    of_plain = np.rint(values / plain) * plain
    assert np.linalg.norm(restored - values) < 0.91 * np.linalg.norm(of_plain - values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (37, 2), (63, 4)])
def test_nan_and_infinity_are_refused(bad: float, place: tuple[int, int]) -> None:
    values = np.zeros((64, 5), np.float32)
    values[place] = bad
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        quantize_blocks(values, bits=4, block_size=32)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_packing_is_that_of_onnx_and_can_be_undone(length: int, columns: int, seed: int) -> None:
    ml_dtypes: Any = pytest.importorskip("ml_dtypes")
    ir: Any = pytest.importorskip("onnx_ir")
    integers = np.random.default_rng(seed).integers(-8, 8, (length, columns)).astype(np.int8)
    packed = pack_int4(integers)
    assert packed.tobytes() == ir.Tensor(integers.astype(ml_dtypes.int4), dtype=ir.DataType.INT4).tobytes()
    np.testing.assert_array_equal(unpack_int4(packed, integers.shape), integers)
