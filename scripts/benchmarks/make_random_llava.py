"""Write a LLaVA of realistic size with random weights, for benchmarks: it is as fast as a trained one.

    python scripts/benchmarks/make_random_llava.py random-llava-1b --size 1b
    python scripts/benchmarks/make_random_llava.py random-llava-next-7b --size 7b --family llava_next --dtype float16

``tests/support/random_llava.py`` describes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.random_llava import DTYPES, FAMILIES, STD, TEXTS, config_of, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(TEXTS), default="1b", help="size of the language model (%(default)s)")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava")
    parser.add_argument(
        "--layers", type=int, help="layers of the language model, to reduce it if only the vision half is needed"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--std", type=float, default=STD, help="standard deviation of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    changes = {} if given.layers is None else {"num_hidden_layers": given.layers}
    save(given.out, config_of(given.size, given.family, **changes), given.dtype, given.seed, std=given.std)


if __name__ == "__main__":
    main()
