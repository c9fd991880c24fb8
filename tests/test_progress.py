"""Progress as the terminal shows it."""

from __future__ import annotations

import pytest

from promprune.progress import NO_PROGRESS, Progress
from promprune.terminal import show_progress


def use(progress: Progress) -> None:
    progress.announce(2)
    with progress.step("count [items]", items=2) as step:
        step.advance()
        step.advance()
    with progress.step("build") as step:
        step.report(0.5, "[phase]")


def test_a_line_with_its_time_is_printed_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        use(progress)
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.err.splitlines() if line.startswith("done")]
    assert [line[1:-2] for line in lines] == [["count", "[items]"], ["build"]]
    assert all(line[-1] == "s" for line in lines)
    assert printed.out == ""


def test_a_failed_step_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), show_progress() as progress, progress.step("fail"):
        raise KeyError
    assert "done" not in capsys.readouterr().err


def test_silent_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    use(NO_PROGRESS)
    assert capsys.readouterr() == ("", "")
