"""Write one plot of a benchmark report as a picture.

python scripts/figures/plot_report.py REPORT.json stages OUT.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.runtime.bench.page import figures
from promprune.runtime.bench.report import read_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("plot", choices=("stages", "gains", "first-token", "memory"))
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    figures(read_report(given.report))[given.plot].savefig(given.output, dpi=110)


if __name__ == "__main__":
    main()
