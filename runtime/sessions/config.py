"""Settings of loading and running a package."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from promprune.checks import check_integer, check_name, check_number, require

__all__ = ["BACKENDS", "Provider", "RuntimeConfig", "usable_cpus"]

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]

# Backend -> module with ``open_session(package, graph, config) -> Session``; imported on first use.
BACKENDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "onnxruntime": "promprune.runtime.sessions.onnxruntime",
        "tensorrt": "promprune.runtime.sessions.tensorrt.session",
    }
)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings of loading and running a package.

    Attributes:
        backend: ``"onnxruntime"`` or another key of ``promprune.runtime.sessions.config.BACKENDS``.
        provider: provider of ONNX Runtime: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, ``"tensorrt-rtx"``, or ``"auto"``
            for CUDA if it loads, else the CPU.
        num_threads: CPU threads per operator; None for as many as this process may use.
        check_weights: compare the SHA-256 of the weight files with the manifest, which reads all their bytes.
        max_image_pixels: most pixels of an image; half of it for WebP and AVIF. More are refused before any is decoded,
            which takes up to 12 bytes of memory per pixel. The default is enough for a phone's photograph.
        image_cache_size: number of encoded images kept for reuse, by a digest of their pixels; 0 to keep none.
        prefill_chunk: most tokens of a prompt per run of the language model; None for the entire prompt. Limits the
            scratch memory of long prompts, at the cost of more runs.
        cuda_graphs: with the backend ``"tensorrt"``, replay the vision encoder and the decode steps as CUDA graphs;
            the latter needs the memory of two more KV caches of the largest size.
        accuracy_level: how ONNX Runtime multiplies by quantized weights: 4 for activations in int8, which is the
            fastest; 0 for exact products. The levels in between are those of its ``MatMulNBits``.
        lowered: use the decoder that was lowered for ONNX Runtime, if the package has one that is up to date.
        untrusted: run the package in a process of its own, on the CPU, with limits of memory and time; see
            :mod:`promprune.runtime.untrusted`.
        worker_memory_mb: address space of that process, in MiB; None for 3 GiB plus three times the package's files.
        worker_timeout_s: most seconds for loading the package there, and for a request without ``timeout_s``.

    Raises:
        ConfigError: a value has the wrong type, or is out of its range.
    """

    backend: str = "onnxruntime"
    provider: Provider = "auto"
    num_threads: int | None = None
    check_weights: bool = False
    max_image_pixels: int = 52_000_000
    image_cache_size: int = 8
    prefill_chunk: int | None = None
    cuda_graphs: bool = False
    accuracy_level: int = 4
    lowered: bool = True
    untrusted: bool = False
    worker_memory_mb: int | None = None
    worker_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        check_name(self, "backend", tuple(BACKENDS))
        check_name(self, "provider", get_args(Provider))
        check_integer(self, "num_threads", least=1, optional=True)
        check_integer(self, "max_image_pixels", least=1)
        check_integer(self, "image_cache_size", least=0)
        check_integer(self, "prefill_chunk", least=1, optional=True)
        check_integer(self, "accuracy_level", least=0, most=4)
        check_integer(self, "worker_memory_mb", least=1, optional=True)
        most = threading.TIMEOUT_MAX
        check_number(self, "worker_timeout_s", lambda value: 0 < value < most, "seconds above 0")
        on_cpu = self.backend == "onnxruntime" and self.provider in ("auto", "cpu")
        require(on_cpu or not self.untrusted, "untrusted", self.untrusted, "the backend onnxruntime on the CPU with it")
        engines = self.backend == "tensorrt"
        require(engines or not self.cuda_graphs, "cuda_graphs", self.cuda_graphs, "the backend 'tensorrt' with it")


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
