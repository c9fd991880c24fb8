"""Run commands and scripts of the project inside the test's own process, which is much faster than starting one."""

from __future__ import annotations

import io
import runpy
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def error_lines(self) -> list[str]:
        """The lines of stderr that are neither progress nor empty."""
        return [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("done")]


def run(main: Callable[[], None], *arguments: str) -> Outcome:
    """Call an entry point as its command line would be."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with patch("sys.argv", ["command", *arguments]), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
        except SystemExit as stop:
            exit_code = stop.code if isinstance(stop.code, int) else 1
        else:
            raise AssertionError("the command returned without an exit code")
    return Outcome(exit_code, stdout.getvalue(), stderr.getvalue())


def run_script(script: str, *arguments: str) -> Outcome:
    """Run a Python file of the repository as ``python FILE ARGUMENTS...`` would."""

    def main() -> None:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        raise SystemExit(0)

    return run(main, *arguments)
