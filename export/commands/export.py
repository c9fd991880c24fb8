"""``promprune-export``: write a package with the selection inside the vision graph."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from promprune.dtypes import DTYPES, WEIGHT_FORMATS
from promprune.errors import VerificationError
from promprune.export.commands.options import Model, parse_grids
from promprune.export.commands.tables import checks_table, print_verification
from promprune.export.config import BLOCK_SIZES, DEFAULT_INT4_BLOCK, ExportConfig, default_output
from promprune.export.graphs.opset import QUANTIZED_OPSET
from promprune.export.verify.checks import BUDGET
from promprune.method.config import POLICIES, SelectionConfig
from promprune.package.describe import describe_selection, describe_weights
from promprune.package.manifest import check_package_output
from promprune.package.sources import local_folder
from promprune.runtime.commands.options import Version, integer_option, json_option, number_option
from promprune.terminal import console, missing_extra, plain, print_json, run_command, show_progress

if TYPE_CHECKING:
    from promprune.export.pipeline import ExportResult

__all__ = ["export", "main"]

DEFAULTS: Final = ExportConfig()
COST: Final = "cost of quantization"  # how the names of these checks begin


def export(
    model: Model = None,
    ratio: Annotated[
        float | None,
        number_option(
            "Fraction of the visual tokens that is KEPT, above 0 and at most 1; 1 is the unpruned baseline.",
            metavar="FRACTION",
            expected="a fraction above 0 and at most 1, such as 0.12",
            show_default=f"{DEFAULTS.ratio:g}",
        ),
    ] = None,
    keep_tokens: Annotated[
        int | None,
        integer_option(
            "Number of visual tokens kept per image, instead of --ratio.",
            expected="a whole number of tokens, at least 1",
        ),
    ] = DEFAULTS.keep_tokens,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write.", metavar="OUT", show_default="promprune-MODEL-RATIO"),
    ] = DEFAULTS.output,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Dtype of activations, and of weights if no --weight-format is given: {', '.join(DTYPES)}. "
            "The selection is always fp32.",
            metavar="DTYPE",
        ),
    ] = DEFAULTS.dtype,
    weight_format: Annotated[
        str | None,
        typer.Option(
            help=f"Format of the language model's weights, the head included: {', '.join(WEIGHT_FORMATS)}. "
            "Embeddings keep the dtype.",
            metavar="FORMAT",
            show_default="--dtype, or the checkpoint's own format if it is quantized",
        ),
    ] = DEFAULTS.weight_format,
    vision_weight_format: Annotated[
        str | None,
        typer.Option(
            help="Format of the weights of the vision encoder and the projector.",
            metavar="FORMAT",
            show_default="int8 if the language model is quantized, else --dtype",
        ),
    ] = DEFAULTS.vision_weight_format,
    block_size: Annotated[
        int | None,
        typer.Option(
            help=f"Quantized weights that share one scale: {', '.join(map(str, BLOCK_SIZES))}.",
            metavar="COUNT",
            show_default=f"{DEFAULT_INT4_BLOCK} in int4, a whole column in int8",
        ),
    ] = DEFAULTS.block_size,
    vision_int8_activations: Annotated[
        bool,
        typer.Option(
            "--vision-int8-activations",
            help="Compute the vision encoder's products in int8: faster on CPUs, but not supported by TensorRT.",
        ),
    ] = DEFAULTS.vision_int8_activations,
    image_grid: Annotated[
        str | None,
        typer.Option(
            help="Image sizes for Qwen2-VL and Qwen2.5-VL, as ROWSxCOLUMNS of visual tokens (28 x 28 pixels each), "
            "separated by commas. An image is resized to the one that distorts it least.",
            metavar="GRIDS",
            show_default="24x24, or the nearest that the model supports",
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.", metavar="VERSION")] = DEFAULTS.opset,
    mu: Annotated[
        float | None,
        typer.Option(
            help="Spectral entropy in the middle of the transition from saliency to coverage.",
            show_default=f"the model's own, or else the paper's {SelectionConfig.mu:g}",
            metavar="ENTROPY",
        ),
    ] = DEFAULTS.mu,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Width of that transition.",
            show_default=f"the model's own, or else the paper's {SelectionConfig.tau:g}",
            metavar="ENTROPY",
        ),
    ] = DEFAULTS.tau,
    order: Annotated[
        str, typer.Option(help="Order of the kept tokens: spatial, or selection (the authors' order).", metavar="ORDER")
    ] = DEFAULTS.order,
    policy: Annotated[
        str,
        typer.Option(
            help=f"Policy that chooses the kept tokens: {', '.join(POLICIES)}. All but the first are baselines.",
            metavar="POLICY",
        ),
    ] = DEFAULTS.policy,
    loop: Annotated[
        str,
        typer.Option(
            help="Loop of the coverage stage: loop makes as many trips as the images need; fixed always makes as many "
            "as there are kept tokens, so that nothing depends on the data; unrolled has no loop.",
            metavar="FORM",
        ),
    ] = DEFAULTS.loop,
    split_selector: Annotated[
        bool, typer.Option("--split-selector", help="Also write the selection as a separate graph.")
    ] = DEFAULTS.split_selector,
    copy_weights: Annotated[
        bool | None,
        typer.Option(
            "--copy-weights/--link-weights",
            help="Copy the weights into the package, or link the checkpoint's files, which takes no disk space.",
            show_default="large checkpoints are linked if the file system allows it",
        ),
    ] = DEFAULTS.copy_weights,
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Write no language model: for language models that run elsewhere.")
    ] = DEFAULTS.vision_only,
    verify: Annotated[
        bool, typer.Option(help="Compare the package with the model before OUT appears.")
    ] = DEFAULTS.verify,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it already is a package.")] = DEFAULTS.force,
    as_json: Annotated[bool, json_option("the manifest")] = False,
    version: Version = False,
) -> None:
    """Export a vision-language model to ONNX, with PromPrune's token selection inside the vision graph.

    Examples:

      promprune-export --ratio 0.12

      promprune-export ./llava-1.5-7b-hf --ratio 0.12 --dtype fp16 -o llava-0.12

      promprune-export ./llava-1.5-7b-hf --ratio 0.12 --weight-format int4

      promprune-export ./llava-1.5-7b-hf --ratio 1.0     (the unpruned baseline)
    """
    started = time.perf_counter()
    if ratio is not None and keep_tokens is not None:
        raise typer.BadParameter("received --ratio and --keep-tokens; expected one of them")
    config = ExportConfig(
        model=model,
        output=output,
        ratio=DEFAULTS.ratio if ratio is None else ratio,
        keep_tokens=keep_tokens,
        dtype=dtype,  # type: ignore[arg-type]  # validated by ExportConfig
        weight_format=weight_format,  # type: ignore[arg-type]  # validated by ExportConfig
        vision_weight_format=vision_weight_format,  # type: ignore[arg-type]  # validated by ExportConfig
        block_size=block_size,
        vision_int8_activations=vision_int8_activations,
        image_grids=() if image_grid is None else parse_grids(image_grid),
        opset=opset,
        split_selector=split_selector,
        copy_weights=copy_weights,
        vision_only=vision_only,
        verify=verify,
        force=force,
        mu=mu,
        tau=tau,
        order=order,  # type: ignore[arg-type]  # validated by SelectionConfig
        policy=policy,  # type: ignore[arg-type]  # validated by SelectionConfig
        loop=loop,  # type: ignore[arg-type]  # validated by ExportConfig
    )
    result = _run(config)
    _print_warnings(result)
    if as_json:
        print_json({"output": str(result.output), **msgspec.to_builtins(result.manifest)})
    else:
        _print_summary(result, time.perf_counter() - started)


def main() -> None:
    """Entry point of ``promprune-export``."""
    run_command(export)


def _run(config: ExportConfig) -> ExportResult:
    """Export after all checks that do not need PyTorch, which takes seconds to start."""
    local_folder(config.model)
    check_package_output(config.output or default_output(config), force=config.force)
    try:
        with show_progress() as progress:
            progress.announce(1)
            with progress.step("start PyTorch"), missing_extra("export"):
                from promprune.export.pipeline import export_package
            return export_package(config, progress=progress)
    except VerificationError as error:
        if error.checks:
            console.print(checks_table(error.checks))
        raise


def _print_warnings(result: ExportResult) -> None:
    manifest = result.manifest
    for check in manifest.verification.checks if manifest.verification else ():
        if check.passed:
            continue
        if check.name.startswith(COST):
            text = f"{check.name} is {check.measured:.3g}, usually {check.comparison} {check.limit:g}"
        elif check.name != BUDGET:
            continue  # in the table of the verification
        else:
            text = f"{check.detail}; fit them with promprune-calibrate"
        console.print(f"[bold yellow]warning:[/] {text}", soft_wrap=True)
    if manifest.weights is not None and manifest.weights.is_quantized:
        console.print(f"opset {manifest.opset}: quantized weights need at least {QUANTIZED_OPSET}", soft_wrap=True)


def _print_summary(result: ExportResult, seconds: float) -> None:
    manifest = result.manifest
    if manifest.verification is not None:
        print_verification(manifest.verification)
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    verified = "not verified" if manifest.verification is None else "verified"
    print(
        f"{result.output}: {describe_selection(manifest)}, {describe_weights(manifest)}, {size_mb:.1f} MB, {verified}"
    )
    answers = "promprune-run {} --image FILE --prompt TEXT" if manifest.has_language_model else "see docs/runtime.md"
    if result.not_lowered:
        console.print(f"[yellow]note:[/] no lowered decoder: {plain(result.not_lowered)}", soft_wrap=True)
    console.print(
        f"exported in {seconds:.1f} s; next: {answers.format(shlex.quote(str(result.output)))}", soft_wrap=True
    )


if __name__ == "__main__":
    main()
