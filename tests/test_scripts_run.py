"""``scripts/run`` makes the environment once, runs commands in it, and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fresh_clone(tmp_path: Path) -> Path:
    """A checkout, in a folder with a space in its name, in which nothing was installed."""
    clone = tmp_path / "fresh clone"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/run", clone / "scripts/run")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone / name)
    return clone


def fake_python(folder: Path, body: str) -> Path:
    python = folder / "fake-python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def test_no_command_is_one_line() -> None:
    result = run(ROOT / "scripts/run", cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith("scripts/run: received no command; expected one to run")


def test_an_old_python_is_named(fresh_clone: Path) -> None:
    old = fake_python(fresh_clone, 'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac')
    result = run(fresh_clone / "scripts/run", "true", cwd=fresh_clone, PROMPRUNE_PYTHON=str(old))
    assert result.returncode == 1
    assert "found Python 3.8.1; expected Python 3.11 or newer" in result.stderr
    assert not (fresh_clone / ".venv").exists()


def test_a_python_without_venv_is_named(fresh_clone: Path) -> None:
    bare = fake_python(fresh_clone, 'case "$1" in -c) exit 0;; *) exit 1;; esac')
    result = run(fresh_clone / "scripts/run", "true", cwd=fresh_clone, PROMPRUNE_PYTHON="./fake-python")
    assert result.returncode == 1
    assert "install Python's venv package" in result.stderr
    assert bare.exists()


def test_an_environment_that_is_up_to_date_is_used_as_it_is(fresh_clone: Path, tmp_path: Path) -> None:
    """Stands in for the second call in a clone: the marker is right, so nothing is installed."""
    binaries = fresh_clone / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(fake_python(fresh_clone, "echo installed; exit 1"))
    (binaries / "hello").write_text('#!/bin/sh\necho "hello $1 from $VIRTUAL_ENV in $(pwd)"\n')
    (binaries / "hello").chmod(0o755)
    wanted = "cat constraints.txt pyproject.toml | cksum; pwd -P"
    marker = subprocess.run(["sh", "-c", wanted], cwd=fresh_clone, capture_output=True, text=True, check=True)
    (fresh_clone / ".venv/.made-from").write_text(marker.stdout)
    result = run(fresh_clone / "scripts/run", "hello", "a b", cwd=tmp_path)
    assert result.stdout == f"hello a b from {fresh_clone}/.venv in {tmp_path}\n"

    (fresh_clone / "constraints.txt").write_text("numpy==0\n")  # now it has to be made again, and the fake pip fails
    result = run(fresh_clone / "scripts/run", "hello", cwd=tmp_path, PROMPRUNE_PYTHON="no-such-python")
    assert result.returncode == 1
    assert "expected Python 3.11 or newer" in result.stderr
