"""``promprune-eval``: how much of its accuracy a model keeps, at several ratios and under several policies."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from promprune.atomic import replace_file
from promprune.cli.common import console, missing_extra, print_json, run_command
from promprune.cli.options import Version
from promprune.config import DTYPES, ExportConfig
from promprune.errors import ConfigError
from promprune.package import MANIFEST_FILE

if TYPE_CHECKING:
    from promprune.config import SelectionConfig
    from promprune.evaluation.data import Picture
    from promprune.evaluation.runs import Run
    from promprune.evaluation.scores import Score

__all__ = ["evaluate", "main"]

DEFAULT_RATIOS: Final = "0.5,0.25,0.12"
DEFAULT_POLICIES: Final = "promprune,half,coverage,saliency,random"
EMBEDDED_POLICIES: Final = f"{DEFAULT_POLICIES},oracle,none"
EMBEDDED: Final = "embedded"


def evaluate(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            help="One model (folder or hub id), packages that promprune-export wrote, or both. Left out: the embedded "
            "model.",
            metavar="[MODEL | PACKAGE]...",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="'embedded': rendered scenes; or a folder with images and a *.jsonl of image, question, answers.",
            metavar="DATA",
        ),
    ] = EMBEDDED,
    ratios: Annotated[
        str, typer.Option(help="Of a model: fractions of the tokens that are KEPT.", metavar="LIST")
    ] = DEFAULT_RATIOS,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Of a model: what chooses the kept tokens.",
            show_default=f"{DEFAULT_POLICIES}; also oracle and none with the embedded data",
            metavar="LIST",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also export the model in this dtype ({' or '.join(DTYPES)}), with all tokens and at the smallest "
            "ratio, and ask the packages. Can be given twice.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most images.", metavar="COUNT", show_default="all")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", metavar="COUNT")] = 16,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of PyTorch.", metavar="COUNT", show_default="all")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for tables, figures, answers and numbers.", metavar="DIR", show_default=False
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="Page of pictures with what was kept and answered.", metavar="OUT.html", show_default=False),
    ] = None,
    gallery_limit: Annotated[int, typer.Option(help="Most pictures on that page.", metavar="COUNT")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one line of JSON on stdout.")] = False,
    version: Version = False,
) -> None:
    """Ask the same questions with all visual tokens and with few, and compare the answers.

    A model answers in PyTorch under every policy at every ratio; a package answers in the runtime, as it is.

    Examples:

      promprune-eval --runtime fp32 --runtime fp16 -o results --gallery gallery.html

      promprune-eval ./llava-1.5-7b-hf --data photos --ratios 0.25,0.12

      promprune-eval llava-1.0 llava-0.12 --data photos
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    model, packages = _sorted_out(subjects or [])
    for dtype in runtime or ():
        if dtype not in DTYPES or model is None:
            raise ConfigError(f"received --runtime {dtype}", expected=f"{' or '.join(DTYPES)}, with a model")
    fractions = _fractions(ratios)
    with missing_extra("export"):
        import torch

        from promprune.evaluation.data import load_data
        from promprune.evaluation.scores import majority_share, scores
        from promprune.export.checkpoint import selection_config
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = policies or (EMBEDDED_POLICIES if data == EMBEDDED else DEFAULT_POLICIES)
    pictures = load_data(data, limit=limit)
    runs: list[Run] = []
    config: SelectionConfig | None = None
    with _progress() as progress:
        if model is not None:
            subject, runs = _ask_model(model, pictures, fractions, chosen.split(","), max_new_tokens, progress)
            config = selection_config(subject, ExportConfig())[0]
        with tempfile.TemporaryDirectory() as scratch:
            for dtype in runtime or ():
                packages += _exported(model, dtype, min(fractions), Path(scratch), progress)
            runs += [_ask_package(package, pictures, max_new_tokens, progress) for package in packages]
    found = scores(runs, pictures)
    _write(output, gallery, gallery_limit, runs, found, pictures, config)
    seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
    if as_json:
        from promprune.evaluation.report import to_dict

        print_json({"data": data, "majority": majority_share(pictures), "seconds": seconds, "runs": to_dict(found)})
        return
    _print(found, pictures, majority_share(pictures))
    console.print(f"{seconds['wall']:.0f} s, of which {seconds['cpu']:.0f} s of one CPU core")


def main() -> None:
    """Entry point of ``promprune-eval``."""
    run_command(evaluate)


def _fractions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"received --ratios {text}", expected="fractions that are kept, such as 0.5,0.12") from error


def _sorted_out(subjects: Sequence[str]) -> tuple[str | None, list[Path]]:
    """Which of the arguments is the model, and which are packages; the embedded model where nothing is named."""
    packages = [Path(name) for name in subjects if (Path(name) / MANIFEST_FILE).is_file()]
    models = [name for name in subjects if Path(name) not in packages]
    if len(models) > 1:
        raise ConfigError(f"received {len(models)} models: {', '.join(models)}", expected="one, and packages")
    if not subjects:
        return EMBEDDED, []
    return (models[0] if models else None), packages


