"""The two TensorRT modules and their capabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promprune.errors import ConfigError
from promprune.package.engines import CURRENT, EngineBackend, current_target, parse_target
from promprune.runtime.sessions.tensorrt.modules import load_tensorrt

__all__ = ["Toolkit", "load_toolkit"]


@dataclass(frozen=True)
class Toolkit:
    """One of the two TensorRT modules.

    Attributes:
        backend: its name on the command line.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: version of the module.
    """

    backend: EngineBackend
    module: Any
    version: str

    @property
    def cross_targets(self) -> dict[str, Any]:
        """Targets that it can build for without their GPU: name such as ``sm89`` -> constant; empty for TensorRT."""
        capability = getattr(self.module, "ComputeCapability", None)
        members: dict[str, Any] = getattr(capability, "__members__", {})
        return {name.lower(): value for name, value in members.items() if name.startswith("SM")}

    @property
    def times_kernels(self) -> bool:
        """Whether a build measures kernels, so that a timing cache saves time; TensorRT for RTX does not."""
        return self.backend == "tensorrt"

    def resolve(self, text: str) -> str:
        """Return the target that ``text`` names, such as ``"sm89"``.

        Raises:
            ConfigError: it is not a target, or this toolkit cannot build for it on this machine.
            BackendError: it names the GPU of this machine, which has none.
        """
        target, known = parse_target(text), self.cross_targets
        if target in known:
            return target
        if known and target != CURRENT:
            raise ConfigError(
                f"received target {text!r}, which {self.backend} {self.version} does not know",
                expected=f"one of {', '.join(known)}, {CURRENT}",
                fix="choose a target from that list, or build with --backend tensorrt on a machine with that GPU",
            )
        here = current_target()
        if target not in (CURRENT, here):
            raise ConfigError(
                f"received target {text!r}, but this machine has {here}",
                expected=f"{here} or {CURRENT}: {self.backend} builds only for the GPU of this machine",
                fix="build on a machine with that GPU, or use --backend tensorrt-rtx",
            )
        return here


def load_toolkit(backend: EngineBackend) -> Toolkit:
    """Import the module of a backend.

    Raises:
        MissingDependencyError: it is not installed.
        BackendError: it is installed, but does not load.
    """
    module = load_tensorrt(backend)
    return Toolkit(backend, module, str(module.__version__))
