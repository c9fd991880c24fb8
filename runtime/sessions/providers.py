"""The table of ONNX Runtime's execution providers, by their names on the command line."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnxruntime as ort

from promprune.errors import BackendError

__all__ = ["AUTO", "CPU", "PROVIDERS", "ExecutionProvider", "refused", "why_not"]

AUTO: Final = "auto"
CPU: Final = "cpu"


def _cpu(engines: Path | None) -> dict[str, str]:
    del engines
    return {}


def _cuda(engines: Path | None) -> dict[str, str]:
    del engines
    return {"use_tf32": "0"}  # TF32 changes the results of the selection: its Gram matrix needs fp32


def _tensorrt(engines: Path | None) -> dict[str, str]:
    """Return TensorRT's options; TF32 can only be switched off for the entire process."""
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if engines is None:
        return {}
    folder = _cache_folder(engines / "onnxruntime-tensorrt")
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }


def _tensorrt_rtx(engines: Path | None) -> dict[str, str]:
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    return {} if engines is None else {"nv_runtime_cache_path": _cache_folder(engines / "onnxruntime-tensorrt-rtx")}


def _cache_folder(folder: Path) -> str:
    with contextlib.suppress(OSError):  # if the package is not writable, it runs without a cache
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder.absolute())


@dataclass(frozen=True, kw_only=True)
class ExecutionProvider:
    """One execution provider.

    Attributes:
        ort_name: its name in ONNX Runtime.
        device: the device it runs on: ``"CPU"`` or ``"CUDA"``.
        falls_back_to: keys of :data:`PROVIDERS` for operators that it does not support.
        automatic: whether ``"auto"`` uses it if it loads.
        options: returns the provider's options for the folder where it may store engines; None to store none.
        needs: its requirements, in words.
        fix: how to meet them.
    """

    ort_name: str
    device: str
    falls_back_to: tuple[str, ...] = ()
    automatic: bool = False
    options: Callable[[Path | None], dict[str, str]] = _cpu
    needs: str = ""
    fix: str = ""


# In the order of preference.
PROVIDERS: Final[Mapping[str, ExecutionProvider]] = MappingProxyType(
    {
        "tensorrt": ExecutionProvider(
            ort_name="TensorrtExecutionProvider",
            device="CUDA",
            falls_back_to=("cuda", CPU),
            options=_tensorrt,
            needs="an NVIDIA GPU with its driver, CUDA, cuDNN and the TensorRT that ONNX Runtime was built for",
            fix="use --provider cuda or cpu, or pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt",
        ),
        "tensorrt-rtx": ExecutionProvider(
            ort_name="NvTensorRTRTXExecutionProvider",
            device="CUDA",
            falls_back_to=("cuda", CPU),
            options=_tensorrt_rtx,
            needs="an ONNX Runtime built with TensorRT for RTX, and an RTX GPU with its driver",
            fix="use --provider cuda or cpu, or promprune-build and --backend tensorrt",
        ),
        "cuda": ExecutionProvider(
            ort_name="CUDAExecutionProvider",
            device="CUDA",
            falls_back_to=(CPU,),
            automatic=True,
            options=_cuda,
            needs="an NVIDIA GPU with its driver, CUDA and cuDNN",
            fix="use --provider cpu, or pip install 'onnxruntime-gpu[cuda,cudnn]'",
        ),
        CPU: ExecutionProvider(ort_name="CPUExecutionProvider", device="CPU", automatic=True),
    }
)


def why_not(name: str) -> str | None:
    """Return why a provider cannot be used, as far as this is known without loading it; None if nothing is known."""
    if PROVIDERS[name].ort_name not in ort.get_available_providers():
        return "this ONNX Runtime is built without it"
    return None if PROVIDERS[name].device == "CPU" else _why_no_driver()


def refused(name: str, reason: str) -> BackendError:
    """Return the error for a requested provider that is not available."""
    provider = PROVIDERS[name]
    return BackendError(
        f"received provider {name!r}, which cannot be used here ({reason})", expected=provider.needs, fix=provider.fix
    )


def _why_no_driver() -> str | None:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    return None
