"""Manifests of schema version 1, which are no longer supported: how to export such a package again."""

from __future__ import annotations

import shlex
from typing import Final

import msgspec

from promprune.method.config import DEFAULT_LOOP, SelectionConfig
from promprune.package.sources import EMBEDDED_MODEL

__all__ = ["export_command"]

_DEFAULTS: Final = {
    "dtype": "fp32",
    "order": SelectionConfig.order,
    "policy": SelectionConfig.policy,
    "loop": DEFAULT_LOOP,
}


class _Source(msgspec.Struct):
    model: str


class _Selection(msgspec.Struct):
    keep_tokens: int
    requested_ratio: float | None
    mu: float
    tau: float
    parameters_from: str
    order: str
    policy: str = SelectionConfig.policy
    loop: str = DEFAULT_LOOP


class _Grid(msgspec.Struct):
    rows: int
    columns: int


class _Layout(msgspec.Struct):
    grids: tuple[_Grid, ...] = ()


class _Image(msgspec.Struct):
    layout: _Layout


class _Manifest(msgspec.Struct):
    source: _Source
    dtype: str
    selection: _Selection
    image: _Image


def export_command(content: bytes) -> str:
    """Return the ``promprune-export`` command that exports the package of a schema 1 manifest again.

    Args:
        content: the manifest; if it is incomplete, the command is returned without options.
    """
    try:
        manifest = msgspec.json.decode(content, type=_Manifest)
    except msgspec.DecodeError:
        return "promprune-export"
    selection = manifest.selection
    words = ["promprune-export"]
    if manifest.source.model != EMBEDDED_MODEL:
        words.append(manifest.source.model)
    if selection.requested_ratio is None:
        words += ["--keep-tokens", str(selection.keep_tokens)]
    else:
        words += ["--ratio", f"{selection.requested_ratio:g}"]
    chosen = {"dtype": manifest.dtype, "order": selection.order, "policy": selection.policy, "loop": selection.loop}
    if selection.parameters_from == "command line":
        chosen |= {"mu": f"{selection.mu:g}", "tau": f"{selection.tau:g}"}
    if manifest.image.layout.grids:
        chosen["image-grid"] = ",".join(f"{grid.rows}x{grid.columns}" for grid in manifest.image.layout.grids)
    for name, value in chosen.items():
        if value != _DEFAULTS.get(name):
            words += [f"--{name}", value]
    return shlex.join(words)
