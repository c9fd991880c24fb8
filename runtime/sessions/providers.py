"""ONNX Runtime's execution providers, as the command line names them: one table."""

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
    return {"use_tf32": "0"}  # the Gram product of the selection loses its order in TF32


def _tensorrt(engines: Path | None) -> dict[str, str]:
    """TF32 can only be switched off for the whole process."""
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
    with contextlib.suppress(OSError):  # a package that cannot be written is run without a cache
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder.absolute())


@dataclass(frozen=True, kw_only=True)
class ExecutionProvider:
    """One execution provider.

    Attributes:
        ort_name: ONNX Runtime's name of it.
        device: where it computes: ``"CPU"`` or ``"CUDA"``.
        falls_back_to: providers, as in :data:`PROVIDERS`, that run what it cannot.
        automatic: whether ``"auto"`` takes it where it loads.
        options: of the provider, given the folder for engines that it may keep; None: it keeps none.
        needs: what must be there, in words.
        fix: how to get it.
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
    """Say why a provider cannot be used, as far as that can be told without trying; ``None``: try it."""
    if PROVIDERS[name].ort_name not in ort.get_available_providers():
        return "this ONNX Runtime is built without it"
    return None if PROVIDERS[name].device == "CPU" else _why_no_driver()


def refused(name: str, reason: str) -> BackendError:
    """Return the error of a provider that was asked for and cannot be had."""
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
