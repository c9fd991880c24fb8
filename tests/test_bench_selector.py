"""The benchmark script runs, and its last line is JSON that says what its table says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch

from scripts.bench_selector import device_contenders, device_us, main, to_tf32


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    report: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "agreement",
            "--sets",
            "5",
            "--dtypes",
            "float32",
            "float16",
            "--num-tokens",
            "200",
            "--hidden-size",
            "64",
            "--threads",
            "1",
            "--tf32",
        ]
    )
    report = last_line(capsys)
    rows = [figures for name, figures in report.items() if ", T = " in name]
    assert len(rows) == 16
    assert all(0 <= row["identical_percent"] <= 100 for row in rows)
    assert all(report[f"graph, float32, T = {t}"]["sets_with_duplicates"] == 0 for t in (64, 69, 128, 192))


@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_speed(clock: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-tokens", "64", "--hidden-size", "32", "--keep-tokens", "9"]
    main(["speed", *sizes, "--threads", "1", "--rounds", "1", "--repeats", "2", "--clock", clock])
    report = last_line(capsys)
    for size in (1, 5):
        loop, eager = (report[f"{name}, B = {size}"] for name in ("graph, loop", "authors, eager PyTorch"))
        assert loop["ratio"] == pytest.approx(loop["best_ms"] / eager["best_ms"])
        assert eager["ratio"] == 1


def test_tf32_keeps_ten_bits() -> None:
    x = np.array([1.0, 1 + 2**-10, 1 + 2**-12, -3.0, 1 + 3 * 2**-11], np.float32)
    assert to_tf32(x).tolist() == [1.0, 1 + 2**-10, 1.0, -3.0, 1 + 2**-9]


def test_contenders_of_a_device_do_the_same_work() -> None:
    """On the CPU, where the kernel's place is taken by the loop."""
    contenders = device_contenders(2, 64, 96, 9, "cpu")
    ours, picks, loop = (contenders[name]() for name in list(contenders)[1:])
    theirs = contenders["authors, eager PyTorch"]()
    assert ours.saliency_count.tolist() == list(theirs.counts)
    assert [len(set(row)) for row in picks.tolist()] == [9, 9]
    assert torch.equal(picks, loop)


class FakeDevice:
    """A stream whose clock only moves in `run`: 7 ms for each of the first three runs, then 1, 2, 3... ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronised = False
        self.durations: Iterator[float] = iter([7.0] * 3)
        self.timed = count(1)

    def run(self) -> None:
        self.now += next(self.durations, None) or next(self.timed)

    def synchronize(self) -> None:
        self.synchronised = True


def test_device_times_are_medians_of_the_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device.now

        def elapsed_time(self, end: Event) -> float:
            assert device.synchronised
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    assert device_us(device.run, repeats=5, warm_up=3) == 3000


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_device_table_needs_a_device() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["cuda"])
