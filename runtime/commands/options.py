"""Options that several commands have in common, stated once."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from promprune.terminal import option_type, version_callback

__all__ = ["Backend", "CudaGraphs", "NumThreads", "Provider", "Version"]

Backend: TypeAlias = Annotated[str, typer.Option(help="onnxruntime, or another one that is installed.", metavar="NAME")]
Provider: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Of onnxruntime: auto (CUDA where it loads, else the CPU), cpu, cuda, tensorrt or tensorrt-rtx.",
        metavar="NAME",
    ),
]
NumThreads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="CPU threads.",
        parser=option_type(int, "a whole number"),
        show_default="as many as this process may use",
        metavar="COUNT",
    ),
]
CudaGraphs: TypeAlias = Annotated[
    bool,
    typer.Option("--cuda-graphs", help="Of engines: replay vision encoder and decoding steps as CUDA graphs."),
]
Version: TypeAlias = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=version_callback, is_eager=True)
]
