"""What processes that were killed leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from promprune import atomic
from promprune.atomic import writing_folder


@pytest.fixture
def leftovers(tmp_path: Path) -> tuple[Path, Path]:
    """Folders that a process that has ended, and one that runs, have not finished."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folders = tuple(tmp_path / f".out.partial-{pid}-abc" for pid in (ended.pid, os.getppid()))
    for folder in folders:
        folder.mkdir()
    return folders[0], folders[1]


def write(output: Path) -> None:
    with writing_folder(output, replace=False, fix="") as partial:
        (partial / "file").write_text("done")


def test_what_a_dead_process_left_is_removed(tmp_path: Path, leftovers: tuple[Path, Path]) -> None:
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", leftovers[1].name}


def test_on_windows_no_process_is_asked(
    tmp_path: Path, leftovers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the signal that asks would interrupt it."""
    monkeypatch.setattr(atomic, "_CAN_ASK", False)
    monkeypatch.setattr(atomic.os, "kill", lambda pid, signal: pytest.fail("asked"))
    write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(folder.name for folder in leftovers)}
