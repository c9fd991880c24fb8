"""Write docs/commands.md: what every command takes, from the commands themselves.

    python scripts/write_command_reference.py

A test holds the page against the commands.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Final

import click
import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

# Name on the command line -> module of promprune, and its function.
COMMANDS: Final = {
    "promprune-export": ("export.commands.export", "export"),
    "promprune-run": ("runtime.commands.run", "run"),
    "promprune-build": ("export.commands.build", "build"),
    "promprune-verify": ("export.commands.verify", "verify"),
    "promprune-calibrate": ("export.commands.calibrate", "calibrate"),
    "promprune-eval": ("export.commands.eval", "evaluate"),
    "promprune-bench": ("runtime.commands.bench", "bench"),
    "promprune-bench compare": ("runtime.commands.bench", "compare"),
}
PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD: Final = """# Commands

Written by `python scripts/write_command_reference.py` from the commands themselves. All of them exit with 0 when done,
1 when something was refused or failed or a check was not passed, 2 on wrong usage, and 130 when interrupted. Results go
to stdout, progress and errors to stderr; an error is one line that says what was received, what was expected and what
to do.
"""


def reference_of(name: str) -> str:
    """Describe one command in Markdown."""
    module, function = COMMANDS[name]
    app = typer.Typer(add_completion=False)
    app.command()(getattr(importlib.import_module(f"promprune.{module}"), function))
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=click.Context(command, info_name=name), name=name)
    text = re.sub(r"^# `(.*)`$", r"## \1", text, flags=re.MULTILINE)
    text = re.sub(r"\n\* `--(version|help)`: .*", "", text)
    text = re.sub(r"^(\* `[\[A-Z][^`<]*) <\w+(\[\w+\])?>", r"\1", text, flags=re.MULTILINE)  # arguments say it by name
    text = text.replace(" <str>", " NAME").replace(" <path>", " FILE")
    text = re.sub(r"^  (promprune-.*)$", r"    \1", text, flags=re.MULTILINE)  # a code block
    return re.sub(r"(\n    .*)\n(?=\n    )", r"\1", text).strip() + "\n"


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *map(reference_of, COMMANDS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
