"""The base class of all records in a package's JSON files."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Count", "Digest", "Fraction", "Record", "Size"]

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of a manifest's parts: immutable, and unknown keys are an error."""
