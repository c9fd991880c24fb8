"""The source tree in CONTRIBUTING.md lists the modules that there are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.support.command_line import ROOT, run_script


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "CONTRIBUTING.md", tmp_path)
    for name in ("promprune", "runtime", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.safetensors"))
    script = shutil.copy(ROOT / "scripts/write_source_tree.py", tmp_path / "scripts")
    assert run_script(script).exit_code == 0
    written = (tmp_path / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert written == (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "run scripts/write_source_tree.py"


def test_every_module_says_what_it_is_for() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = re.findall(r"^  (\w+\.py) *(.*)$", tree, flags=re.MULTILINE)
    assert len(modules) > 100
    assert [name for name, about in modules if not about] == []
