"""Which skips are right in continuous integration, where everything that can be installed is installed."""

from __future__ import annotations

import os
import re
from typing import Final

import pytest

ACCEPTED_IN_CI: Final = (
    r"takes minutes: pytest -m slow",
    r"no CUDA",
    r"no usable GPU",
    r"there is a GPU here",
    r"there is a driver here",
    r"needs an ONNX Runtime built for CUDA on a machine that cannot load it",
    r"folders cannot change places at once here",
    r"needs lmms-eval",  # .ci/run says why it is not installed
)


def fail_wrong_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure if ``CI`` is set and its reason is not one of :data:`ACCEPTED_IN_CI`."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not any(re.search(accepted, reason) for accepted in ACCEPTED_IN_CI):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, for a reason that tests/support/skips.py does not list: {reason}"
