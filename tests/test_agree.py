"""The one comparison of a graph's tensors with those that it should have."""

from __future__ import annotations

from pathlib import Path

import pytest

from promprune.errors import PackageError
from promprune.package.agree import UNKNOWN, check_graph, differences
from promprune.package.manifest import GraphRecord, TensorRecord

Dims = tuple[int | str, ...]


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorRecord:
    return TensorRecord(name=name, dtype=dtype, shape=shape)


def graph(inputs: list[TensorRecord], outputs: list[TensorRecord]) -> GraphRecord:
    return GraphRecord(file="onnx/g.onnx", inputs=tuple(inputs), outputs=tuple(outputs))


RECORD = graph([tensor("x", "batch", 3), tensor("n", 1, dtype="int64")], [tensor("y", "batch", 5)])


@pytest.mark.parametrize(
    ("found", "expected", "as_input", "as_output", "exactly"),
    [
        (("batch", 3), ("batch", 3), True, True, True),
        (("rows", 3), ("batch", 3), True, True, False),
        ((2, 3), ("batch", 3), False, True, False),
        (("batch", 3), (2, 3), False, True, False),
        ((UNKNOWN, 3), ("batch", 3), True, True, True),
        ((UNKNOWN, 3), (2, 3), True, True, True),
        ((2, 3), (4, 3), False, False, False),
        ((2,), (2, 1), False, False, False),
    ],
)
def test_what_agrees(found: Dims, expected: Dims, as_input: bool, as_output: bool, exactly: bool) -> None:
    one, other = tensor("t", *found), tensor("t", *expected)
    assert (not differences([one], [], graph([other], []))) is as_input
    assert (not differences([], [one], graph([], [other]))) is as_output
    assert (not differences([], [one], graph([], [other]), exact=True)) is exactly


def test_differences_are_named_with_both_sides() -> None:
    outputs = [tensor("y", "batch", 5, dtype="float16"), tensor("z", 1)]
    assert [str(difference) for difference in differences([tensor("x", "batch", 3)], outputs, RECORD)] == [
        "input n: none, not int64[1]",
        "output y: float16[batch, 5], not float32[batch, 5]",
        "output z: float32[1], not none",
    ]


def test_the_order_matters_only_where_it_is_asked_for() -> None:
    inputs = RECORD.inputs[::-1]
    assert differences(inputs, RECORD.outputs, RECORD) == []
    (difference,) = differences(inputs, RECORD.outputs, RECORD, exact=True)
    assert str(difference) == "order of inputs: n, x, not x, n"


def test_a_graph_is_refused_with_its_file() -> None:
    check_graph(Path("g.onnx"), RECORD.inputs, RECORD.outputs, RECORD)
    message = (
        r"^g.onnx has output y: none; expected float32\[batch, 5\], as the manifest says; export the package again"
    )
    with pytest.raises(PackageError, match=message):
        check_graph(Path("g.onnx"), RECORD.inputs, (), RECORD)
