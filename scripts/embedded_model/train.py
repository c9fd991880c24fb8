"""Train the embedded model from scratch: `python scripts/embedded_model/train.py`.

The run is seeded, prints its progress, and resumes from its last checkpoint when it is started again. At the end the
checkpoint folder is written and calibrated on unlabelled images; `promprune-eval` measures its accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.embedded_model.architecture import new_model, new_tokenizer, save_model
from scripts.embedded_model.calibration import calibrate_folder
from scripts.embedded_model.evaluation import packed_accuracy
from scripts.embedded_model.training import Probes, Schedule, make_trainer, train_language, train_vision

EMBEDDED = Path(__file__).resolve().parents[2] / "promprune" / "embedded" / "model"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    tokenizer = new_tokenizer()
    model = new_model(args.image_size, tokenizer.get_vocab_size(), args.seed)
    if args.untrained:
        save_model(model, tokenizer, args.out)
        return
    trainer = make_trainer(
        model,
        tokenizer,
        args.work,
        image_size=args.image_size,
        vision_batch_size=args.vision_batch_size,
        language_batch_size=args.language_batch_size,
        bf16=args.bf16,
        workers=args.threads,
    )
    probes = Probes(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    train_vision(trainer, probes, Schedule(args.vision_steps, args.vision_minutes))
    train_language(
        trainer,
        Schedule(args.language_steps, args.language_minutes),
        report=lambda: f"validation {packed_accuracy(trainer, scenes=40)}",
    )
    save_model(model, tokenizer, args.out)
    fitted = calibrate_folder(args.out)
    print(f"mu = {fitted.mu}, tau = {fitted.tau}; to measure the accuracy on unseen scenes: promprune-eval {args.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder to write (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/embedded-model"), help="resumable state")
    parser.add_argument("--image-size", type=int, choices=(224, 336), default=224)
    parser.add_argument("--vision-batch-size", type=int, default=16, help="images per step (%(default)s)")
    parser.add_argument("--language-batch-size", type=int, default=16, help="images per step (%(default)s)")
    parser.add_argument("--vision-steps", type=int, default=1300, help="stage 1 (%(default)s)")
    parser.add_argument("--language-steps", type=int, default=1150, help="stage 2 (%(default)s)")
    parser.add_argument("--vision-minutes", type=float, default=float("inf"), help="end stage 1 earlier")
    parser.add_argument("--language-minutes", type=float, default=float("inf"), help="end stage 2 earlier")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="parts of a batch that are computed concurrently")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--untrained", action="store_true", help="only write the folder, with random weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
