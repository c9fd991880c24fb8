"""Progress as the operations report it, and as the terminal shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from promprune.export import ExportConfig, export_package
from promprune.progress import NO_PROGRESS, Progress
from promprune.terminal import show_progress
from tests.support.progress import RecordedProgress


def test_an_export_announces_the_steps_that_it_runs(tiny_llava: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    config = ExportConfig(model=str(tiny_llava), output=tmp_path / "out", vision_only=True, split_selector=True)
    export_package(config, progress=progress)
    assert progress.steps == [
        "read the checkpoint",
        "export vision_encoder",
        "export token_selector",
        "write tokenizer and configuration",
        "verify against the model",
    ]
    assert progress.announced == progress.finished == 5


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
