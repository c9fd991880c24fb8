"""Finding models and images without importing PyTorch, so that a wrong name is refused at once."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Final

from promprune.errors import ImageError, ModelError

__all__ = [
    "EMBEDDED_MODEL",
    "EXPECTED_MODEL",
    "embedded_model_folder",
    "folder_images",
    "local_folder",
    "source_of_package",
]

EMBEDDED_MODEL: Final = "embedded"
EXPECTED_MODEL: Final = "a folder in Hugging Face format, a hub id such as llava-hf/llava-1.5-7b-hf, or nothing"

_HUB_ID: Final = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SUFFIXES: Final = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})


def embedded_model_folder() -> Path:
    """Return the folder of the model that ships with promprune."""
    return Path(str(importlib.resources.files("promprune.embedded") / "model"))


def local_folder(name: str | None) -> Path | None:
    """Return the folder of a checkpoint, or None if its name can only be a hub id.

    Args:
        name: folder or hub id; None for the embedded model.

    Raises:
        ModelError: it is neither, or a folder that contains no model.
    """
    if name is None:
        return embedded_model_folder()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is a LoRA adapter (adapter_config.json), not a model",
                expected=EXPECTED_MODEL,
                fix="merge it into its base model with merge_and_unload of peft, and save the model",
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json", expected=EXPECTED_MODEL)
        return folder
    if folder.exists():
        raise ModelError(f"received {name!r}, which is a file", expected=EXPECTED_MODEL)
    if not _HUB_ID.match(name):
        raise ModelError(f"received {name!r}: there is no such folder", expected=EXPECTED_MODEL)
    return None


def source_of_package(package: Path, name: str) -> str | None:
    """Find the model that a package was exported from by its name in the manifest.

    Args:
        package: the package folder.
        name: name of the source in the manifest: a hub id, or the last part of a folder's path.

    Returns:
        A folder or hub id; None for the embedded model.

    Raises:
        ModelError: it is not a hub id, and there is no such folder here.
    """
    if name == EMBEDDED_MODEL:
        return None
    try:
        local_folder(name)
    except ModelError as error:
        raise ModelError(
            f"{package} was made from {name!r}, and there is no model in a folder of that name here",
            expected="the model that it was made from",
            fix="pass it with --model",
        ) from error
    return name


def folder_images(folder: Path, limit: int) -> list[Path]:
    """Return at most ``limit`` image files in a folder, evenly spaced in the sorted list of all.

    Raises:
        ImageError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise ImageError(
            f"there is no image in {folder}", expected="a folder of photographs like those the model is for"
        )
    return [found[i * len(found) // limit] for i in range(limit)] if len(found) > limit else found
