"""Which part of the device's ceilings a measured row reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["bound_ms", "ceilings_of"]

Row = Mapping[str, Any]


def ceilings_of(rows: Sequence[Row]) -> dict[str, float]:
    """Return the ceilings of the roofline stage: ``copy`` in bytes per second, ``bf16``, ``fp32``, ... in FLOP/s."""
    per_s = {row["ceiling"]: row.get("bytes_per_s", row.get("flops_per_s")) for row in rows if "ceiling" in row}
    return {name: value for name, value in per_s.items() if value is not None}


def bound_ms(row: Row, ceilings: Mapping[str, float]) -> float | None:
    """Return the least time that a row's work can take: the longer of its FLOPs and its bytes at the ceilings.

    Returns:
        Milliseconds; None if the row has no work, or a ceiling was not measured.
    """
    if "flops" not in row or not {row["unit"], "copy"} <= ceilings.keys():
        return None
    return 1e3 * max(row["flops"] / ceilings[row["unit"]], row.get("traffic_bytes", 0) / ceilings["copy"])
