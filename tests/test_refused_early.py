"""Errors that can be found without PyTorch are reported before it is started; every command also starts as a module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Calls a command once for every line of arguments, and prints the last message of each, and whether PyTorch came.
_CODE = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(sys.argv[1]).main
found = []
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["command", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main()
        except SystemExit as stop:
            found.append([stop.code, errors.getvalue().strip(), "torch" in sys.modules])
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        (
            "export",
            [
                (["-o", "folder"], "folder already exists"),
                (["a-file"], "which is a file"),
                (["folder"], "has no config.json"),
                (["./nowhere"], "there is no such folder"),
                (["--tau", "0"], "received tau = 0"),
                (["--mu", "nan"], "received mu = nan"),
                (["--order", "foo"], "received order = 'foo'"),
                (["--policy", "none"], "received policy = 'none'"),
            ],
        ),
        (
            "eval",
            [
                (["./nowhere"], "there is no such folder"),
                (["--data", "nowhere"], "'embedded', or a folder"),
                (["--policies", "best"], "received policy = 'best'"),
                (["--ratios", "2"], "received ratio = 2"),
                (["-o", "a-file"], "is not a folder"),
                (["--gallery", "nowhere/page.html"], "but nowhere is not a folder"),
                (["--limit", "0"], "received limit = 0"),
            ],
        ),
        (
            "calibrate",
            [
                (["./nowhere", "--images", "folder"], "there is no such folder"),
                (["--images", "folder"], "there is no image"),
                (["--limit", "7"], "received limit = 7"),
                (["--plot", "p.xyz"], "received --plot p.xyz"),
                (["--image-grid", "24"], "received --image-grid"),
            ],
        ),
        ("verify", [(["folder"], "is not an exported package"), (["folder", "--images", "0"], "received images = 0")]),
    ],
)
def test_mistakes_do_not_wait_for_pytorch(command: str, refused: list[tuple[list[str], str]], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a-file").touch()
    arguments = json.dumps([argv for argv, _ in refused])
    called = [sys.executable, "-c", _CODE, f"promprune.export.commands.{command}", arguments]
    outcome = subprocess.run(called, capture_output=True, text=True, check=True, cwd=tmp_path)
    for (argv, wanted), (exit_code, message, with_torch) in zip(refused, json.loads(outcome.stdout), strict=True):
        assert exit_code == 1, argv
        assert wanted in " ".join(message.split()), argv
        assert not with_torch, argv


@pytest.mark.parametrize("command", ["build", "calibrate", "eval", "export", "verify"])
def test_a_command_starts_as_a_module(command: str) -> None:
    called = [sys.executable, "-m", f"promprune.export.commands.{command}", "--version"]
    outcome = subprocess.run(called, capture_output=True, text=True, check=True)
    assert outcome.stdout.startswith("promprune ")
