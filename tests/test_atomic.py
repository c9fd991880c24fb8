"""Failed and killed processes: which of their outputs, and of earlier outputs, remain."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from promprune import files as atomic
from promprune.errors import OutputError
from promprune.files import replace_file, writing_folder

OTHER_HOST = "elsewhere"


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder: Path, kind: str, pid: int, host: str = atomic._HOST, name: str = "out") -> Path:
    """Make a folder as a process leaves it that has not finished."""
    path = folder / f".{name}.{kind}-{host}-{pid}-abc"
    path.mkdir()
    (path / "file").write_text(kind)
    return path


def write(output: Path, content: str = "done", *, replace: bool = False) -> None:
    with writing_folder(output, replace=replace, fix="") as partial:
        (partial / "file").write_text(content)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_dead_process_left_is_removed(tmp_path: Path, ended: int) -> None:
    leave(tmp_path, "partial", ended)
    leave(tmp_path, "gone", ended)
    kept = [leave(tmp_path, "partial", os.getppid()), leave(tmp_path, "partial", ended, name="out2")]
    write(tmp_path / "out")
    assert names_in(tmp_path) == {"out", *(path.name for path in kept)}


@pytest.mark.parametrize("kind", ["partial", "old", "gone"])
def test_what_other_machines_are_writing_is_left_alone(tmp_path: Path, ended: int, kind: str) -> None:
    """On a shared disk: process numbers of other machines mean nothing here."""
    kept = leave(tmp_path, kind, ended, OTHER_HOST)
    write(tmp_path / "out")
    assert names_in(tmp_path) == {"out", kept.name}


@pytest.mark.parametrize("kind", ["partial", "old", "gone"])
def test_what_another_machine_left_a_day_ago_is_removed(tmp_path: Path, ended: int, kind: str) -> None:
    left = leave(tmp_path, kind, ended, OTHER_HOST)
    for path in (left / "file", left):
        os.utime(path, (0, 0))
    write(tmp_path / "out", replace=True)
    assert names_in(tmp_path) == {"out"}


def test_what_replaced_a_file_and_was_killed_a_day_ago_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".report.partial-abc", tmp_path / ".report.partial-def"
    for path in (old, new):
        path.write_text("part")
    os.utime(old, (0, 0))
    replace_file(tmp_path / "report", b"whole")
    assert names_in(tmp_path) == {"report", new.name}


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, "[bold]", "a\udcffb"])
def test_names_of_any_kind_are_written(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "old")
    write(tmp_path / name, "new", replace=True)
    assert (tmp_path / name / "file").read_text() == "new"
    replace_file(tmp_path / name / name, b"whole")
    assert names_in(tmp_path / name) == {"file", name}


def test_the_name_of_the_machine_is_a_part_of_a_file_name() -> None:
    assert "/" not in atomic._HOST
    assert "-" not in atomic._HOST


def test_on_windows_no_process_is_asked(tmp_path: Path, ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, the signal that asks whether a process is alive would interrupt it."""
    kept = [leave(tmp_path, "partial", pid) for pid in (ended, os.getppid())]
    monkeypatch.setattr(atomic, "_CAN_ASK", False)
    monkeypatch.setattr(atomic.os, "kill", lambda pid, signal: pytest.fail("asked"))
    write(tmp_path / "out")
    assert names_in(tmp_path) == {"out", *(path.name for path in kept)}


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path, ended: int) -> None:
    leave(tmp_path, "old", ended)

    def fail() -> None:
        with writing_folder(tmp_path / "out", replace=True, fix=""):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names_in(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_that_was_put_back_is_not_replaced_unasked(tmp_path: Path, ended: int) -> None:
    leave(tmp_path, "old", ended)
    with pytest.raises(OutputError, match="already exists"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_a_folder_that_was_moved_away_and_replaced_is_removed(tmp_path: Path, ended: int) -> None:
    write(tmp_path / "out", "first")
    leave(tmp_path, "old", ended)
    write(tmp_path / "out", "second", replace=True)
    assert names_in(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "second"


def need_exchange(folder: Path) -> None:
    places = (folder / "a", folder / "b")
    for place in places:
        place.mkdir()
    able = atomic._exchange(*places)
    for place in places:
        place.rmdir()
    if not able:
        pytest.skip("folders cannot change places at once here")


def fail_to_rename(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, every: bool = False) -> None:
    """Make the renaming of a new folder fail, once while the old one is moved away, or always."""
    rename = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if ".partial-" in path.name and (every or not Path(target).exists()):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.EIO, "Input/output error"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_while_the_old_folder_is_away_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda partial, output: False, raising=False)
    write(tmp_path / "out", "old")
    fail_to_rename(monkeypatch, error)
    with pytest.raises(expected):
        write(tmp_path / "out", "new", replace=True)
    assert names_in(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_an_old_folder_that_cannot_be_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda partial, output: False)
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if not (tmp_path / "out").exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "out", "new", replace=True)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(".out.old-")
    assert (kept / "file").read_text() == "old"


def test_where_folders_change_places_at_once_the_old_one_is_never_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_exchange(tmp_path)
    write(tmp_path / "out", "old")
    fail_to_rename(monkeypatch, AssertionError("renamed"), every=True)
    write(tmp_path / "out", "new", replace=True)
    assert names_in(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_not_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").mkdir()
    if kind == "file":
        (tmp_path / "out").write_text("old")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "target")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "out", "new", replace=True)
    assert names_in(tmp_path) == {"out", "target"}
    assert (tmp_path / "out").is_symlink() == (kind == "link")


KILLED = """
import os, sys
from pathlib import Path
from promprune import files as atomic
rename = Path.rename

def killed(path, target):
    if ".partial-" in path.name and not Path(target).exists():
        os._exit(9)
    return rename(path, target)

Path.rename = killed
atomic._exchange = lambda partial, output: False
with atomic.writing_folder(Path(sys.argv[1]), replace=True, fix="") as partial:
    (partial / "file").write_text("new")
"""


def test_a_process_that_is_killed_while_the_old_folder_is_away(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="already exists"):
        write(tmp_path / "out")
    assert names_in(tmp_path) == {"out"}
    assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("at_once", [True, False])
def test_many_writers_leave_one_whole_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if at_once:
        need_exchange(tmp_path)
    else:
        monkeypatch.setattr(atomic, "_exchange", lambda partial, output: False)
    output, failures = tmp_path / "out", []

    def replace(number: int) -> None:
        try:
            for _ in range(40):
                write(output, str(number), replace=True)
        except Exception as error:  # for the main thread to see
            failures.append(error)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names_in(tmp_path) == {"out"}
    assert (output / "file").read_text() in set("0123")
