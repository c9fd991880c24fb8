"""Check of the structure: do the graphs match the manifest?"""

from __future__ import annotations

from collections.abc import Iterator

from promprune.export.verify.checks import check
from promprune.export.verify.subject import Subject
from promprune.package.agree import differences
from promprune.package.manifest import CheckRecord
from promprune.runtime.sessions.onnxruntime import tensor_record

__all__ = ["check_structure"]


def check_structure(subject: Subject) -> Iterator[CheckRecord]:
    """Compare the names, dtypes and shapes that ONNX Runtime reports for every graph with the manifest."""
    different = []
    for name, record in subject.package.manifest.graphs.items():
        session, path = subject.open(name), subject.package.graph_file(name)
        inputs, outputs = (
            [tensor_record(node, path) for node in nodes] for nodes in (session.get_inputs(), session.get_outputs())
        )
        different += [f"{name}: {difference}" for difference in differences(inputs, outputs, record, exact=True)]
    yield check("names, dtypes and shapes that differ", len(different), "==", 0, "; ".join(different))
