"""``promprune-eval``: measure how much accuracy a model keeps at several ratios and with several policies."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from promprune.dtypes import DTYPES
from promprune.errors import BackendError, ConfigError, PackageError
from promprune.export.config import ExportConfig
from promprune.export.evaluation.config import DEFAULT_POLICIES, DEFAULT_RATIOS, EMBEDDED_DATA, EvalConfig
from promprune.files import replace_file
from promprune.package.manifest import MANIFEST_FILE, read_manifest
from promprune.package.sources import EMBEDDED_MODEL, local_folder
from promprune.progress import Progress
from promprune.runtime.commands.options import Version, integer_option, json_option
from promprune.terminal import console, missing_extra, plain, print_json, run_command, show_progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from promprune.export.evaluation.data import Picture
    from promprune.export.evaluation.model import TorchModel
    from promprune.export.evaluation.runs import Run
    from promprune.export.evaluation.scores import Score
    from promprune.method.config import SelectionConfig

__all__ = ["evaluate", "main"]

DEFAULTS: Final = EvalConfig()


def evaluate(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            help="One model (folder or hub id), packages written by promprune-export, or both. Default: the embedded "
            "model.",
            metavar="[MODEL | PACKAGE]...",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="'embedded' for rendered scenes, or a folder with images and a *.jsonl file with the keys image, "
            "question and answers.",
            metavar="DATA",
        ),
    ] = EMBEDDED_DATA,
    ratios: Annotated[
        str | None,
        typer.Option(
            help="For a model: fractions of the visual tokens that are KEPT.",
            show_default=",".join(f"{ratio:g}" for ratio in DEFAULT_RATIOS),
            metavar="LIST",
        ),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="For a model: policies that choose the kept tokens.",
            show_default=f"{','.join(DEFAULT_POLICIES)}; also oracle and none with the embedded data",
            metavar="LIST",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also export the model in this dtype ({' or '.join(DTYPES)}), with all tokens and at the smallest "
            "ratio, and ask the packages. Repeat the option for several dtypes.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        integer_option("Maximum number of images.", expected="a whole number, at least 1", show_default="all"),
    ] = DEFAULTS.limit,
    max_new_tokens: Annotated[
        int, integer_option("Maximum length of an answer, in tokens.", expected="a whole number, at least 1")
    ] = DEFAULTS.max_new_tokens,
    threads: Annotated[
        int | None,
        integer_option(
            "For a model: number of CPU threads of PyTorch.", expected="a whole number, at least 1", show_default="all"
        ),
    ] = DEFAULTS.threads,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to write tables, figures, answers and numbers to.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Write a page that shows images with their kept tokens and answers.",
            metavar="OUT.html",
            show_default=False,
        ),
    ] = None,
    gallery_limit: Annotated[
        int, integer_option("Maximum number of images on that page.", expected="a whole number, at least 1")
    ] = DEFAULTS.gallery_limit,
    as_json: Annotated[bool, json_option("the results")] = False,
    version: Version = False,
) -> None:
    """Ask the same questions with all visual tokens and with fewer, and compare the answers.

    A model answers in PyTorch, with every policy at every ratio. A package answers in the runtime, with its own policy
    and ratio.

    Examples:

      promprune-eval --runtime fp32 --runtime fp16 -o results --gallery gallery.html

      promprune-eval ./llava-1.5-7b-hf --data photos --ratios 0.25,0.12

      promprune-eval llava-1.0 llava-0.12 --data photos
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    model, packages = _split_subjects(subjects or [])
    config = EvalConfig(
        model=model,
        packages=packages,
        data=data,
        ratios=None if ratios is None else _fractions(ratios),
        policies=None if policies is None else tuple(dict.fromkeys(_parts(policies))),
        runtime=tuple(dict.fromkeys(runtime or ())),  # type: ignore[arg-type]  # validated by EvalConfig
        limit=limit,
        max_new_tokens=max_new_tokens,
        threads=threads,
        output=output,
        gallery=gallery,
        gallery_limit=gallery_limit,
    )
    _check_what_is_here(config)
    results = _run(config)
    seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
    if as_json:
        _print_json(results, data, seconds)
    else:
        _print(results)
        console.print(f"{seconds['wall']:.0f} s, of which {seconds['cpu']:.0f} s of one CPU core")
    _write(results, config)


def main() -> None:
    """Entry point of ``promprune-eval``."""
    run_command(evaluate)


