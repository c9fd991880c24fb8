"""Write a report into the GPU section of docs/benchmarks.md, and the report itself beside it.

python scripts/gpu/fill_docs.py FOLDER/report.json [SECOND/report.json]

A second report, of the run with ONNX Runtime, adds its stages to the first. What stands between the markers
``<!-- gpu report -->`` and ``<!-- end of gpu report -->`` is replaced; the reports go to docs/reports/gpu-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.gpu.page import section
from scripts.gpu.record import write_json

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu report -->", "<!-- end of gpu report -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks.md", help="(%(default)s)")
    parser.add_argument("--rehearsal", action="store_true", help="accept a rehearsal, to try this script")
    options = parser.parse_args(arguments)
    report = merged([json.loads(path.read_bytes()) for path in options.reports])
    if report["kind"] == "rehearsal" and not options.rehearsal:
        raise SystemExit("received a rehearsal; expected a report measured on a GPU")
    page = filled(options.page.read_text(encoding="utf-8"), section(report))
    kept = options.page.parent / "reports" / f"gpu-{report['created'][:10]}.json"
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, report)
    options.page.write_text(page, encoding="utf-8")
    print(f"{options.page}, {kept}")


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first report with the stages of all."""
    stages = {name: record for report in reports for name, record in report["stages"].items()}
    return {**reports[0], "stages": stages}


def filled(page: str, content: str) -> str:
    """Return a page with the content between its markers.

    Raises:
        SystemExit: it does not have each marker once, in their order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest:
        raise SystemExit(f"received a page without one {BEGIN} and one {END} after it")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


if __name__ == "__main__":
    main()
