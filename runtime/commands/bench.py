"""``promprune-bench``: measure packages and baselines in turns, count their work, and write a report."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from promprune.dtypes import DTYPES
from promprune.errors import ConfigError
from promprune.files import check_output_folder, output_errors, replace_file
from promprune.method.config import POLICIES
from promprune.progress import Progress
from promprune.runtime.bench.config import BASELINES, BenchConfig
from promprune.runtime.bench.plugins import plugin
from promprune.runtime.commands.options import (
    Backend,
    CudaGraphs,
    NumThreads,
    Provider,
    Version,
    integer_option,
    json_option,
    number_option,
)
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.terminal import (
    EXIT_REFUSED,
    console,
    missing_extra,
    missing_package,
    plain,
    print_json,
    run_command,
    show_progress,
)

if TYPE_CHECKING:
    from promprune.runtime.bench.compare import Comparison, Difference, MissingCase
    from promprune.runtime.bench.report import Report

__all__ = ["bench", "compare", "main"]

EXTRA: Final = "bench"
OPENVINO: Final = ("openvino-genai", "openvino_genai", "openvino")  # distribution, then modules
DEFAULT_RATIOS: Final = "1.0,0.12"
DEFAULT_DTYPE: Final = "fp32"
_FILE_COLUMNS: Final = 240  # width of the tables if stdout is not a terminal
_POLICIES: Final = POLICIES[1:]  # without the method itself


def bench(
    packages: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders written by promprune-export. Default: packages exported from --model.", metavar="[PACKAGE]..."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model to export, and to run baselines with.",
            show_default="the embedded model, or that of the packages",
            metavar="MODEL",
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the visual tokens that are KEPT by the exported packages.",
            show_default=DEFAULT_RATIOS,
            metavar="LIST",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Dtype of the exported packages: {' or '.join(DTYPES)}.", show_default=DEFAULT_DTYPE, metavar="NAME"
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the exported packages.", show_default="~/.cache/promprune/bench", metavar="FOLDER"
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            help="Also measure: hf (Hugging Face in PyTorch, unpruned), authors (with the authors' selection); "
            f"with --model also packages with another policy: {', '.join(_POLICIES)}.",
            show_default="none",
            metavar="LIST",
        ),
    ] = "",
    peer: Annotated[
        str | None,
        typer.Option(
            help="Also measure another runtime: openvino=FOLDER, with the same model converted for OpenVINO GenAI.",
            metavar="NAME=FOLDER",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", "-i", help="Image to ask about.", show_default="a rendered scene", metavar="FILE"),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.", metavar="TEXT")] = BenchConfig.prompt,
    new_tokens: Annotated[int, integer_option("Length of every answer, in tokens.")] = BenchConfig.new_tokens,
    rounds: Annotated[
        int, integer_option("Measured rounds; every contender runs once per round, in random order.")
    ] = BenchConfig.rounds,
    warmup: Annotated[int, integer_option("Rounds before those that are measured.")] = BenchConfig.warmup,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,4.", metavar="LIST")] = "1",
    concurrency: Annotated[str, typer.Option(help="Numbers of concurrent calls, such as 1,2.", metavar="LIST")] = "1",
    cold_starts: Annotated[
        int,
        integer_option(
            "Processes started per contender for peak memory and cold start, after one that is not counted."
        ),
    ] = BenchConfig.cold_starts,
    backend: Backend = RuntimeConfig.backend,
    provider: Provider = RuntimeConfig.provider,
    num_threads: NumThreads = RuntimeConfig.num_threads,
    cuda_graphs: CudaGraphs = RuntimeConfig.cuda_graphs,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write report.json, .csv, .md and .html to.", metavar="OUT"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the reports in OUT.")] = False,
    as_json: Annotated[bool, json_option("the report")] = False,
    version: Version = False,
) -> None:
    """Measure packages and baselines in turns, stage by stage, and count their work.

    To compare two reports, run promprune-bench compare A.json B.json; see its --help.

    Examples:

      promprune-bench

      promprune-bench llava-1.0 llava-0.12 --image photo.jpg --baseline hf,authors -o report

      promprune-bench --model ./llava-1.5-7b-hf --ratios 1.0,0.5,0.25,0.12 --batch 1,4 --concurrency 1,2
    """
    if output is not None:
        check_output_folder(output, "-o", marker="report.json", contents="a report", force=force)
    with missing_extra(EXTRA):
        from promprune.runtime.bench.measure import run_benchmark

    baselines, policies = _baselines(baseline)
    if packages:
        exporting = {"--ratios": ratios, "--dtype": dtype, "--cache": cache, "--model": None if baselines else model}
        _refuse_with_packages(exporting, policies)
    asked: dict[str, Any] = {
        "image": image,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "warmup": warmup,
        "batches": _numbers(batch, int, "--batch", "whole numbers such as 1,4"),
        "concurrencies": _numbers(concurrency, int, "--concurrency", "whole numbers such as 1,2"),
        "cold_starts": cold_starts,
        "baselines": baselines,
        "model": model,
        "openvino": _openvino(peer),
        "runtime": RuntimeConfig(
            backend=backend,
            provider=provider,  # type: ignore[arg-type]  # BenchConfig checks it
            num_threads=num_threads,
            cuda_graphs=cuda_graphs,
        ),
        "command": shlex.join(["promprune-bench", *sys.argv[1:]]),
    }
    given = {_name(folder): folder for folder in packages or []}
    if packages and len(given) < len(packages):
        raise ConfigError("received packages of the same name", expected="folders with different names")
    wanted = _numbers(DEFAULT_RATIOS if ratios is None else ratios, float, "--ratios", "fractions such as 1.0,0.12")
    BenchConfig(packages=given or {"none yet": Path()}, **asked)  # refuse wrong settings before anything is exported
    if output is not None:
        with missing_extra(EXTRA):
            importlib.import_module("promprune.runtime.bench.page")  # fail now rather than after the measurements
    with show_progress() as progress, missing_extra("export"), missing_package(*OPENVINO):
        if peer is not None:
            importlib.import_module("openvino_genai")  # fail now rather than after the first measurements
        folders = given or _exported(
            model, wanted, DEFAULT_DTYPE if dtype is None else dtype, policies, cache, progress
        )
        report = run_benchmark(BenchConfig(packages=folders, **asked), progress)
    try:
        if output is not None:
            _write(report, output)
    finally:  # print the results even if the disk is full
        _print(report, as_json=as_json)


def compare(
    before: Annotated[Path, typer.Argument(help="Report written by promprune-bench.", metavar="A.json")],
    after: Annotated[Path, typer.Argument(help="Report to compare with it.", metavar="B.json")],
    stage: Annotated[str, typer.Option(help="Stage whose time is compared.", metavar="STAGE")] = "first_token",
    threshold: Annotated[
        float,
        number_option(
            "Relative slowdown above which a difference is a regression.",
            metavar="FRACTION",
            expected="a number such as 0.05",
        ),
    ] = 0.05,
    confidence: Annotated[
        float, number_option("Confidence level of the intervals.", metavar="FRACTION", expected="a number such as 0.95")
    ] = 0.95,
    relative_to: Annotated[
        str | None,
        typer.Option(
            help="Divide each contender's time by this one's, round by round; the speed of the machine cancels.",
            metavar="CONTENDER",
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Accept cases that are in only one report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout.")] = False,
) -> None:
    """Compare two reports of the same work. Exits with 1 if B is slower than A by more than the threshold.

    A regression is a ratio of medians above the threshold whose confidence interval, bootstrapped over the rounds,
    is entirely above 1. With fewer than 6 rounds (8 for 99 %) there is no interval. The command also exits with 1 if
    a case is in only one report.

    Examples:

      promprune-bench compare yesterday/report.json today/report.json --threshold 0.1

      promprune-bench compare A.json B.json --relative-to 1.0
    """
    with missing_extra(EXTRA):
        from promprune.runtime.bench.compare import CompareConfig, compare_reports
        from promprune.runtime.bench.report import read_report
    config = CompareConfig(stage=stage, threshold=threshold, confidence=confidence, relative_to=relative_to)
    found = compare_reports(read_report(before), read_report(after), config)
    if as_json:
        print_json({"stage": stage, "threshold": threshold, **_as_plain(found)})
    else:
        _results().print(_differences(found.differences, config.stage, relative_to))
    for missing in found.missing:
        console.print(_missing_line(missing), soft_wrap=True)
    slower = [entry for entry in found.differences if entry.regression]
    print(f"{len(slower)} of {len(found.differences)} cases are slower by more than {threshold:.1%}", file=sys.stderr)
    if slower or (found.missing and not allow_missing):
        raise typer.Exit(EXIT_REFUSED)


def main() -> None:
    """Entry point of ``promprune-bench``."""
    if sys.argv[1:2] == ["compare"]:
        run_command(compare, name="promprune-bench compare", arguments=sys.argv[2:])
    run_command(bench)


def _numbers(text: str, convert: Callable[[str], Any], option: str, expected: str) -> tuple[Any, ...]:
    try:
        return tuple(convert(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"received {option} {text!r}; expected {expected}") from error


def _baselines(text: str) -> tuple[tuple[str, ...], list[str]]:
    """Divide a list of names into baselines in PyTorch and selection policies."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in (*BASELINES, *_POLICIES):
            raise ConfigError(f"received baseline {name!r}", expected=f"one of {', '.join((*BASELINES, *_POLICIES))}")
    return tuple(name for name in named if name in BASELINES), [name for name in named if name in _POLICIES]


