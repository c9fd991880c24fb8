"""The greedy coverage stage as one Triton kernel: one program per image, no launch per step.

Imported only if Triton is installed and the features are on CUDA. ``TRITON_INTERPRET=1`` runs it on the CPU; its
tests use that to compare it with the loop of :mod:`promprune.method.batched`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from promprune.method.reference import RESIDUAL_FLOOR

__all__ = ["fused_coverage_picks"]

# Elements of the coordinates that a program loads at a time: rows x tokens, the latter rounded up to a power of two.
_TILE_ELEMENTS = 8192


def fused_coverage_picks(kernel: Tensor, loss: Tensor, count: Tensor, keep_tokens: int) -> Tensor:
    """Compute :func:`promprune.method.batched.coverage_picks` in one kernel launch.

    Each image stops after its own T - T_sal picks, read on the device. Scratch: ``B * T * N`` floats.
    """
    batch, n = loss.shape
    kernel, loss, count = kernel.contiguous(), loss.contiguous(), count.contiguous()
    coordinates = torch.empty(batch, keep_tokens, n, dtype=torch.float32, device=kernel.device)
    picks = torch.zeros(batch, keep_tokens, dtype=torch.int64, device=kernel.device)
    tokens = triton.next_power_of_2(n)
    launch: Any = _greedy[(batch,)]
    launch(
        kernel,
        loss,
        count,
        coordinates,
        picks,
        n,
        keep_tokens,
        RESIDUAL_FLOOR,
        TOKENS=tokens,
        ROWS=max(1, _TILE_ELEMENTS // tokens),
        num_warps=8,
    )
    return picks


@triton.jit
def _greedy(  # type: ignore[no-untyped-def]
    kernel_ptr,
    loss_ptr,
    count_ptr,
    coordinates_ptr,
    picks_ptr,
    n,
    keep,
    floor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, TOKENS)
    inside = token < n
    kernel_ptr += image * n * n
    coordinates_ptr += image * keep * n
    loss = tl.load(loss_ptr + image * n + token, mask=inside, other=2e30)
    steps = keep - tl.load(count_ptr + image).to(tl.int32)
    for t in range(steps):
        # All losses within the floor of 1 are tied, and the lowest index wins.
        key = tl.where((loss > 1 - floor) & (loss < 1.5), 1.0, loss)
        pick = tl.argmin(key, axis=0, tie_break_left=True)
        least = tl.min(key, axis=0)
        # If all tokens are spanned, the new direction is rounding noise, and dividing by a large number removes it.
        residual = tl.where(least < 1, 1 - least, 1e30)
        new = tl.load(kernel_ptr + pick * n + token, mask=inside, other=0.0)
        for start in range(0, t, ROWS):
            row = start + tl.arange(0, ROWS)
            own = tl.load(coordinates_ptr + row * n + pick, mask=row < t, other=0.0)
            tile = tl.load(
                coordinates_ptr + row[:, None] * n + token[None, :],
                mask=(row[:, None] < t) & inside[None, :],
                other=0.0,
            )
            new -= tl.sum(own[:, None] * tile, axis=0)
        new = new / tl.sqrt(residual)
        tl.store(coordinates_ptr + t * n + token, new, mask=inside)
        tl.store(picks_ptr + image * keep + t, pick.to(tl.int64))
        loss = tl.where(token == pick, 1e30, loss + new * new)
        # The next step reads a column that other threads have just written.
        tl.debug_barrier()