def _ask_model(
    name: str,
    pictures: Sequence[Picture],
    ratios: Sequence[float],
    policies: Sequence[str],
    max_new_tokens: int,
    progress: Callable[[str, int], Callable[[int], None]],
) -> tuple[Path, list[Run]]:
    from promprune.evaluation.model import TorchModel
    from promprune.evaluation.runs import ask_torch, conditions
    from promprune.export.checkpoint import load_checkpoint, selection_config

    checkpoint = load_checkpoint(None if name == EMBEDDED else name)
    subject = TorchModel(checkpoint)
    wanted = conditions(subject.num_tokens, ratios, policies)
    config, _ = selection_config(checkpoint.folder, ExportConfig())
    done = progress(f"PyTorch, {len(wanted)} conditions", len(pictures))
    return checkpoint.folder, ask_torch(subject, pictures, wanted, config, max_new_tokens=max_new_tokens, done=done)


def _ask_package(
    folder: Path,
    pictures: Sequence[Picture],
    max_new_tokens: int,
    progress: Callable[[str, int], Callable[[int], None]],
) -> Run:
    from promprune.evaluation.runs import ask_package

    done = progress(f"runtime, {folder.name}", len(pictures))
    return ask_package(folder, pictures, max_new_tokens=max_new_tokens, done=done)


def _exported(
    model: str | None, dtype: str, smallest: float, scratch: Path, progress: Callable[[str, int], Callable[[int], None]]
) -> list[Path]:
    """Export the model with all tokens and at the smallest ratio."""
    from promprune.export.pipeline import export_package

    wanted = [1.0, *([smallest] if smallest < 1 else [])]
    done = progress(f"export, {dtype}", len(wanted))
    folders = []
    for ratio in wanted:
        folders.append(scratch / f"{dtype}-{ratio:g}")
        name = None if model == EMBEDDED else model
        settings = ExportConfig(model=name, output=folders[-1], ratio=ratio, dtype=dtype, verify=False)  # type: ignore[arg-type]
        export_package(settings)
        done(1)
    return folders


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield what starts a bar, and returns what advances it."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def begin(description: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(description, total=total)
            return lambda count: progress.advance(task, count)

        yield begin


def _write(
    output: Path | None,
    gallery: Path | None,
    gallery_limit: int,
    runs: Sequence[Run],
    found: Sequence[Score],
    pictures: Sequence[Picture],
    config: SelectionConfig | None,
) -> None:
    from promprune.evaluation import report
    from promprune.evaluation.gallery import gallery as gallery_page

    full = next((run for run in runs if run.views), None)
    selected = [
        run for run in runs if run.selections and run.condition.policy == "promprune" and run.condition.by == "torch"
    ]
    smallest = min(selected, key=lambda run: run.condition.keep_tokens, default=None)
    if gallery is not None:
        if full is None or smallest is None:
            raise ConfigError("received --gallery", expected="it with a model, and promprune among the policies")
        page = gallery_page(full, smallest, pictures, limit=gallery_limit)
        replace_file(gallery, page.encode())
        console.print(f"wrote {gallery}", soft_wrap=True)
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in _tables(found, pictures).items():
        replace_file(output / f"{name}.md", report.markdown(rows).encode())
    replace_file(output / "results.json", json.dumps(report.to_dict(found), indent=1).encode())
    replace_file(output / "answers.jsonl", "".join(_answer_lines(runs, pictures)).encode())
    if full is not None and smallest is not None and config is not None:
        with missing_extra("eval"):
            from promprune.evaluation.plots import plot_accuracy, plot_split
        plot_accuracy(found, output / "accuracy.png")
        if all(len(selection.spectral_entropies) == 1 for selection in smallest.selections):  # one split per picture
            plot_split(smallest, config, output / "split.png")
    console.print(f"wrote {output}", soft_wrap=True)


def _tables(found: Sequence[Score], pictures: Sequence[Picture]) -> dict[str, list[list[str]]]:
    from promprune.evaluation import report
    from promprune.evaluation.data import SPARSE_AND_DENSE
    from promprune.evaluation.scores import group_names

    tables = {"overview": report.overview(found)}
    if any(score.run.condition.by == "torch" for score in found):
        tables["by_group"] = report.by_group(found, pictures)
        groups = [SPARSE_AND_DENSE] if SPARSE_AND_DENSE in group_names(pictures) else []
        tables["comparisons"] = report.comparisons(found, pictures, groups)
    return tables


def _answer_lines(runs: Sequence[Run], pictures: Sequence[Picture]) -> Iterator[str]:
    for index, picture in enumerate(pictures):
        for number, question in enumerate(picture.questions):
            line: dict[str, Any] = {"image": picture.name, "question": question.text, "answers": question.answers}
            for run in runs:
                condition = run.condition
                line[f"{condition.by}/{condition.policy}/{condition.keep_tokens}"] = run.answers[index][number]
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _print(found: Sequence[Score], pictures: Sequence[Picture], majority: float) -> None:
    from rich.console import Console

    from promprune.evaluation.report import table_of

    titles = {
        "overview": f"{found[0].asked} questions about {len(pictures)} images, percent and 95 % intervals",
        "by_group": "Accuracy by question, percent, fewest tokens",
        "comparisons": "PromPrune less the others, points of accuracy",
    }
    screen = Console(highlight=False)
    for name, rows in _tables(found, pictures).items():
        screen.print(table_of(rows, titles[name]))
    screen.print(f"always the most frequent answer to each type of question: {100 * majority:.1f} %")
