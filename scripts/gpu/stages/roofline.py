"""The ceilings of this device: a large copy, and large matrix products."""

from __future__ import annotations

import torch

from scripts.gpu.measure import timing
from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes

PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(sizes: Sizes, record: Record) -> None:
    """Record rows of ``ceiling``: ``copy`` in bytes read and written per second, products in FLOP/s."""
    record.attempt(lambda: _copy(sizes), ceiling="copy")
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # as the selection computes
    for name, dtype in PRODUCTS.items():
        record.attempt(lambda dtype=dtype: _product(sizes, dtype), ceiling=name)


def _copy(sizes: Sizes) -> dict[str, float]:
    source = torch.randint(0, 255, (sizes.copy_bytes,), dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    measured = timing(lambda: target.copy_(source), sizes)
    return {**measured, "bytes_per_s": 2 * sizes.copy_bytes / measured["median_ms"] * 1e3}


def _product(sizes: Sizes, dtype: torch.dtype) -> dict[str, float]:
    side = sizes.product_side
    left, right = (torch.randn(side, side, device=sizes.device, dtype=dtype) for _ in range(2))
    measured = timing(lambda: left @ right, sizes)
    return {**measured, "flops_per_s": 2 * side**3 / measured["median_ms"] * 1e3}
