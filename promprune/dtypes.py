"""The element types of a package."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ["DTYPES", "Dtype"]

Dtype = Literal["fp32", "fp16", "bf16"]

DTYPES: Final = get_args(Dtype)
