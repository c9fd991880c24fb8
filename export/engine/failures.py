"""Error messages for engines that could not be built."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from promprune.errors import BackendError
from promprune.runtime.sessions.tensorrt.modules import trimmed

__all__ = ["build_error"]

_MEMORY_WORDS: Final = (
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "cannot allocate",
    "resource temporarily unavailable",
)


def build_error(path: Path, target: str, messages: list[str]) -> BackendError:
    """Make the error for an engine that could not be built from the builder's log messages, oldest first."""
    text = " ".join(messages).lower()
    reason = trimmed(messages[0]) if messages else "the builder gave no reason"
    if any(word in text for word in _MEMORY_WORDS):
        return BackendError(
            f"building {path} for {target} ran out of memory ({reason})",
            expected="more free memory",
            fix="lower --workspace-mib, --max-batch or --max-prompt-tokens, or close other programs",
        )
    if "driver version is insufficient" in text or "cudaerror 35" in text:
        return BackendError(
            f"building {path} for {target} needs a GPU, and the driver here is missing or too old ({reason})",
            expected="a current NVIDIA driver",
            fix="update the driver, or name a target that can be built without its GPU, such as --target sm89",
        )
    if "cannot compile operation" in text or "compute capability" in text:
        return BackendError(
            f"{path} cannot be built for {target} ({reason})",
            fix="choose a newer target; the selection computes in fp32 with every --dtype",
        )
    return BackendError(
        f"{path} cannot be built for {target} ({reason})",
        fix="export with another --opset or --dtype, or run the package with ONNX Runtime",
    )
