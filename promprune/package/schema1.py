"""Manifests of schema version 1, which are no longer supported: how to export such a package again."""

from __future__ import annotations

import shlex
from typing import Any, Final

import msgspec

from promprune.method.config import DEFAULT_LOOP, SelectionConfig
from promprune.package.sources import EMBEDDED_MODEL

__all__ = ["export_command"]

_COMMAND: Final = "promprune-export"
_DEFAULTS: Final = {
    "dtype": "fp32",
    "order": SelectionConfig.order,
    "policy": SelectionConfig.policy,
    "loop": DEFAULT_LOOP,
}


def export_command(content: bytes) -> str:
    """Return the ``promprune-export`` command that makes the package of a schema 1 manifest again.

    Args:
        content: the manifest; if it is incomplete, the command has no options.
    """
    try:
        return shlex.join(_words(msgspec.json.decode(content)))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return _COMMAND


def _words(manifest: dict[str, Any]) -> list[str]:
    model, selection = manifest["source"]["model"], manifest["selection"]
    words = [_COMMAND] if model == EMBEDDED_MODEL else [_COMMAND, model]
    if selection["requested_ratio"] is None:
        words += ["--keep-tokens", f"{selection['keep_tokens']:d}"]
    else:
        words += ["--ratio", f"{selection['requested_ratio']:g}"]
    values = {**selection, "dtype": manifest["dtype"]}
    for name, default in _DEFAULTS.items():
        if values.get(name, default) != default:
            words += [f"--{name}", values[name]]
    if selection["parameters_from"] == "command line":
        words += ["--mu", f"{selection['mu']:g}", "--tau", f"{selection['tau']:g}"]
    if grids := manifest["image"]["layout"].get("grids"):
        words += ["--image-grid", ",".join(f"{grid['rows']:d}x{grid['columns']:d}" for grid in grids)]
    return words
