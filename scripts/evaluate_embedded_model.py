"""Print the embedded model's accuracy on scenes that training never saw."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from embedded_model.evaluation import print_table

EMBEDDED = Path(__file__).resolve().parents[1] / "promprune" / "assets" / "embedded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder (%(default)s)")
    parser.add_argument("--scenes", type=int, default=260, help="about 7.7 questions each (%(default)s)")
    parser.add_argument(
        "--keep-tokens", type=int, nargs="*", default=[], help="also with this many image tokens kept, by each method"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_table(args.model, scenes=args.scenes, keep_tokens=tuple(args.keep_tokens))


if __name__ == "__main__":
    main()
