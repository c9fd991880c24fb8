"""The ONNX operator sets that graphs can be exported with; needs no onnx."""

from __future__ import annotations

from typing import Final

from promprune.errors import ConfigError

__all__ = ["DEFAULT_OPSET", "QUANTIZED_OPSET", "check_opset"]

MIN_OPSET: Final = 18  # reductions take their axes as an input
MAX_OPSET: Final = 23
DEFAULT_OPSET: Final = 20
QUANTIZED_OPSET: Final = 21  # the first in which DequantizeLinear takes int4, and blocks


def check_opset(opset: int) -> None:
    """Refuse an operator set that graphs cannot be exported with.

    Raises:
        ConfigError: it is out of range.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ConfigError(f"received opset = {opset}", expected=f"{MIN_OPSET} to {MAX_OPSET}")
