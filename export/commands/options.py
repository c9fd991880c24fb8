"""Options that several commands of the export share."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

import typer

from promprune.errors import ConfigError

__all__ = ["Model", "parse_grids"]

Model: TypeAlias = Annotated[
    str | None,
    typer.Argument(help="Folder in Hugging Face format, or hub id. Default: the embedded model.", metavar="MODEL"),
]


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """Parse a list of grids such as ``24x24,18x32`` into pairs of rows and columns.

    Raises:
        ConfigError: it is not such a list.
    """
    matches = [re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,4})\s*", part) for part in text.split(",")]
    grids = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if len(grids) != len(matches):
        raise ConfigError(
            f"received --image-grid {text!r}", expected="rows x columns of visual tokens, such as 24x24 or 24x24,18x32"
        )
    return grids
