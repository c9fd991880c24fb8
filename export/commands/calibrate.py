"""``promprune-calibrate``: mu and tau of a model, from unlabelled images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from promprune.export.commands.options import Model, parse_grids
from promprune.export.config import CalibrateConfig, check_calibration_images
from promprune.package.sources import folder_images, local_folder
from promprune.runtime.commands.options import Version, integer_option, json_option
from promprune.terminal import console, missing_extra, plain, print_json, run_command, show_progress

if TYPE_CHECKING:
    from promprune.export.evaluation.calibration import Calibration

__all__ = ["calibrate", "main"]

DEFAULTS: Final = CalibrateConfig()
_BINS: Final = 16
_BAR_WIDTH: Final = 40


def calibrate(
    model: Model = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images like those expected in use; subfolders are included.",
            show_default="the embedded model's own calibration scenes",
            metavar="DIR",
        ),
    ] = None,
    limit: Annotated[
        int, integer_option("Maximum number of images.", expected="a whole number of images")
    ] = DEFAULTS.limit,
    image_grid: Annotated[
        str | None,
        typer.Option(
            help="Image sizes to calibrate for, in the form of promprune-export --image-grid.",
            show_default="that of promprune-export",
            metavar="GRIDS",
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write promprune_config.json to the folder of MODEL, where promprune-export reads it."
        ),
    ] = DEFAULTS.write,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the histogram, as a .png or .svg file.", metavar="FILE", show_default=False),
    ] = None,
    as_json: Annotated[bool, json_option("the result")] = False,
    version: Version = False,
) -> None:
    """Fit mu and tau, the constants of the budget split, to the vision tower of a model. Needs no labels.

    mu is the median of the spectral entropies of the images, and tau is half of their standard deviation.

    Examples:

      promprune-calibrate ./llava-1.5-7b-hf --images photos --write

      promprune-calibrate llava-hf/llava-1.5-7b-hf --images photos --plot entropy.png
    """
    config = CalibrateConfig(
        model=model,
        images=images,
        limit=limit,
        image_grids=() if image_grid is None else parse_grids(image_grid),
        write=write,
        plot=plot,
    )
    fitted, count = _fit(config)
    _print(fitted, count, as_json=as_json)
    _write(fitted, config)


def main() -> None:
    """Entry point of ``promprune-calibrate``."""
    run_command(calibrate)


def _fit(config: CalibrateConfig) -> tuple[Calibration, int]:
    """Fit the constants; return them and the number of images."""
    local_folder(config.model)
    paths = None if config.images is None else _images(config.images, config.limit)
    if config.plot is not None:
        with missing_extra("eval"):
            importlib.import_module("matplotlib.figure")  # fail now rather than after the work
    with missing_extra("export"):
        from promprune.export.checkpoint.loading import load_checkpoint
        from promprune.export.evaluation import calibration
    checkpoint = load_checkpoint(config.model)
    if paths is None:
        from promprune.embedded.scenes import CALIBRATION_SEEDS

        side = checkpoint.model.config.vision_config.image_size
        count = min(config.limit, len(CALIBRATION_SEEDS))
        pictures = calibration.calibration_scenes(count, side)
    else:
        count, pictures = len(paths), calibration.load_images(paths)
    entropies: list[float] = []
    with show_progress() as progress, progress.step("read the images", items=count) as step:
        for found in calibration.image_entropies(checkpoint, pictures, config.image_grids):
            entropies += found
            step.advance()
    return calibration.calibrate(entropies), count


def _images(folder: Path, limit: int) -> list[Path]:
    paths = folder_images(folder, limit)
    check_calibration_images(len(paths), f"--images {folder}, which holds {len(paths)} images")
    return paths


def _print(fitted: Calibration, count: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"mu": fitted.mu, "tau": fitted.tau, "images": count, "entropies": list(fitted.entropies)})
        return
    _print_histogram(fitted)
    print(f"--mu {fitted.mu} --tau {fitted.tau}")


def _write(fitted: Calibration, config: CalibrateConfig) -> None:
    if config.write and config.model is not None:
        from promprune.export.evaluation.calibration import write_calibration

        written = write_calibration(Path(config.model), fitted)
        console.print(f"written to {plain(str(written))}; promprune-export uses it", soft_wrap=True)
    if config.plot is not None:
        from promprune.export.evaluation.plots import plot_entropies

        plot_entropies(fitted, config.plot)


def _print_histogram(fitted: Calibration) -> None:
    """Print a histogram of the entropies on stderr, with the share of the budget for saliency at each."""
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


if __name__ == "__main__":
    main()
