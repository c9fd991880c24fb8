"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from promprune.terminal import option_type, version_callback

__all__ = ["Backend", "CudaGraphs", "NumThreads", "Provider", "Version"]

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
    int | None,
    typer.Option(
        help="Number of CPU threads.",
        parser=option_type(int, "a whole number"),
        show_default="as many as this process may use",
        metavar="COUNT",
    ),
]
CudaGraphs: TypeAlias = Annotated[
    bool,
    typer.Option("--cuda-graphs", help="Replay the vision encoder and the decode steps of engines as CUDA graphs."),
]
Version: TypeAlias = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=version_callback, is_eager=True)
]
