"""``promprune-build``: build TensorRT engines from a package, or lower its decoder for ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.table import Table

from promprune.checks import require
from promprune.package.engines import ENGINE_BACKENDS, EngineConfig
from promprune.package.lowered import LOWERED_BACKEND
from promprune.package.package import read_package
from promprune.runtime.commands.options import PackageFolder, Version, integer_option, json_option
from promprune.terminal import console, missing_extra, print_json, run_command, show_progress

if TYPE_CHECKING:
    from promprune.export.engine import BuiltEngines

__all__ = ["build", "main"]

DEFAULTS: Final = EngineConfig()


def build(
    package: PackageFolder,
    backend: Annotated[
        str, typer.Option(help=f"TensorRT that builds the engines: {' or '.join(ENGINE_BACKENDS)}.", metavar="BACKEND")
    ] = DEFAULTS.backend,
    target: Annotated[
        str,
        typer.Option(
            help="Compute capabilities, such as sm89,sm120; current is the GPU of this machine, "
            "the only one that tensorrt builds for.",
            metavar="TARGETS",
        ),
    ] = ",".join(DEFAULTS.targets),
    max_prompt_tokens: Annotated[
        int,
        integer_option(
            "Longest prompt, in tokens, not counting the visual tokens of its first image.",
            expected="a whole number of tokens, at least 1",
        ),
    ] = DEFAULTS.max_prompt_tokens,
    max_new_tokens: Annotated[
        int, integer_option("Longest answer, in tokens.", expected="a whole number of tokens, at least 1")
    ] = DEFAULTS.max_new_tokens,
    max_batch: Annotated[int, integer_option("Most images or sequences in one run of a graph.")] = DEFAULTS.max_batch,
    decode_profile: Annotated[
        bool,
        typer.Option(
            "--decode-profile", help="Also tune the decoder for decode steps; doubles its size with tensorrt-rtx."
        ),
    ] = DEFAULTS.decode_profile,
    workspace_mib: Annotated[
        int | None,
        integer_option(
            "Scratch memory of one engine.", metavar="MIB", expected="a whole number of MiB", show_default="no limit"
        ),
    ] = DEFAULTS.workspace_mib,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Replace existing engines, even if they are up to date.")
    ] = DEFAULTS.rebuild,
    as_json: Annotated[bool, json_option("the engines")] = False,
    version: Version = False,
) -> None:
    """Build TensorRT engines of a package, in PACKAGE/engines. Engines that are up to date are kept.

    The backend onnxruntime lowers the decoder for ONNX Runtime, as an export does, over the weights of the package.

    Examples:

      promprune-build promprune-embedded-0.12 --target sm89,sm120

      promprune-build llava-0.12 --backend tensorrt --max-batch 4 --workspace-mib 4096

      promprune-build llava-0.12 --backend onnxruntime
    """
    lower = backend == LOWERED_BACKEND
    config = EngineConfig(
        backend=DEFAULTS.backend if lower else backend,  # type: ignore[arg-type]  # validated by EngineConfig
        targets=tuple(part.strip() for part in target.split(",") if part.strip()),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_batch=max_batch,
        decode_profile=decode_profile,
        workspace_mib=workspace_mib,
        rebuild=rebuild,
    )
    if lower:
        require(config == replace(DEFAULTS, rebuild=rebuild), "backend", backend, "no options of engines with it")
        _lower(package, rebuild=rebuild, as_json=as_json)
    else:
        _build(package, config, as_json=as_json)


def main() -> None:
    """Entry point of ``promprune-build``."""
    run_command(build)


def _build(package: Path, config: EngineConfig, *, as_json: bool) -> None:
    with missing_extra(config.backend):
        from promprune.export.engine import build_engines
    with show_progress() as progress:
        results = build_engines(package, config, progress=progress)
    if as_json:
        print_json({"package": str(package), "engines": [_as_json(result) for result in results]})
    else:
        _print_summary(results)


def _lower(package: Path, *, rebuild: bool, as_json: bool) -> None:
    with missing_extra("export"):
        from promprune.export.lower.build import lower_package
    with show_progress() as progress, progress.step("lower the decoder for ONNX Runtime"):
        lowered = lower_package(read_package(package, check_weights=rebuild), rebuild=rebuild)
    if as_json:
        content = {"built": lowered.built, **msgspec.to_builtins(lowered.manifest)}
        print_json({"package": str(package), "lowered": {"folder": str(lowered.folder), **content}})
        return
    for check in lowered.manifest.checks:
        console.print(f"{check.name}: {check.measured:.1e}, at most {check.limit:.0e}", soft_wrap=True)
    state = "built" if lowered.built else "up to date"
    print(f"{lowered.folder}: {LOWERED_BACKEND} {lowered.manifest.tool_version}, {state}")


def _as_json(result: BuiltEngines) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "built": result.built,
        "seconds": round(result.seconds, 3),
        **msgspec.to_builtins(result.manifest),
    }


def _print_summary(results: tuple[BuiltEngines, ...]) -> None:
    table = Table(title="Engines", title_justify="left", title_style="bold")
    for column in ("target", "graph"):
        table.add_column(column)
    for column in ("profiles", "MB", "build s"):
        table.add_column(column, justify="right")
    for result in results:
        for name, record in result.manifest.engines.items():
            profiles = ", ".join(profile.name for profile in record.profiles)
            size, seconds = f"{record.size_bytes / 1e6:.1f}", f"{record.build_seconds:.1f}"
            table.add_row(result.manifest.identity.target, name, profiles, size, seconds)
    console.print(table)
    for result in results:
        identity = result.manifest.identity
        state = f"built in {result.seconds:.1f} s" if result.built else "up to date"
        print(f"{result.folder}: {identity.backend} {identity.tool_version}, {identity.target}, {state}")


if __name__ == "__main__":
    main()
