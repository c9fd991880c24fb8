"""Export LLaVA-1.5 and LLaVA-NeXT at 7B, and measure memory and time.

    python scripts/benchmarks/show_scale.py --work /a/disk/with/15/GB

Writes a checkpoint of each (random weights in fp16, shards of 5 GB; see ``tests/support/random_llava.py``), drops it
from the page cache, and exports it with ``promprune-export --ratio 0.12 --dtype fp16``, verification included, in a
separate process. Exits with 1 if an export takes more memory or time than the project promises.

``resident`` is the peak resident memory of the process, as counted by the kernel: anonymous memory and the pages of
mapped files. ``own`` is the anonymous memory alone, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.runtime.bench.machine import describe_machine, load_average
from tests.support.random_llava import FAMILIES, TEXTS, config_of, save

MAX_RESIDENT_BYTES = 1_500_000_000
MAX_SECONDS = 300.0
LOOK_EVERY_S = 0.02
EXPORT = Path(sys.executable).with_name("promprune-export")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The measurements of one export.

    Attributes:
        family: family of the model.
        checkpoint_bytes: size of its weights.
        package_bytes, new_bytes: size of the package, with and without the files that it shares with the checkpoint.
        seconds, cpu_seconds: wall time of the process, and its CPU time.
        resident_bytes: peak resident memory, ``VmHWM``.
        maxrss_bytes: peak resident memory as ``wait4`` reports it; on Linux at least that of the parent process.
        own_bytes: peak anonymous memory, ``RssAnon``, as sampled.
        checks, failed: number of checks of the verification, and of failed ones.
        not_verified: checks that the verification omits at this scale.
    """

    family: str
    checkpoint_bytes: int
    package_bytes: int
    new_bytes: int
    seconds: float
    cpu_seconds: float
    resident_bytes: int
    maxrss_bytes: int
    own_bytes: int
    checks: int
    failed: int
    not_verified: Sequence[str]

    @property
    def holds(self) -> bool:
        """Whether the export stays within the promised limits."""
        return self.resident_bytes <= MAX_RESIDENT_BYTES and self.seconds <= MAX_SECONDS and not self.failed


def measure(family: str, checkpoint: Path, package: Path, options: Sequence[str]) -> Export:
    """Export a checkpoint in a separate process."""
    drop_from_page_cache(checkpoint)
    command = [str(EXPORT), str(checkpoint), "-o", str(package), "--json", *options]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output)
        resident = own = 0
        while True:
            resident, own = max(resident, memory_of(process.pid, "VmHWM")), max(own, memory_of(process.pid, "RssAnon"))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(LOOK_EVERY_S)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
        output.seek(0)
        verification = json.load(output)["verification"] or {"checks": (), "not_verified": ("anything",)}
    files = [path.stat() for path in package.rglob("*") if path.is_file()]
    return Export(
        family=family,
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        package_bytes=sum(file.st_size for file in files),
        new_bytes=sum(file.st_size for file in files if file.st_nlink == 1),
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        resident_bytes=resident,
        maxrss_bytes=usage.ru_maxrss * 1024,
        own_bytes=own,
        checks=len(verification["checks"]),
        failed=sum(not check["passed"] and not check["advisory"] for check in verification["checks"]),
        not_verified=verification["not_verified"],
    )


def memory_of(pid: int, name: str) -> int:
    """Return a memory figure of a process from ``/proc``, in bytes; 0 after the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def drop_from_page_cache(folder: Path) -> None:
    """Drop files from the page cache, so that the export reads them from disk."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(exports: Sequence[Export]) -> None:
    """Print a row for every export, as Markdown."""
    print("| | checkpoint | package | new on disk | wall | CPU | resident | own | checks |")
    print("|---|---|---|---|---|---|---|---|---|")
    for export in exports:
        sizes = (export.checkpoint_bytes, export.package_bytes, export.new_bytes)
        memory = (export.resident_bytes, export.own_bytes)
        cells = [
            export.family,
            *(f"{size / 1e9:.2f} GB" for size in sizes),
            f"{export.seconds:.0f} s",
            f"{export.cpu_seconds:.0f} s",
            *(f"{size / 1e9:.2f} GB" for size in memory),
            f"{export.checks - export.failed} of {export.checks} passed",
        ]
        print(f"| {' | '.join(cells)} |")
    left_out = sorted({what for export in exports for what in export.not_verified})
    print(f"\nnot verified: {'; '.join(left_out)}" if left_out else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and packages (a temporary one)")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), action="append", help="export only this family; may be repeated"
    )
    parser.add_argument("--size", choices=sorted(TEXTS), default="7b", help="size of the language model (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the written files, and reuse them the next time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("options", nargs="*", help="options of promprune-export, after -- (--ratio 0.12 --dtype fp16)")
    given = parser.parse_args()
    exports = []
    load_before = load_average()
    with tempfile.TemporaryDirectory(dir=given.work, prefix="scale-") as temporary:
        work = given.work if given.keep and given.work else Path(temporary)
        for family in given.family or FAMILIES:
            checkpoint, package = work / f"{family}-{given.size}", work / f"{family}-{given.size}-package"
            if not checkpoint.exists():
                save(checkpoint, config_of(given.size, family), "float16", seed=0)
            shutil.rmtree(package, ignore_errors=True)
            options = given.options or ["--ratio", "0.12", "--dtype", "fp16"]
            exports.append(measure(family, checkpoint, package, options))
            if not given.keep:
                shutil.rmtree(checkpoint)
                shutil.rmtree(package)
    machine = describe_machine(load_before=load_before, load_after=load_average(), other_cpu_fraction=())
    if given.json:
        print(json.dumps({"machine": f"{machine.cpu}, {machine.cpus} CPUs", "exports": [*map(asdict, exports)]}))
    else:
        print(
            f"{machine.cpu}, {machine.cpus} CPUs, {machine.memory_bytes / 2**30:.0f} GiB; load before {load_before}\n"
        )
        print_table(exports)
    if not all(export.holds for export in exports):
        raise SystemExit(
            f"promised: {MAX_RESIDENT_BYTES / 1e9:.1f} GB resident, {MAX_SECONDS:.0f} s, every check passed"
        )


if __name__ == "__main__":
    main()
