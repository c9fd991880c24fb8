"""The page of all commands is what the commands themselves say."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from tests.support.command_line import ROOT, run_script


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the script writes, run from a copy, so that the page of the repository stays."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("scripts", "docs"):
        (root / folder).mkdir()
    script = shutil.copy(ROOT / "scripts/write_command_reference.py", root / "scripts")
    assert run_script(script).exit_code == 0
    return (root / "docs/commands.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date(page: str) -> None:
    committed = Path(ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert committed == page, "run python scripts/write_command_reference.py"


def test_every_command_is_on_the_page(page: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {f"## {name}" for name in project["project"]["scripts"]} <= set(page.splitlines())
