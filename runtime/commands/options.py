"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from promprune.terminal import option_type, version_callback

__all__ = [
    "Backend",
    "CheckWeights",
    "CudaGraphs",
    "MaxImagePixels",
    "NumThreads",
    "PackageFolder",
    "PrefillChunk",
    "Provider",
    "Version",
    "integer_option",
    "json_option",
    "number_option",
]


def integer_option(
    text: str, metavar: str = "COUNT", *, expected: str = "a whole number", show_default: Any = True
) -> Any:
    """Return an option that takes a whole number; ``expected`` says which in the message that refuses another."""
    return typer.Option(help=text, metavar=metavar, parser=option_type(int, expected), show_default=show_default)


def number_option(text: str, metavar: str = "NUMBER", *, expected: str = "a number", show_default: Any = True) -> Any:
    """Return an option that takes a number; ``expected`` says which in the message that refuses another."""
    return typer.Option(help=text, metavar=metavar, parser=option_type(float, expected), show_default=show_default)


def json_option(what: str) -> Any:
    """Return the option ``--json``, for a command that prints ``what``."""
    return typer.Option("--json", help=f"Print {what} as one line of JSON on stdout.")


PackageFolder: TypeAlias = Annotated[
    Path, typer.Argument(help="Folder written by promprune-export.", metavar="PACKAGE")
]
Backend: TypeAlias = Annotated[
    str, typer.Option(help="Library that runs the graphs: onnxruntime or tensorrt.", metavar="NAME")
]
Provider: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Provider of onnxruntime: auto (CUDA if it loads, else the CPU), cpu, cuda, tensorrt or tensorrt-rtx.",
        metavar="NAME",
    ),
]
NumThreads: TypeAlias = Annotated[
    int | None, integer_option("Number of CPU threads.", show_default="as many as this process may use")
]
CudaGraphs: TypeAlias = Annotated[
    bool,
    typer.Option("--cuda-graphs", help="Replay the vision encoder and the decode steps of engines as CUDA graphs."),
]
PrefillChunk: TypeAlias = Annotated[
    int | None,
    integer_option(
        "Run the prefill in chunks of this many tokens, which limits the scratch memory of long prompts.",
        show_default="the whole prompt in one chunk",
    ),
]
MaxImagePixels: TypeAlias = Annotated[
    int, integer_option("Largest image that is decoded, in pixels; half of it for WebP and AVIF.")
]
CheckWeights: TypeAlias = Annotated[
    bool, typer.Option("--check-weights", help="Also check the SHA-256 of the weights.")
]
Version: TypeAlias = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=version_callback, is_eager=True)
]
