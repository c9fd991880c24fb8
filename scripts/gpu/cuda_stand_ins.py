"""Compile stand-ins for the CUDA libraries that a CUDA build of PyTorch links to, so that it imports without them.

python scripts/gpu/cuda_stand_ins.py ENVIRONMENT/lib/python3.12/site-packages/torch/lib

Every function returns 100, CUDA's error for "no device"; nothing on a GPU can work with them. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

CUDA_NAME = re.compile(r"lib(cu|nv|nccl)")
CUDA_SYMBOL = re.compile(r"(cu|nv|nccl|__cuda)")
UNDEFINED = re.compile(r" (GLOBAL|WEAK) +DEFAULT +UND +([^\s@]+)(?:@(\S+))?")
NVSHMEM = "NVSHMEM"  # the one version that is not named like its library
BODIES = {
    "cudaStreamIsCapturing": "int {name}(void *stream, int *status) {{ *status = 0; return 0; }}",
    "text": 'const char *{name}(void) {{ return "no CUDA device"; }}',
    "error": "int {name}(void) {{ return 100; }}",
}


def main(folder: Path) -> None:
    """Write the missing libraries beside those that need them."""
    libraries = sorted(folder.glob("*.so*"))
    missing = sorted(name for name in needed(libraries) if CUDA_NAME.match(name) and not (folder / name).exists())
    versioned, plain = undefined(libraries)
    for name in missing:
        versions = {version: names for version, names in versioned.items() if belongs(version, name)}
        compile_library(folder / name, versions, plain if name == missing[0] else ())
    print(f"stand-ins: {', '.join(missing)}")


def needed(libraries: Iterable[Path]) -> set[str]:
    """Return the names of the libraries that these link to."""
    return {name for library in libraries for name in re.findall(r"NEEDED.*\[(.*)\]", readelf("-d", library))}


def undefined(libraries: Iterable[Path]) -> tuple[dict[str, set[str]], set[str]]:
    """Return the CUDA functions that these do not define: by the version that they ask for, and without one."""
    versioned: dict[str, set[str]] = defaultdict(set)
    plain = set()
    for library in libraries:
        for binding, name, version in UNDEFINED.findall(readelf("--dyn-syms", library)):
            if version:
                versioned[version].add(name)
            elif binding == "GLOBAL" and CUDA_SYMBOL.match(name):
                plain.add(name)
    return versioned, plain


def readelf(option: str, library: Path) -> str:
    """Return what readelf prints of a library."""
    return subprocess.run(["readelf", "-W", option, library], capture_output=True, text=True, check=True).stdout


def belongs(version: str, library: str) -> bool:
    """Say whether a version of symbols is of a library: ``libcublas.so.13`` of the library of that name."""
    return version.startswith(library.partition(".so")[0] + ".so") or (version == NVSHMEM and "nvshmem" in library)


def compile_library(path: Path, versions: Mapping[str, Iterable[str]], plain: Iterable[str]) -> None:
    """Compile a library of functions, those of a version under that version."""
    names = sorted({*plain, *(name for names in versions.values() for name in names)})
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "source.c", Path(scratch) / "versions"
        source.write_text("\n".join(body(name) for name in names) + "\n")
        script.write_text(
            "".join(f"{key} {{ global: {' '.join(f'{n};' for n in of)} }};\n" for key, of in versions.items())
        )
        command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", "-o", str(path), str(source)]
        command += [f"-Wl,-soname,{path.name}", *([f"-Wl,--version-script={script}"] if versions else [])]
        subprocess.run(command, check=True)


def body(name: str) -> str:
    """Return a function in C."""
    kind = "text" if name.endswith(("String", "ErrorName")) else "error"
    return BODIES.get(name, BODIES[kind]).format(name=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
