"""Print how well a model's CLS attention separates objects from background, on scenes not used in training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.embedded_model.evaluation import saliency_auc

EMBEDDED = Path(__file__).resolve().parents[2] / "promprune" / "embedded" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder (%(default)s)")
    parser.add_argument(
        "--scenes", type=int, default=100, help="number of scenes of the calibration split (%(default)s)"
    )
    args = parser.parse_args()
    print(f"object against background patches: AUC {saliency_auc(args.model, args.scenes):.3f}")


if __name__ == "__main__":
    main()
