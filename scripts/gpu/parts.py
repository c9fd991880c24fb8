"""Archives that are larger than what one run carries: cut into parts here, joined on the GPU machine.

python -m scripts.gpu.parts split NAME WHEELS PARTS      # WHEELS/*.whl -> PARTS/NAME.00/, PARTS/NAME.01/, ...
python -m scripts.gpu.parts join NAME STORE WHEELS       # STORE/NAME.00.part, ... -> WHEELS/*.whl

Each folder has one part and the checksums of all, by which ``join`` knows whether every part is there; it exits with 1
as long as one is missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PART_BYTES", "join", "main", "split"]

PART_BYTES = 49 * 2**20  # beside the checkout and the other wheels, below the 64 MiB that one run carries


def split(name: str, wheels: Path, parts: Path, *, part_bytes: int = PART_BYTES) -> list[Path]:
    """Put the files of a folder into an archive and cut it; return the folders of the parts."""
    parts.mkdir(parents=True, exist_ok=True)
    archive = parts / f"{name}.tar"
    with tarfile.open(archive, "w") as stream:
        for wheel in sorted(wheels.iterdir()):
            stream.add(wheel, wheel.name)
    folders, checksums = [], []
    with archive.open("rb") as stream:
        while content := stream.read(part_bytes):
            folders.append(parts / f"{name}.{len(folders):02d}")
            folders[-1].mkdir()
            (folders[-1] / f"{folders[-1].name}.part").write_bytes(content)
            checksums.append(hashlib.sha256(content).hexdigest())
    archive.unlink()
    for folder in folders:
        (folder / f"{name}.json").write_text(json.dumps(checksums))
    return folders


def join(name: str, store: Path, wheels: Path) -> bool:
    """Unpack the archive whose parts are all in one folder; return whether they are."""
    listed = store / f"{name}.json"
    if not listed.is_file():
        return False
    checksums = json.loads(listed.read_text())
    files = [store / f"{name}.{index:02d}.part" for index in range(len(checksums))]
    if any(not file.is_file() or _checksum(file) != wanted for file, wanted in zip(files, checksums, strict=True)):
        return False
    archive = store / f"{name}.tar"
    with archive.open("wb") as stream:
        for file in files:
            stream.write(file.read_bytes())
    with tarfile.open(archive) as content:
        content.extractall(wheels, filter="data")
    archive.unlink()
    return True


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """Split or join; return 1 if a part is missing."""
    command, name, source, target = arguments
    if command == "join":
        return int(not join(name, Path(source), Path(target)))
    for folder in split(name, Path(source), Path(target)):
        print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
