"""Commands under closed streams, odd locales, widths and names: an answer, or one line and a documented exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_package import write_fake_package

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="streams are closed with a shell of Unix")

Done = subprocess.CompletedProcess[bytes]
RUN = "promprune.runtime.commands.run"


def slow(value: object) -> object:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "[/b] package"
    write_fake_package(folder)
    return folder


def run(arguments: list[str], *, closed: str = "", stdin: bytes = b"", **environment: str) -> Done:
    command = [sys.executable, "-m", *arguments]
    if closed:
        command = ["sh", "-c", f'"$@" {closed}', "sh", *command]
    done = subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environment}, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2)
    return done


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", slow("2>&-"), slow("0<&- 1>&- 2>&-")])
@pytest.mark.parametrize("kind", ["version", "stdin", slow("prompt"), slow("interactive")])
def test_closed_streams(package: Path, kind: str, closed: str) -> None:
    options = {"prompt": ["-p", "hi"], "stdin": ["-p", "-"], "interactive": ["--interactive"]}
    arguments = ["--version"] if kind == "version" else [str(package), "--max-new-tokens", "2", *options[kind]]
    done = run([RUN, *arguments], closed=closed, stdin=b"hello\n")
    if kind == "stdin" and closed == "0<&-":
        assert done.returncode == 1
        assert done.stderr.decode().splitlines()[-1] == "error: stdin is closed; expected an open stdin"
    if kind in ("version", "prompt") and closed == "1>&-":
        assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (1, "error: stdout: is closed")
    if closed == "2>&-":
        assert done.returncode == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        slow({"LC_ALL": "C"}),
        slow({"PYTHONIOENCODING": "ascii"}),
        slow({"COLUMNS": "1"}),
        slow({"TERM": "", "COLUMNS": "x"}),
    ],
)
@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_prompt_with_accents_in_any_locale(package: Path, environment: dict[str, str], from_stdin: bool) -> None:
    prompt = "\u00e9\u00fc \u4f60"
    asked = "-" if from_stdin else prompt
    arguments = [RUN, str(package), "-p", asked, "--max-new-tokens", "3", "--json"]
    plain, odd = (json.loads(run(arguments, stdin=prompt.encode(), **given).stdout) for given in ({}, environment))
    assert plain["text"] == odd["text"]
    assert plain["token_ids"] == odd["token_ids"]


def test_no_column_is_no_width(package: Path) -> None:
    done = run([RUN, str(package), "-p", "hi", "--max-new-tokens", "2", "--stats"], COLUMNS="0")
    assert b"first token" in done.stderr


@pytest.mark.parametrize("name", [b"[/b]", slow(b"a\xffb"), slow(b"x" * 250), slow(b"\x1b[31m"), slow(b"\n")])
def test_names_in_messages(tmp_path: Path, name: bytes) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/" + name)
    Path(path).mkdir(parents=True)
    done = run([RUN, path, "-p", "hi"])
    assert done.returncode == 1
    assert b"is not an exported package" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert b"\x1b[31m" not in done.stderr
    (Path(path) / "a.png").write_bytes(b"no picture")
    write_fake_package(tmp_path / "package")
    done = run([RUN, str(tmp_path / "package"), "-p", "hi", "-i", f"{path}/a.png"])
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_a_long_prompt_on_stdin_is_refused(package: Path) -> None:
    done = run([RUN, str(package), "-p", "-"], stdin=b"x" * 9_000_000)
    assert done.returncode == 1
    assert b"a very long text on stdin" in done.stderr