def _refuse_with_packages(exporting: Mapping[str, object], policies: list[str]) -> None:
    """Refuse options of the export if packages are given."""
    for option, value in exporting.items():
        if value is not None:
            use = "--baseline hf or authors with it" if option == "--model" else f"one of them: {option} is for --model"
            raise typer.BadParameter(f"received packages and {option}; expected {use}")
    if policies:
        raise typer.BadParameter(
            f"received packages and --baseline {policies[0]}; expected --model, or packages exported with --policy"
        )


def _openvino(peer: str | None) -> Path | None:
    """Return the folder of OpenVINO's model, the only known peer."""
    if peer is None:
        return None
    name, _, folder = peer.partition("=")
    if name != "openvino" or not folder:
        raise typer.BadParameter(f"received --peer {peer!r}; expected openvino=FOLDER")
    return Path(folder)


def _name(folder: Path) -> str:
    return folder.resolve().name


def _exported(
    model: str | None,
    ratios: tuple[float, ...],
    dtype: str,
    policies: list[str],
    cache: Path | None,
    progress: Progress,
) -> dict[str, Path]:
    exports = plugin("packages")
    folders: dict[str, Path] = exports.packages_of(
        model, ratios, dtype, policies, cache or exports.default_cache(), progress
    )
    return folders


