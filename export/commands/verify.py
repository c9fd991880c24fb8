"""``promprune-verify``: compare a package with the model it was made from, or compare two backends or packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from promprune.errors import ConfigError, ModelError
from promprune.export.commands.tables import print_verification
from promprune.export.verify.config import DEFAULT_CHECK_IMAGES, CompareConfig
from promprune.package.describe import describe_selection
from promprune.package.manifest import Manifest, read_manifest
from promprune.package.package import read_package
from promprune.package.sources import EMBEDDED_MODEL, local_folder, source_of_package
from promprune.runtime.commands.options import PackageFolder, Version, integer_option, json_option, number_option
from promprune.terminal import EXIT_REFUSED, console, missing_extra, plain, print_json, run_command, show_progress

if TYPE_CHECKING:
    from promprune.export.verify.comparison import GraphComparison

__all__ = ["main", "verify"]

MAX_IMAGES: Final = 10_000
MOST_OUTPUTS: Final = 5  # outputs of a graph in the table; a decoder can have a hundred
DEFAULTS: Final = CompareConfig()
BACKENDS: Final = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


def verify(
    package: PackageFolder,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model that the package was made from.",
            show_default="the one named in the package",
            metavar="MODEL",
        ),
    ] = None,
    images: Annotated[
        int | None,
        integer_option(
            "Number of rendered images to compare on.",
            expected="a whole number of images",
            show_default=str(DEFAULT_CHECK_IMAGES),
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"Backend that runs the package: {', '.join(BACKENDS)}.", metavar="NAME", show_default=DEFAULTS.backend
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with the same package in this backend, instead of with the model.",
            show_default="the model, in PyTorch",
            metavar="NAME",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Compare with another package of the same model.", metavar="PACKAGE"),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="Compare only this graph. Repeat the option for several graphs.", metavar="NAME"),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Also compare tensors inside the graphs, and report the first that exceeds the tolerance."
        ),
    ] = DEFAULTS.layers,
    tolerance: Annotated[
        float | None,
        number_option(
            "Largest error that passes in a comparison of backends or packages.", show_default=f"{DEFAULTS.tolerance:g}"
        ),
    ] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Only print the layers of the graphs on stdout.")] = False,
    as_json: Annotated[bool, json_option("the checks")] = False,
    version: Version = False,
) -> None:
    """Compare a package with the model that it was made from. Exits with 1 if a check fails.

    With --against or --reference, compare two backends or two packages tensor by tensor instead.

    Examples:

      promprune-verify promprune-embedded-0.12

      promprune-verify llava-0.12 --model ./llava-1.5-7b-hf --images 200

      promprune-verify llava-0.12 --backend tensorrt-rtx --against onnxruntime --layers

      promprune-verify llava-0.12-fp16 --reference llava-0.12 --layers --tolerance 0.02
    """
    of_source = {"--model": model, "--images": images}
    of_graphs = {"--backend": backend, "--layers": layers or None, "--tolerance": tolerance, "--graph": graph or None}
    if inspect:
        rest = {name: value for name, value in of_graphs.items() if name != "--graph"}
        others = {"--against": against, "--reference": reference, "--json": as_json or None}
        _refuse({**of_source, **rest, **others}, "with --inspect", "only --graph")
        _inspect(package, graph or ())
    elif against or reference:
        _refuse(of_source, "with --against or --reference", "neither: they are for a comparison with the model")
        config = CompareConfig(
            backend=backend or DEFAULTS.backend,
            against=against or backend or DEFAULTS.backend,
            reference=reference,
            graphs=tuple(graph or ()),
            layers=layers,
            tolerance=DEFAULTS.tolerance if tolerance is None else tolerance,
        )
        _compare(package, config, as_json=as_json)
    else:
        _refuse(of_graphs, "without --against or --reference", "one of those two")
        _verify(package, model, DEFAULT_CHECK_IMAGES if images is None else images, as_json=as_json)


def main() -> None:
    """Entry point of ``promprune-verify``."""
    run_command(verify)


def _refuse(options: Mapping[str, object], where: str, expected: str) -> None:
    """Refuse options that would be ignored."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(f"received {' and '.join(given)} {where}; expected {expected}")


def _inspect(package: Path, graphs: Sequence[str]) -> None:
    with missing_extra("export"):
        from promprune.export.verify.comparison import describe_graphs
    print(describe_graphs(package, graphs))


def _verify(package: Path, model: str | None, images: int, *, as_json: bool) -> None:
    """Compare a package with its source model, after all checks that do not need PyTorch."""
    if not 1 <= images <= MAX_IMAGES:
        raise ConfigError(f"received images = {images}", expected=f"1 to {MAX_IMAGES}")
    if model is not None:
        local_folder(model)
    manifest = read_manifest(package)
    source = source_of_package(package, manifest.source.model) if model is None else model
    checked = read_package(package, check_weights=True)  # takes minutes if it is large: after the source was found
    with missing_extra("export"):
        from promprune.export.checkpoint.loading import load_checkpoint
        from promprune.export.verify.verification import verify_package
    with console.status(f"comparing {plain(str(package))} with {plain(source or EMBEDDED_MODEL)} on {images} images"):
        checkpoint = load_checkpoint(source)
        _check_source(package, manifest, source or EMBEDDED_MODEL, checkpoint.source.weights_sha256)
        record = verify_package(checked, checkpoint, num_images=images)
    if as_json:
        print_json({"package": str(package), **msgspec.to_builtins(record)})
    else:
        print_verification(record)
        print(f"{package}: {describe_selection(manifest)}, {'verified' if record.passed else 'FAILED'}")
    if not record.passed:
        raise typer.Exit(EXIT_REFUSED)


def _compare(package: Path, config: CompareConfig, *, as_json: bool) -> None:
    if config.backend == config.against and (config.reference or package).resolve() == package.resolve():
        raise ConfigError(
            f"received --backend {config.backend} --against {config.against}, which compares {package} with itself",
            expected="another backend, or another package",
            fix="choose another one with --backend, --against or --reference",
        )
    with missing_extra("export"):
        from promprune.export.verify.comparison import compare_package
    with show_progress() as progress:
        results = compare_package(package, config, progress=progress)
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
            print(f"{state}, first above {config.tolerance:g}: {first.tensor} of {first.node}, error {first.error:.3g}")
    if not config.layers and not all(result.passed for result in results):
        console.print("[dim]--layers finds the first tensor inside the graphs that is above the tolerance[/]")


def _check_source(package: Path, manifest: Manifest, source: str, weights_sha256: str) -> None:
    if weights_sha256 != manifest.source.weights_sha256:
        raise ModelError(
            f"the weights of {source} are not those that {package} was made from",
            expected=f"weights with the digest {manifest.source.weights_sha256[:12]}...",
            fix="pass the right model with --model, or export again",
        )


if __name__ == "__main__":
    main()
