"""``promprune-verify``: compare a package with the model it was made from, or in two backends, or with another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from promprune.cli.common import (
    EXIT_REFUSED,
    console,
    describe_selection,
    missing_extra,
    option_type,
    print_json,
    print_verification,
    run_command,
)
from promprune.cli.options import Version
from promprune.config import DEFAULT_CHECK_IMAGES, CompareConfig
from promprune.errors import ConfigError, ModelError
from promprune.package import Manifest, read_manifest

if TYPE_CHECKING:
    from rich.status import Status

    from promprune.export.compare import GraphComparison

__all__ = ["main", "verify"]

MAX_IMAGES: Final = 10_000
MOST_OUTPUTS: Final = 5  # of a graph in the table; a decoder can have a hundred
DEFAULTS: Final = CompareConfig()
BACKENDS: Final = ("onnxruntime", "onnxruntime-cuda", "onnx-reference", "tensorrt", "tensorrt-rtx")


def verify(
    package: Annotated[Path, typer.Argument(help="Folder that promprune-export wrote.", metavar="PACKAGE")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model it was made from.", show_default="as the package says", metavar="MODEL"
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            help="Rendered images to compare on.", parser=option_type(int, "a whole number of images"), metavar="COUNT"
        ),
    ] = DEFAULT_CHECK_IMAGES,
    backend: Annotated[
        str, typer.Option(help=f"What runs the package: {', '.join(BACKENDS)}.", metavar="NAME")
    ] = DEFAULTS.backend,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with the package in this backend, instead of with its source.",
            show_default="the source, in PyTorch",
            metavar="NAME",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Compare with another package of the same model, instead.", metavar="PACKAGE"),
    ] = None,
    graph: Annotated[
        list[str] | None, typer.Option(help="Compare this graph only; repeat it for several.", metavar="NAME")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Look inside the graphs, and name the first tensor past the tolerance.")
    ] = DEFAULTS.layers,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Largest error that passes in such a comparison.",
            parser=option_type(float, "a number"),
            metavar="NUMBER",
        ),
    ] = DEFAULTS.tolerance,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Only describe the graphs, layer by layer, on stdout.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as one line of JSON on stdout.")] = False,
    version: Version = False,
) -> None:
    """Compare a package with the model it was made from. Exits with 1 if a check fails.

    With --against or --reference, compare two backends or two packages instead, tensor by tensor.

    Examples:

      promprune-verify promprune-embedded-0.12

      promprune-verify llava-0.12 --model ./llava-1.5-7b-hf --images 200

      promprune-verify llava-0.12 --backend tensorrt-rtx --against onnxruntime --layers

      promprune-verify llava-0.12-fp16 --reference llava-0.12 --layers --tolerance 0.02
    """
    if inspect:
        with missing_extra("export"):
            from promprune.export.compare import describe_graphs
        print(describe_graphs(package, graph or ()))
        return
    if against or reference:
        _compare(
            package,
            CompareConfig(
                backend=backend,
                against=against or backend,
                reference=reference,
                graphs=tuple(graph or ()),
                layers=layers,
                tolerance=tolerance,
            ),
            as_json=as_json,
        )
        return
    if backend != DEFAULTS.backend or layers or graph:
        raise typer.BadParameter(
            "received --backend, --layers or --graph without --against or --reference; expected one of those two"
        )
    if not 1 <= images <= MAX_IMAGES:
        raise ConfigError(f"received images = {images}", expected=f"1 to {MAX_IMAGES}")
    manifest = read_manifest(package, check_weights=True)
    with missing_extra("export"):
        from promprune.export.checkpoint import EMBEDDED_MODEL, load_checkpoint
        from promprune.export.verify import verify_package
    source = model or manifest.source.model
    with console.status(f"comparing {package} with {source} on {images} images"):
        checkpoint = load_checkpoint(None if source == EMBEDDED_MODEL and model is None else source)
        _check_source(package, manifest, source, checkpoint.source.weights_sha256)
        record = verify_package(package, manifest, checkpoint, num_images=images)
    if as_json:
        print_json({"package": str(package), **msgspec.to_builtins(record)})
    else:
        print_verification(record)
        print(f"{package}: {describe_selection(manifest)}, {'verified' if record.passed else 'FAILED'}")
    if not record.passed:
        raise typer.Exit(EXIT_REFUSED)


def main() -> None:
    """Entry point of ``promprune-verify``."""
    run_command(verify)


def _compare(package: Path, config: CompareConfig, *, as_json: bool) -> None:
    with missing_extra("export"):
        from promprune.export.compare import compare_package
    with console.status(f"comparing {package}") as status:
        results = compare_package(package, config, progress=_StatusProgress(status))
    if as_json:
        graphs = [{**asdict(result), "passed": result.passed} for result in results]
        print_json({"package": str(package), "tolerance": config.tolerance, "graphs": graphs})
    else:
        _print_comparison(results, config)
    if not all(result.passed for result in results):
        raise typer.Exit(EXIT_REFUSED)


def _print_comparison(results: tuple[GraphComparison, ...], config: CompareConfig) -> None:
    table = Table(title="Comparison", title_justify="left", title_style="bold")
    for column in ("graph", "worst outputs"):
        table.add_column(column)
    table.add_column("error", justify="right")
    table.add_column("")
    for result in results:
        for output in sorted(result.outputs, key=lambda output: -output.error)[:MOST_OUTPUTS]:
            verdict = "[green]ok[/]" if output.passed else "[bold red]FAILED[/]"
            table.add_row(result.graph, escape(output.tensor), f"{output.error:.3g}", verdict)
    console.print(table)
    for result in results:
        state = f"{result.graph}: {result.compared} tensors compared on {result.feeds} inputs"
        first = result.first
        if first is None:
            print(f"{state}, all within {config.tolerance:g}")
        else:
            print(f"{state}, first past {config.tolerance:g}: {first.tensor} of {first.node}, error {first.error:.3g}")
    if not config.layers and not all(result.passed for result in results):
        console.print("[dim]--layers looks for the first tensor inside the graphs that is past the tolerance[/]")


class _StatusProgress:
    """Says what is being done now."""

    def __init__(self, status: Status) -> None:
        self.status = status

    @contextlib.contextmanager
    def step(self, description: str) -> Iterator[None]:
        self.status.update(description)
        yield


def _check_source(package: Path, manifest: Manifest, source: str, weights_sha256: str) -> None:
    if weights_sha256 != manifest.source.weights_sha256:
        raise ModelError(
            f"the weights of {source} are not those that {package} was made from",
            expected=f"weights with the digest {manifest.source.weights_sha256[:12]}...",
            fix="name the right model with --model, or export again",
        )
