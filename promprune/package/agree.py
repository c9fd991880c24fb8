"""Comparing the inputs and outputs of a graph with those it should have: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from promprune.errors import PackageError
from promprune.package.manifest import TensorRecord

__all__ = ["UNKNOWN", "Difference", "HasTensors", "check_graph", "differences"]

UNKNOWN: Final = "?"  # a dimension that agrees with every size, fixed or dynamic


class HasTensors(Protocol):
    """A record of a graph, or of an engine."""

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """Its inputs, in order."""

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """Its outputs, in order."""


@dataclass(frozen=True)
class Difference:
    """One tensor that differs from what it should be.

    Attributes:
        tensor: kind and name of the tensor, such as ``"input pixel_values"``.
        found: its dtype and shape in the graph, such as ``"float32[batch_size, 3, 336, 336]"``, or ``"none"``.
        expected: the dtype and shape that it should have.
    """

    tensor: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.found}, not {self.expected}"


def differences(
    inputs: Iterable[TensorRecord], outputs: Iterable[TensorRecord], expected: HasTensors, *, exact: bool = False
) -> list[Difference]:
    """Compare the tensors of a graph with those that it should have.

    Names, dtypes, ranks and fixed dimensions must be equal. An input's dimension must be dynamic on both sides or on
    neither; an output's may be fixed on one side only, because runtimes infer more than a file says.

    Args:
        inputs, outputs: tensors of the graph, as a runtime or a builder reports them.
        expected: the tensors that it should have.
        exact: also compare the names of dynamic dimensions, all of an output's dimensions, and the order of tensors.
    """
    return [
        *_compare("input", inputs, expected.inputs, exact=exact),
        *_compare("output", outputs, expected.outputs, exact=exact),
    ]


def check_graph(
    file: Path,
    inputs: Iterable[TensorRecord],
    outputs: Iterable[TensorRecord],
    expected: HasTensors,
    *,
    source: str = "the manifest",
) -> None:
    """Refuse a graph whose tensors differ from those it should have.

    Args:
        file: the graph.
        inputs, outputs: its tensors.
        expected: the tensors that it should have.
        source: where ``expected`` comes from, for the message.

    Raises:
        PackageError: a tensor differs; the message names the first.
    """
    for difference in differences(inputs, outputs, expected):
        raise PackageError(
            f"{file} has {difference.tensor}: {difference.found}",
            expected=f"{difference.expected}, as {source} says",
            fix="export the package again",
        )


def _compare(
    kind: str, found: Iterable[TensorRecord], expected: Iterable[TensorRecord], *, exact: bool
) -> list[Difference]:
    have, wanted = ({tensor.name: tensor for tensor in tensors} for tensors in (found, expected))
    result = [
        Difference(f"{kind} {name}", str(have.get(name, "none")), str(wanted.get(name, "none")))
        for name in sorted(have.keys() | wanted.keys())
        if not (name in have and name in wanted and _agree(have[name], wanted[name], kind, exact=exact))
    ]
    if exact and not result and list(have) != list(wanted):
        result.append(Difference(f"order of {kind}s", ", ".join(have), ", ".join(wanted)))
    return result


def _agree(found: TensorRecord, expected: TensorRecord, kind: str, *, exact: bool) -> bool:
    if found.dtype != expected.dtype or len(found.shape) != len(expected.shape):
        return False
    return all(_same_size(a, b, kind, exact=exact) for a, b in zip(found.shape, expected.shape, strict=True))


def _same_size(found: int | str, expected: int | str, kind: str, *, exact: bool) -> bool:
    if found == expected or UNKNOWN in (found, expected):
        return True
    dynamic = isinstance(found, str) + isinstance(expected, str)
    return not exact and dynamic >= (2 if kind == "input" else 1)
