"""The project's tests marked ``gpu``, as far as the software of the machine allows."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes

ROOT = Path(__file__).resolve().parents[3]
OUTCOMES = ("failure", "error", "skipped")


def run(sizes: Sizes, record: Record) -> None:
    """Record one row per test: ``test``, ``outcome`` (``passed``, ``skipped``, ``failure``, ``error``), ``message``."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "--continue-on-collection-errors", f"--junitxml={results}", *sizes.tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        record.fact("exit_status", done.returncode)
        record.fact("last_lines", done.stdout.strip().splitlines()[-5:])
        for row in junit_rows(results.read_text(encoding="utf-8")):
            record.row(**row)


def junit_rows(junit_xml: str) -> list[dict[str, str]]:
    """Return a row per test of a JUnit report, in its order."""
    rows = []
    for case in ElementTree.fromstring(junit_xml).iter("testcase"):
        found = next((child for child in case if child.tag in OUTCOMES), None)
        row = {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": "passed"}
        if found is not None:
            message = " ".join(str(found.get("message")).split())
            row |= {"outcome": found.tag, "message": message[:300]}
        rows.append(row)
    return rows