@dataclass(frozen=True)
class _Asked:
    """The results of the model in torch.

    Attributes:
        runs: one run per condition.
        selection: settings of the selection.
        page: the gallery in HTML; None if none was requested.
    """

    runs: list[Run]
    selection: SelectionConfig
    page: str | None


@dataclass(frozen=True)
class _Results:
    """Everything that is printed and written; ``model`` is None if only packages were evaluated."""

    pictures: Sequence[Picture]
    runs: Sequence[Run]
    scores: Sequence[Score]
    model: _Asked | None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError as error:
        raise ConfigError(f"received --ratios {text}", expected="fractions that are KEPT, such as 0.5,0.12") from error


def _split_subjects(subjects: Sequence[str]) -> tuple[str | None, tuple[Path, ...]]:
    """Divide the arguments into the model and the packages; without arguments, the embedded model."""
    packages = tuple(Path(name) for name in subjects if (Path(name) / MANIFEST_FILE).is_file())
    models = [name for name in subjects if Path(name) not in packages]
    if len(models) > 1:
        raise ConfigError(f"received {len(models)} models: {', '.join(models)}", expected="one model, and packages")
    if not subjects:
        return EMBEDDED_MODEL, ()
    return (models[0] if models else None), packages


def _name(config: EvalConfig) -> str | None:
    """Return the model's name for the export; None for the embedded model."""
    return None if config.model == EMBEDDED_MODEL else config.model


def _check_what_is_here(config: EvalConfig) -> None:
    """Refuse a model, packages or dtypes that cannot be used here, before PyTorch is started."""
    if config.model is not None:
        local_folder(_name(config))
    manifests = {folder: read_manifest(folder) for folder in config.packages}
    for folder, manifest in manifests.items():
        if not manifest.has_language_model:
            raise PackageError(
                f"{folder} has no language model: it was exported with --vision-only",
                expected="a package with a language model",
            )
    if "bf16" in {*config.runtime, *(manifest.dtype for manifest in manifests.values())}:
        _check_cuda()


def _check_cuda() -> None:
    """Refuse bf16 without CUDA: the CPU lacks operators for it."""
    from promprune.runtime.sessions.providers import why_not

    reason = why_not("cuda")
    if reason is not None:
        raise BackendError(
            f"packages in bf16 run on CUDA only, which cannot be used here ({reason})",
            expected="an NVIDIA GPU with its driver, CUDA and cuDNN",
            fix="use fp32 or fp16",
        )


def _run(config: EvalConfig) -> _Results:
    from promprune.export.evaluation.data import load_data

    pictures = load_data(config.data, limit=config.limit)
    if config.output is not None and config.compares_promprune:
        with missing_extra("eval"):
            importlib.import_module("matplotlib.figure")  # fail now rather than after the evaluation
    with missing_extra("export"):
        import torch

        from promprune.export.evaluation.scores import scores
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with show_progress() as progress, tempfile.TemporaryDirectory() as scratch:
        asked = None if config.model is None else _ask_model(config, pictures, progress)
        packages = [*config.packages, *_export_packages(config, Path(scratch), progress)]
        runs = [] if asked is None else list(asked.runs)
        progress.announce(len(packages))
        runs += [_ask_package(package, pictures, config.max_new_tokens, progress) for package in packages]
    return _Results(pictures, runs, scores(runs, pictures), asked)


def _ask_model(config: EvalConfig, pictures: Sequence[Picture], progress: Progress) -> _Asked:
    from promprune.export.checkpoint.loading import load_checkpoint, read_constants
    from promprune.export.evaluation.model import TorchModel
    from promprune.export.evaluation.runs import ask_torch, conditions

    checkpoint = load_checkpoint(_name(config))
    subject = TorchModel(checkpoint)
    wanted = conditions(subject.num_tokens, config.kept_ratios, config.chosen_policies)
    if config.gallery is not None and not any(condition.policy == "promprune" for condition in wanted):
        raise ConfigError(
            f"received --gallery, but every ratio keeps all {subject.num_tokens} tokens", expected="a smaller one"
        )
    selection = ExportConfig().selection(read_constants(checkpoint.folder))
    progress.announce(1 + (config.gallery is not None))
    with progress.step(f"PyTorch, {len(wanted)} conditions", items=len(pictures)) as step:
        runs = ask_torch(subject, pictures, wanted, selection, max_new_tokens=config.max_new_tokens, step=step)
    pruned = _smallest(runs) if config.gallery is not None else None
    page = None if pruned is None else _page(subject, runs[0], pruned, pictures, config.gallery_limit, progress)
    return _Asked(runs, selection, page)


