"""Measure everything that needs a GPU, in one command, and bring back what was finished however it ends.

    python scripts/gpu/report.py --out FOLDER                  # on a machine with an H100 or H200, without a network
    python scripts/gpu/report.py --out FOLDER --rehearse       # the same at tiny shapes on a CPU
    python scripts/gpu/report.py --plan                        # what would run, and how long it may take

Each stage runs in a process of its own with its own time limit and writes FOLDER/STAGE.json as it goes; after each,
FOLDER/report.json has everything so far. The last lines on stdout are the goals.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

NEEDED = ("msgspec", "numpy", "rich", "torch", "transformers", "typer")
DEFAULT_BUDGET_S = 540.0
LOG_LINES = 15
REHEARSAL_PATIENCE = 4  # times as long as on a GPU machine, whose CPUs nothing else uses
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan, run the stages and print the goals; return 1 if a stage did not finish."""
    options = _options(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; fill wheels/ with scripts/gpu/pack.sh and carry it")
    if options.stage:
        return run_stage(options.stage, options.out, rehearse=options.rehearse)
    from scripts.gpu.goals import goal_lines
    from scripts.gpu.plan import RUNS, plan_lines

    stages = tuple(stage for stage in RUNS[options.run] if not options.stages or stage.name in options.stages)
    print("\n".join(plan_lines(stages, options.budget)), flush=True)
    if options.plan:
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    report = run_stages(stages, options)
    if options.run == "pytorch":
        print("\n".join(goal_lines(report)))
    return int(any(record["status"] != "done" for record in report["stages"].values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the JSON files (%(default)s)")
    parser.add_argument("--run", choices=("pytorch", "onnxruntime"), default="pytorch", help="(%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--plan", action="store_true", help="print the plan only")
    parser.add_argument("--stages", nargs="+", default=(), metavar="NAME", help="only these")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET_S, help="seconds for all stages (%(default)s)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what the process of one stage is started with
    return parser.parse_args(arguments)


def run_stages(stages: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages one after the other within the budget; return the whole report, which is on disk as well."""
    from scripts.gpu.record import write_json

    start = time.monotonic()
    report: dict[str, Any] = {
        "kind": "rehearsal" if options.rehearse else "measurement",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "stages": {},
    }
    write_json(options.out / "report.json", report)
    for stage in stages:
        left = options.budget - (time.monotonic() - start)
        limit_s = stage.limit_s * (REHEARSAL_PATIENCE if options.rehearse else 1)
        record = run_in_process(stage.name, min(limit_s, left), options)
        report["stages"][stage.name] = record
        report["seconds"] = round(time.monotonic() - start, 2)
        write_json(options.out / "report.json", report)
        print(f"{record['status']:<10}{stage.name:<14}{record['seconds']:>6.1f} s  {record['error'] or ''}", flush=True)
    return report


def machine() -> dict[str, Any]:
    """Return what this machine is, with the versions of its software; or why that cannot be told."""
    from scripts.gpu.record import describe_error

    try:
        import msgspec

        from promprune.runtime.bench.machine import describe_machine

        found = describe_machine(load_before=None, load_after=None, other_cpu_fraction=())
        described: dict[str, Any] = msgspec.to_builtins(found)
    except Exception as error:  # the figures matter more
        return {"error": describe_error(error)}
    return described


def run_in_process(name: str, limit_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one stage in a process of its own; kill it, and all that it started, after its time; return its record."""
    from scripts.gpu.record import read_record, write_json

    path = options.out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--stage", name, "--out", str(options.out)]
    start = time.monotonic()
    log, status = "", None
    if limit_s > 0:
        log, status = _wait(command + ["--rehearse"] * options.rehearse, limit_s)
    record = read_record(path, name)
    if record["status"] == "running":
        record["status"], record["error"] = _how_it_ended(status, limit_s, log)
    record |= {"limit_s": round(limit_s, 1), "log": log.splitlines()[-LOG_LINES:]}
    record["seconds"] = round(time.monotonic() - start, 2)
    write_json(path, record)
    return record


def _wait(command: Sequence[str], limit_s: float) -> tuple[str, int | None]:
    """Return what a command printed, and its exit status, or None if it took longer than it may."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
    )
    try:
        log, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        return log, None
    return log, process.returncode


def _how_it_ended(status: int | None, limit_s: float, log: str) -> tuple[str, str]:
    """Return status and error of a stage whose process did not say itself how it ended."""
    if limit_s <= 0:
        return "skipped", "no time was left"
    if status is None:
        return "timed out", f"killed after {limit_s:.0f} s; the rows are those finished by then"
    last = (log.strip().splitlines() or [""])[-1]
    return "crashed", f"exit status {status}: {last}"[:300]


def run_stage(name: str, out: Path, *, rehearse: bool) -> int:
    """Run one stage in this process, which ends with the one that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    from scripts.gpu.plan import stage_named
    from scripts.gpu.record import Record
    from scripts.gpu.sizes import sizes_for

    _limit_threads(rehearse)
    stage = stage_named(name)
    record = Record(out / f"{name}.json", name)
    try:
        import_module(f"scripts.gpu.stages.{stage.module}").run(sizes_for(rehearse=rehearse), record, **stage.options)
    except Exception as error:  # recorded, and the next stage runs
        traceback.print_exc()
        record.finish(error)
        return 1
    record.finish()
    return 0


def _limit_threads(rehearse: bool) -> None:
    """Use one CPU thread in a rehearsal: tiny matrix products only wait for the others."""
    if rehearse:
        import torch

        torch.set_num_threads(1)


if __name__ == "__main__":
    raise SystemExit(main())
