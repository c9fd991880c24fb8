"""ONNX Runtime's telemetry is off: it would leave an identifier in the home folder, and send events."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.fake_package import write_fake_package

RUN = """
import sys
from promprune.runtime import VisionLanguagePipeline

with VisionLanguagePipeline.from_package(sys.argv[1], provider="cpu") as pipeline:
    pipeline.generate((), "a", max_new_tokens=2)
"""


def test_running_a_package_leaves_nothing_behind(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "package")
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    command = [sys.executable, "-c", RUN, str(tmp_path / "package")]
    subprocess.run(command, env={**kept, "HOME": str(home)}, check=True)
    assert list(home.rglob("*")) == []
