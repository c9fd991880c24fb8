"""The benchmark script runs, and its last line is JSON that says what its table says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.command_line import run_script
from tests.support.feature_sets import to_tf32

SCRIPT = "scripts/benchmarks/bench_selector.py"


def report_of(*arguments: str) -> dict[str, dict[str, float]]:
    outcome = run_script(SCRIPT, *arguments)
    assert outcome.exit_code == 0
    report: dict[str, dict[str, float]] = json.loads(outcome.stdout.splitlines()[-1])
    return report


def test_agreement() -> None:
    sizes = ["--sets", "5", "--num-tokens", "200", "--hidden-size", "64", "--threads", "1"]
    report = report_of("agreement", *sizes, "--dtypes", "float32", "float16", "--tf32")
    rows = [figures for name, figures in report.items() if ", T = " in name]
    assert len(rows) == 16
    assert all(0 <= row["identical_percent"] <= 100 for row in rows)
    assert all(report[f"graph, float32, T = {t}"]["sets_with_duplicates"] == 0 for t in (64, 69, 128, 192))


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_speed(clock: str) -> None:
    sizes = ["--num-tokens", "64", "--hidden-size", "32", "--keep-tokens", "9"]
    report = report_of("speed", *sizes, "--threads", "1", "--rounds", "1", "--repeats", "2", "--clock", clock)
    for size in (1, 5):
        loop, eager = (report[f"{name}, B = {size}"] for name in ("graph, loop", "authors, eager PyTorch"))
        assert loop["ratio"] == pytest.approx(loop["best_ms"] / eager["best_ms"])
        assert eager["ratio"] == 1


def test_tf32_keeps_ten_bits() -> None:
    x = np.array([1.0, 1 + 2**-10, 1 + 2**-12, -3.0, 1 + 3 * 2**-11], np.float32)
    assert to_tf32(x).tolist() == [1.0, 1 + 2**-10, 1.0, -3.0, 1 + 2**-9]
