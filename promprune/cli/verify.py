"""``promprune-verify``: compare a package with the model it was made from, again and elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from promprune.cli.common import (
    EXIT_REFUSED,
    checks_table,
    console,
    describe_selection,
    missing_extra,
    option_type,
    print_json,
    run_command,
    version_callback,
)
from promprune.config import DEFAULT_CHECK_IMAGES
from promprune.errors import ConfigError, ModelError
from promprune.package import Manifest, read_manifest

__all__ = ["main", "verify"]

MAX_IMAGES: Final = 10_000


def verify(
    package: Annotated[Path, typer.Argument(help="Folder that promprune-export wrote.", metavar="PACKAGE")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model it was made from.", show_default="as the package says", metavar="MODEL"
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            help="Rendered images to compare on.", parser=option_type(int, "a whole number of images"), metavar="COUNT"
        ),
    ] = DEFAULT_CHECK_IMAGES,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as one line of JSON on stdout.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=version_callback, is_eager=True)
    ] = False,
) -> None:
    """Compare a package with the model it was made from. Exits with 1 if a check fails.

    Examples:

      promprune-verify promprune-embedded-0.12

      promprune-verify llava-0.12 --model ./llava-1.5-7b-hf --images 200
    """
    if not 1 <= images <= MAX_IMAGES:
        raise ConfigError(f"received images = {images}", expected=f"1 to {MAX_IMAGES}")
    manifest = read_manifest(package)
    with missing_extra("export"):
        from promprune.export.checkpoint import EMBEDDED_MODEL, load_checkpoint
        from promprune.export.verify import verify_package
    source = model or manifest.source.model
    with console.status(f"comparing {package} with {source} on {images} images"):
        checkpoint = load_checkpoint(None if source == EMBEDDED_MODEL and model is None else source)
        _check_source(package, manifest, source, checkpoint.source.weights_sha256)
        record = verify_package(package, checkpoint, num_images=images)
    if as_json:
        print_json({"package": str(package), **msgspec.to_builtins(record)})
    else:
        console.print(checks_table(record.checks))
        print(f"{package}: {describe_selection(manifest)}, {'verified' if record.passed else 'FAILED'}")
    if not record.passed:
        raise typer.Exit(EXIT_REFUSED)


def main() -> None:
    """Entry point of ``promprune-verify``."""
    run_command(verify)


def _check_source(package: Path, manifest: Manifest, source: str, weights_sha256: str) -> None:
    if weights_sha256 != manifest.source.weights_sha256:
        raise ModelError(
            f"the weights of {source} are not those that {package} was made from",
            expected=f"weights with the digest {manifest.source.weights_sha256[:12]}...",
            fix="name the right model with --model, or export again",
        )
