"""The recipes for running the server: the Containerfile and the systemd unit fit the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from promprune.runtime.commands.serve import main
from promprune.runtime.server.config import ServerConfig
from tests.support.command_line import ROOT, run

CONTAINERFILE = ROOT / "Containerfile"
UNIT = ROOT / "scripts" / "promprune-serve.service"


def instructions(name: str) -> list[str]:
    """Return the arguments of an instruction of the Containerfile, for each of its uses in the last stage."""
    text = CONTAINERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    stage = text[text.rindex("\nFROM ") :]
    return re.findall(rf"^{name} (.*)$", stage, re.MULTILINE)


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_containerfile_passes_the_linter() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint runs on Linux on x86-64 only")
    found = subprocess.run(["hadolint", str(CONTAINERFILE)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_container_does_not_run_as_root() -> None:
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)


def test_the_recipes_use_options_that_exist() -> None:
    help_text = run(main, "--help").stdout
    (entrypoint,), (start,) = instructions("ENTRYPOINT"), settings("ExecStart")
    for words in (json.loads(entrypoint), start.split()):
        assert Path(words[0]).name == "promprune-serve"
        options = [word for word in words if word.startswith("--")]
        assert options
        for option in options:
            assert option in help_text


def test_the_health_check_asks_the_port_of_the_server() -> None:
    (entrypoint,), (port,), (check,) = (instructions(name) for name in ("ENTRYPOINT", "EXPOSE", "HEALTHCHECK"))
    words = json.loads(entrypoint)
    assert words[words.index("--port") + 1] == port
    assert f"http://127.0.0.1:{port}/healthz" in check


def test_a_stop_waits_for_the_accepted_requests() -> None:
    assert float(settings("TimeoutStopSec")[0]) > ServerConfig.drain_timeout_s > ServerConfig.request_timeout_s