def _write(report: Report, output: Path) -> None:
    """Write the report in all four formats, each atomically; first the JSON, from which the others can be made."""
    from promprune.runtime.bench.page import to_html
    from promprune.runtime.bench.tables import to_csv, to_markdown

    forms: dict[str, Callable[[Report], str]] = {
        "json": _json_text,
        "csv": to_csv,
        "md": to_markdown,
        "html": to_html,
    }
    with output_errors(output, fix="choose another -o"):
        output.mkdir(parents=True, exist_ok=True)
        for suffix, text_of in forms.items():
            replace_file(output / f"report.{suffix}", text_of(report).encode())


def _json_text(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def _results() -> Console:
    """Return the console for tables on stdout; it is wider if stdout is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_COLUMNS)


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(report))
        return
    from promprune.runtime.bench.tables import grids, machine_lines

    results = _results()
    for line in machine_lines(report):
        results.print(plain(line), style="dim", soft_wrap=True)
    for grid in grids(report):
        table = Table(title=grid.title, caption=grid.note or None, title_justify="left", title_style="bold")
        for number, title in enumerate(grid.header):
            table.add_column(plain(title), justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*map(plain, row))
        results.print(table)


def _differences(found: list[Difference], stage: str, relative_to: str | None) -> Table:
    unit = f"over {relative_to}" if relative_to else "ms"
    table = Table(title=f"{stage}, B against A", title_justify="left", title_style="bold")
    for number, title in enumerate(("", "batch", "calls at once", f"A, {unit}", f"B, {unit}", "B / A", "interval", "")):
        table.add_column(title, justify="right" if number else "left")
    for entry in found:
        ratio, low, high = entry.ratio
        interval = "" if low is None or high is None else f"{low:.3f} ... {high:.3f}"
        load = (str(entry.batch), str(entry.concurrency), f"{entry.before:.4g}", f"{entry.after:.4g}")
        colour = "bold red" if entry.regression else "green" if interval else "yellow"
        table.add_row(plain(entry.contender), *load, f"{ratio:.3f}", interval, f"[{colour}]{entry.verdict}[/]")
    return table


def _missing_line(case: MissingCase) -> str:
    return f"[yellow]missing[/] in {case.report}: {plain(case.contender)}, {case.load}"


def _as_plain(found: Comparison) -> dict[str, Any]:
    differences = [{**vars(entry), "ratio": entry.ratio._asdict()} for entry in found.differences]
    return {"differences": differences, "missing": [case._asdict() for case in found.missing]}


if __name__ == "__main__":
    main()
