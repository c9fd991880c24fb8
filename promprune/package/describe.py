"""A package in words."""

from __future__ import annotations

from promprune.package.image import GridLayout
from promprune.package.manifest import Manifest

__all__ = ["describe_selection"]


def describe_selection(manifest: Manifest) -> str:
    """Say in words what is kept and what is removed."""
    record = manifest.selection
    where = "of each crop " if manifest.image.layout.max_crops > 1 else ""
    if record.keep_tokens == record.num_tokens:
        return f"keeps all {record.num_tokens} visual tokens {where}(the unpruned baseline)"
    kept = (
        f"keeps {record.keep_tokens} of {record.num_tokens} visual tokens {where}"
        f"({record.ratio:.1%}), removes {record.ratio_removed:.1%}"
    )
    layout = manifest.image.layout
    if not isinstance(layout, GridLayout) or len(layout.grids) == 1:
        return kept
    first, *others = (f"{grid.rows}x{grid.columns}" for grid in layout.grids)
    return f"{kept}, in images of {first} tokens; also takes images of {', '.join(others)}"