def _page(
    subject: TorchModel, whole: Run, pruned: Run, pictures: Sequence[Picture], limit: int, progress: Progress
) -> str:
    """Make the gallery while the model is loaded: it computes the views again, instead of storing them all."""
    from promprune.export.evaluation.gallery import gallery

    with progress.step("gallery", items=min(limit, len(pictures))) as step:

        def view(picture: Picture) -> Image:
            step.advance()
            return subject.view(picture.load())

        return gallery(whole, pruned, pictures, view=view, limit=limit)


def _smallest(runs: Sequence[Run]) -> Run | None:
    """Return the run in which PromPrune kept the fewest tokens."""
    ours = [run for run in runs if run.condition.policy == "promprune" and run.condition.by == "torch"]
    return min(ours, key=lambda run: run.condition.keep_tokens, default=None)


def _ask_package(folder: Path, pictures: Sequence[Picture], max_new_tokens: int, progress: Progress) -> Run:
    from promprune.export.evaluation.runs import ask_package

    with progress.step(f"runtime, {folder.name}", items=len(pictures)) as step:
        return ask_package(folder, pictures, max_new_tokens=max_new_tokens, step=step)


def _export_packages(config: EvalConfig, scratch: Path, progress: Progress) -> list[Path]:
    """Export the model in every requested dtype, with all tokens and at the smallest ratio."""
    if not config.runtime:
        return []
    from promprune.export.pipeline import export_package

    folders = []
    wanted = dict.fromkeys((1.0, min(config.kept_ratios)))
    progress.announce(len(config.runtime))
    for dtype in config.runtime:
        with progress.step(f"export, {dtype}", items=len(wanted)) as step:
            for ratio in wanted:
                folders.append(scratch / f"{dtype}-{ratio:g}")
                export_package(
                    ExportConfig(model=_name(config), output=folders[-1], ratio=ratio, dtype=dtype, verify=False)
                )
                step.advance()
    return folders


def _write(results: _Results, config: EvalConfig) -> None:
    if config.output is not None:
        _write_folder(results, config.output)
        console.print(f"wrote {plain(str(config.output))}", soft_wrap=True)
    page = results.model and results.model.page
    if config.gallery is not None and page:
        replace_file(config.gallery, page.encode())
        console.print(f"wrote {plain(str(config.gallery))}", soft_wrap=True)


def _write_folder(results: _Results, output: Path) -> None:
    from promprune.export.evaluation import report

    output.mkdir(parents=True, exist_ok=True)
    for name, rows in _tables(results.scores, results.pictures).items():
        replace_file(output / f"{name}.md", report.markdown(rows).encode())
    replace_file(output / "results.json", json.dumps(report.to_dict(results.scores), indent=1).encode())
    replace_file(output / "answers.jsonl", "".join(_answer_lines(results.runs, results.pictures)).encode())
    smallest = _smallest(results.runs)
    if results.model is None or smallest is None:
        return
    from promprune.export.evaluation.plots import plot_accuracy, plot_split

    plot_accuracy(results.scores, output / "accuracy.png")
    if all(len(selection.spectral_entropies) == 1 for selection in smallest.selections):  # one split each
        plot_split(smallest, results.model.selection, output / "split.png")


def _tables(found: Sequence[Score], pictures: Sequence[Picture]) -> dict[str, list[list[str]]]:
    from promprune.export.evaluation import report
    from promprune.export.evaluation.data import SPARSE_AND_DENSE
    from promprune.export.evaluation.scores import group_names

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


def _print_json(results: _Results, data: str, seconds: Mapping[str, float]) -> None:
    from promprune.export.evaluation.report import to_dict
    from promprune.export.evaluation.scores import majority_share

    majority = majority_share(results.pictures)
    print_json({"data": data, "majority": majority, "seconds": seconds, "runs": to_dict(results.scores)})


def _print(results: _Results) -> None:
    from rich.console import Console

    from promprune.export.evaluation.report import table_of
    from promprune.export.evaluation.scores import majority_share

    found, pictures = results.scores, results.pictures
    titles = {
        "overview": f"{found[0].asked} questions about {len(pictures)} images, percent and 95 % intervals",
        "by_group": "Accuracy by question, percent, fewest tokens",
        "comparisons": "PromPrune minus the others, percentage points of accuracy",
    }
    screen = Console(highlight=False)
    for name, rows in _tables(found, pictures).items():
        screen.print(table_of(rows, titles[name]))
    screen.print(f"always the most frequent answer to each type of question: {100 * majority_share(pictures):.1f} %")


if __name__ == "__main__":
    main()
