"""In continuous integration a test is skipped only for a reason that is true there."""

from __future__ import annotations

import pytest

from tests.support.skips import fail_wrong_skip


def skipped(reason: str) -> pytest.TestReport:
    location = ("tests/test_x.py", 1, "test_x")
    return pytest.TestReport("x", location, {}, "skipped", ("tests/test_x.py", 1, f"Skipped: {reason}"), "call")


@pytest.mark.parametrize(
    ("reason", "ci", "outcome"),
    [
        ("needs Node.js, and npm ci in scripts/transformers_js", "true", "failed"),
        ("needs Node.js, and npm ci in scripts/transformers_js", "", "skipped"),
        ("Polygraphy is not installed", "true", "failed"),
        ("takes minutes: pytest -m slow", "true", "skipped"),
        ("no CUDA here: no NVIDIA driver", "true", "skipped"),
    ],
)
def test_a_skip_needs_a_reason_that_is_true_of_ci(
    reason: str, ci: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    report = skipped(reason)
    fail_wrong_skip(report)
    assert report.outcome == outcome
    assert outcome == "skipped" or reason in str(report.longrepr)
