"""``promprune-calibrate``: mu and tau of a model, from unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from promprune.cli.common import (
    console,
    missing_extra,
    option_type,
    print_json,
    progress_over,
    run_command,
)
from promprune.cli.export import parse_grids
from promprune.cli.options import Version
from promprune.errors import ConfigError

if TYPE_CHECKING:
    from promprune.export.calibration import Calibration

__all__ = ["calibrate", "main"]

DEFAULT_IMAGES: Final = 512
_BINS: Final = 16
_BAR_WIDTH: Final = 40


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder in Hugging Face format, or hub id. Left out: the embedded model.", metavar="MODEL"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images such as those to come; subfolders too.",
            show_default="the embedded model's own calibration scenes",
            metavar="DIR",
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            help="Most images to look at.", parser=option_type(int, "a whole number of images"), metavar="COUNT"
        ),
    ] = DEFAULT_IMAGES,
    image_grid: Annotated[
        str | None,
        typer.Option(
            help="Sizes of images to calibrate for, as promprune-export takes them.",
            show_default="as promprune-export",
            metavar="GRIDS",
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write promprune_config.json into MODEL's folder, for promprune-export.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the histogram, as .png or .svg.", metavar="FILE", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")] = False,
    version: Version = False,
) -> None:
    """Fit mu and tau, the constants of the budget split, to a model's vision tower. No labels are needed.

    mu is the median of the images' spectral entropies, tau half their standard deviation.

    Examples:

      promprune-calibrate ./llava-1.5-7b-hf --images photos --write

      promprune-calibrate llava-hf/llava-1.5-7b-hf --images photos --plot entropy.png
    """
    _check(model, images, limit, write)
    with missing_extra("export"):
        from promprune.export import calibration as calibration_module
        from promprune.export.checkpoint import load_checkpoint
    checkpoint = load_checkpoint(model)
    if images is None:
        side = checkpoint.model.config.vision_config.image_size
        count, pictures = limit, calibration_module.calibration_scenes(limit, side)
    else:
        paths = calibration_module.folder_images(images, limit)
        count, pictures = len(paths), calibration_module.load_images(paths)
    grids = () if image_grid is None else parse_grids(image_grid)
    entropies = calibration_module.image_entropies(checkpoint, pictures, grids)
    found = progress_over(entropies, count, "read the images")
    fitted = calibration_module.calibrate([entropy for row in found for entropy in row])
    written = calibration_module.write_calibration(Path(model), fitted) if write and model is not None else None
    if plot is not None:
        with missing_extra("eval"):
            from promprune.evaluation.plots import plot_entropies
        plot_entropies(fitted, plot)
    if as_json:
        print_json({"mu": fitted.mu, "tau": fitted.tau, "images": count, "entropies": list(fitted.entropies)})
        return
    _print_histogram(fitted)
    print(f"--mu {fitted.mu} --tau {fitted.tau}")
    if written is not None:
        console.print(f"written to {written}; promprune-export uses it", soft_wrap=True)


def main() -> None:
    """Entry point of ``promprune-calibrate``."""
    run_command(calibrate)


def _check(model: str | None, images: Path | None, limit: int, write: bool) -> None:
    if limit < 1:
        raise ConfigError(f"received --limit {limit}", expected="at least 1")
    if images is None and model is not None:
        raise ConfigError("received no images", expected="a folder of images such as those to come", fix="--images DIR")
    if images is not None and not images.is_dir():
        raise ConfigError(f"received --images {images}, which is no folder", expected="a folder of images")
    if write and (model is None or not Path(model).is_dir()):
        raise ConfigError(
            f"received --write for {model or 'the embedded model'}",
            expected="a model in a folder of its own",
            fix="give --mu and --tau to promprune-export instead",
        )


def _print_histogram(fitted: Calibration) -> None:
    """Draw the entropies on stderr, with the share of the budget that goes to saliency at each."""
    low, high = min(fitted.entropies), max(fitted.entropies)
    width = (high - low) / _BINS or 1.0
    shares: list[list[float]] = [[] for _ in range(_BINS)]
    for entropy, share in zip(fitted.entropies, fitted.saliency_shares(), strict=True):
        shares[min(int((entropy - low) / width), _BINS - 1)].append(share)
    most = max(map(len, shares))
    console.print(f"{'entropy':>8}  {'':<{_BAR_WIDTH}} {'images':>7}  share of the budget for saliency")
    for index, found in enumerate(shares):
        bar = "█" * round(_BAR_WIDTH * len(found) / most) or ("▏" if found else "")
        mean = f"{sum(found) / len(found):>6.0%}" if found else ""
        console.print(f"{low + (index + 0.5) * width:8.4f}  {bar:<{_BAR_WIDTH}} {len(found):>7}  {mean}")
    overall = sum(fitted.saliency_shares()) / len(fitted.entropies)
    console.print(f"{len(fitted.entropies)} entropies; on average {overall:.0%} of the budget goes to saliency")
