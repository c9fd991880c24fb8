"""How large the tree is that travels to the machine: what git does not ignore, and the folders named.

python -m scripts.gpu.carried scripts/gpu/wheels
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["LIMIT_BYTES", "carried_bytes", "main"]

LIMIT_BYTES = 64 * 2**20
ROOT = Path(__file__).resolve().parents[2]


def carried_bytes(folders: Sequence[Path]) -> int:
    """Return the size of the files of this checkout that git does not ignore, and of those in ``folders``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {ROOT / name for name in listed.stdout.split("\0") if name}
    files |= {file.resolve() for folder in folders for file in folder.rglob("*")}
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def main(folders: Sequence[str]) -> int:
    """Print the size; return 1 if it is over the limit."""
    size = carried_bytes([Path(folder) for folder in folders])
    print(f"carried: {size / 2**20:.1f} MiB of {LIMIT_BYTES / 2**20:.0f} MiB")
    return int(size > LIMIT_BYTES)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
