"""Calibration: mu and tau of a model's vision tower, from unlabelled images.

The constants of the budget split depend on the tower: the paper's 0.42 and 0.02 are for CLIP-L. With a tower that has
other entropies, they give the entire budget of every image to one stage. Here mu is the median of the entropies, so
that half of the images give saliency more than half of the budget; tau is half of their standard deviation, so that an
image one standard deviation from the median splits the budget 12 : 88.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from promprune.embedded import scenes
from promprune.errors import ConfigError
from promprune.export.checkpoint.loading import SELECTION_FILE, Checkpoint, read_constants
from promprune.export.config import check_calibration_images
from promprune.export.families import Grids
from promprune.files import replace_file
from promprune.method.config import SelectionConfig
from promprune.method.entropy import saliency_ratio, spectral_entropy
from promprune.package.sources import folder_images
from promprune.runtime import load_image

__all__ = ["Calibration", "calibrate", "calibration_scenes", "folder_images", "image_entropies", "write_calibration"]


@dataclass(frozen=True)
class Calibration:
    """Constants of the budget split, and the entropies they were fitted to.

    Attributes:
        mu, tau: see :class:`promprune.config.SelectionConfig`.
        entropies: normalised spectral entropies, one per run of the selection: per image, or per crop.
    """

    mu: float
    tau: float
    entropies: tuple[float, ...]

    def saliency_shares(self) -> list[float]:
        """The share of the budget that each image would give to saliency."""
        config = SelectionConfig(mu=self.mu, tau=self.tau)
        return [float(share) for share in saliency_ratio(torch.tensor(self.entropies, dtype=torch.float64), config)]


def calibrate(entropies: Sequence[float]) -> Calibration:
    """Fit mu (median) and tau (half the standard deviation), to four decimals.

    Raises:
        ConfigError: there are too few entropies, or all are equal.
    """
    check_calibration_images(len(entropies), f"{len(entropies)} images")
    mu, tau = round(statistics.median(entropies), 4), round(statistics.stdev(entropies) / 2, 4)
    if tau == 0:
        raise ConfigError(
            f"all images have the same entropy ({mu})", expected="images as varied as those expected in use"
        )
    return Calibration(mu, tau, tuple(entropies))


@torch.inference_mode()
def image_entropies(checkpoint: Checkpoint, images: Iterable[Image.Image], grids: Grids = ()) -> Iterator[list[float]]:
    """Yield the entropies of each image's visual tokens, in float64: one per image, or per crop.

    Args:
        checkpoint: the model.
        images: RGB images.
        grids: sizes of images as (rows, columns) of visual tokens, for families with a choice of sizes; empty for the
            family's default.

    Raises:
        ConfigError: sizes were chosen, and this family has no choice of sizes.
        UnsupportedModelError: the model, or a size, cannot be exported.
    """
    family = checkpoint.family(checkpoint.model, checkpoint.processor, grids)
    for image in images:
        reference = family.reference(family.resize(image))
        features = reference.features.double()
        mask = reference.feeds.get("token_mask", torch.ones(features.shape[:2], dtype=torch.bool))
        yield [float(spectral_entropy(row[valid])) for row, valid in zip(features, mask, strict=True) if valid.any()]


def load_images(paths: Iterable[Path]) -> Iterator[Image.Image]:
    """Read image files one by one."""
    for path in paths:
        yield load_image(path)


def calibration_scenes(count: int, image_size: int) -> Iterator[Image.Image]:
    """Render the first images of the embedded model's calibration split."""
    for seed in scenes.CALIBRATION_SEEDS[:count]:
        yield scenes.render_scene(seed, image_size=image_size).image


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write mu and tau to ``promprune_config.json`` in a checkpoint's folder, where the export reads them.

    Other values in an existing file are kept.

    Raises:
        ModelError: the existing file is invalid.
    """
    path = folder / SELECTION_FILE
    constants = {**read_constants(folder), "mu": calibration.mu, "tau": calibration.tau}
    replace_file(path, (json.dumps(constants, indent=2) + "\n").encode())
    return path
