"""The embedded model's settings of the selection: mu and tau of its tower, and its limit of the saliency ratio."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Final

from promprune.export.checkpoint.loading import SELECTION_FILE, load_checkpoint
from promprune.export.evaluation.calibration import (
    Calibration,
    calibrate,
    calibration_scenes,
    image_entropies,
    write_calibration,
)

IMAGES: Final = 512
SALIENCY_RATIO_MAX: Final = 0.3  # docs/accuracy.md explains how it was chosen


def calibrate_folder(folder: Path) -> Calibration:
    """Write `promprune_config.json` into the folder of a trained model."""
    checkpoint = load_checkpoint(str(folder))
    side = checkpoint.meta_model.config.vision_config.image_size
    entropies = image_entropies(checkpoint, calibration_scenes(IMAGES, side))
    fitted = calibrate(list(chain.from_iterable(entropies)))
    limit = {"saliency_ratio_max": SALIENCY_RATIO_MAX}
    (folder / SELECTION_FILE).write_text(json.dumps(limit), encoding="utf-8")
    write_calibration(folder, fitted)
    return fitted
