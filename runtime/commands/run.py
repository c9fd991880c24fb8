"""``promprune-run``: answer a question about images with an exported package."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from promprune.errors import PrompruneError
from promprune.files import check_output_file, output_errors, replace_file
from promprune.package.describe import describe_selection
from promprune.runtime import (
    AnswerStream,
    Chat,
    GenerationConfig,
    ImageEncoder,
    Result,
    RuntimeConfig,
    TokenSelection,
    VisionLanguagePipeline,
    draw_kept_tokens,
)
from promprune.runtime.commands.options import (
    Backend,
    CheckWeights,
    CudaGraphs,
    MaxImagePixels,
    NumThreads,
    PackageFolder,
    PrefillChunk,
    Provider,
    Version,
    integer_option,
    number_option,
)
from promprune.terminal import (
    EXIT_REFUSED,
    console,
    decode_argument,
    plain,
    print_json,
    read_stdin,
    run_command,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["main", "run"]

_PICTURE_FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters, which a terminal would execute


def run(
    package: PackageFolder,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Image file. Repeat the option for several images.", metavar="FILE"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; - reads it from stdin.", metavar="TEXT")
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="Hold a conversation, one question per line. Each image is encoded once."),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        integer_option(
            "Maximum length of the answer, in tokens.",
            show_default=f"what fits in the context, at most {GenerationConfig.DEFAULT_NEW_TOKENS}",
        ),
    ] = GenerationConfig.max_new_tokens,
    temperature: Annotated[
        float, number_option("Sampling temperature; 0 always chooses the most likely token.")
    ] = GenerationConfig.temperature,
    top_p: Annotated[
        float,
        number_option(
            "Sample from the most likely tokens whose total probability reaches this; 1 disables it.",
            metavar="FRACTION",
        ),
    ] = GenerationConfig.top_p,
    top_k: Annotated[
        int, integer_option("Sample from this many most likely tokens; 0 disables it.")
    ] = GenerationConfig.top_k,
    repetition_penalty: Annotated[
        float,
        number_option(
            "A value above 1 makes tokens that already occurred less likely; 1 disables it.", metavar="FACTOR"
        ),
    ] = GenerationConfig.repetition_penalty,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer. Repeat the option for several texts.", metavar="TEXT"),
    ] = None,
    seed: Annotated[
        int | None, integer_option("Seed that makes sampling reproducible.", metavar="NUMBER")
    ] = GenerationConfig.seed,
    timeout: Annotated[
        float | None,
        number_option(
            "Longest time for an answer; a longer one is an error.", metavar="SECONDS", show_default="no limit"
        ),
    ] = GenerationConfig.timeout_s,
    show_tokens: Annotated[
        Path | None,
        typer.Option(help="Draw the kept tokens over the image; one picture per image.", metavar="OUT.png"),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print the selection and the timings on stderr.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout instead of the text.")
    ] = False,
    backend: Backend = RuntimeConfig.backend,
    provider: Provider = RuntimeConfig.provider,
    num_threads: NumThreads = RuntimeConfig.num_threads,
    prefill_chunk: PrefillChunk = RuntimeConfig.prefill_chunk,
    cuda_graphs: CudaGraphs = RuntimeConfig.cuda_graphs,
    max_image_pixels: MaxImagePixels = RuntimeConfig.max_image_pixels,
    check_weights: CheckWeights = RuntimeConfig.check_weights,
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="Run the package in a process of its own, with limits of memory and time."),
    ] = RuntimeConfig.untrusted,
    version: Version = False,
) -> None:
    """Answer a question about images with an exported package.

    The answer is written to stdout as it is generated; everything else goes to stderr.

    Examples:

      promprune-run llava-0.12 --image photo.jpg --prompt "What is on the table?"

      promprune-run llava-0.12 -i photo.jpg -p "How many dogs?" --show-tokens kept.png --stats

      promprune-run llava-0.12 -i before.png -i after.png -p "What changed?" --json

      promprune-run llava-0.12 -i photo.jpg --show-tokens kept.png     (no question: only draws the kept tokens)
    """
    asked = _Asked(
        package=package,
        images=image or [],
        question=_question(prompt, interactive=interactive, as_json=as_json, only_show=show_tokens is not None),
        generation=GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
            timeout_s=timeout,
        ),
        loading=RuntimeConfig(
            backend=backend,
            provider=provider,  # type: ignore[arg-type]  # RuntimeConfig checks it
            num_threads=num_threads,
            check_weights=check_weights,
            cuda_graphs=cuda_graphs,
            prefill_chunk=prefill_chunk,
            max_image_pixels=max_image_pixels,
            untrusted=untrusted,
        ),
        show_tokens=show_tokens,
        stats=stats,
        as_json=as_json,
    )
    if untrusted and (interactive or show_tokens is not None):
        raise typer.BadParameter("received --untrusted with --interactive or --show-tokens; expected one of them")
    if show_tokens is not None:
        _check_pictures(show_tokens, len(asked.images), interactive=interactive)
    if interactive:
        _converse(asked)
    elif asked.question is None:
        _show(asked)
    else:
        _answer(asked, asked.question)


def main() -> None:
    """Entry point of ``promprune-run``."""
    run_command(run)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The command line, checked before a large model is loaded."""

    package: Path
    images: list[Path]
    question: str | None
    generation: GenerationConfig
    loading: RuntimeConfig
    show_tokens: Path | None
    stats: bool
    as_json: bool

    def load(self) -> VisionLanguagePipeline:
        pipeline = VisionLanguagePipeline.from_package(self.package, **vars(self.loading))
        if console.is_terminal and not self.as_json:
            console.print(f"[dim]on {pipeline.device}; {describe_selection(pipeline.manifest)}[/]", soft_wrap=True)
        return pipeline

    def report(self, device: str) -> dict[str, Any]:
        """Return the part that all JSON reports share."""
        return {"package": str(self.package), "images": [str(path) for path in self.images], "device": device}


def _answer(asked: _Asked, question: str) -> None:
    """Answer one question."""
    started = time.perf_counter()
    with asked.load() as pipeline:
        load_ms = (time.perf_counter() - started) * 1000
        answer = pipeline.stream(list(asked.images), question, **vars(asked.generation))
        if not asked.images and not asked.as_json:
            console.print("[dim]no --image: answering from the text alone[/]")
        result = answer.result if asked.as_json else _print_answer(answer)
        if asked.show_tokens is not None:
            _draw(pipeline.encoder, asked, result.selection)
        if asked.as_json:
            model = {"model": pipeline.manifest.source.model, "load_ms": round(load_ms, 3)}
            print_json({**result.to_dict(), **asked.report(pipeline.device), **model})
        elif asked.stats:
            _print_stats(pipeline.device, result, load_ms)
            for note in pipeline.notes:
                console.print(f"[dim]{plain(note)}[/]", soft_wrap=True)


def _question(prompt: str | None, *, interactive: bool, as_json: bool, only_show: bool) -> str | None:
    if interactive and as_json:
        raise typer.BadParameter("received --json with --interactive; expected one of them")
    if prompt is None and not interactive and not only_show:
        raise typer.BadParameter("received no --prompt; expected --prompt TEXT, --interactive or --show-tokens OUT.png")
    if prompt != "-":
        return None if prompt is None else decode_argument(prompt)
    return read_stdin().rstrip("\n")


def _print_answer(answer: AnswerStream) -> Result:
    """Write the answer to stdout while it is generated, and return the result."""
    begun = False
    for text in answer:
        piece = text if begun else text.lstrip()
        begun = begun or bool(piece)
        _write(piece)
    _write("\n")
    return answer.result


def _write(text: str) -> None:
    """Write to stdout without buffering; control characters, and those that its encoding lacks, are replaced."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _converse(asked: _Asked) -> None:
    """Answer questions until the end of the input; after an error, the conversation continues."""
    question, pending, failed = asked.question, list(asked.images), False
    with asked.load() as pipeline:
        chat = pipeline.chat()
        console.print("[dim]one question per line; /image FILE adds an image; an empty line or Ctrl-D ends[/]")
        while line := question if question is not None else _read_line():
            question = None
            if line.startswith("/image "):
                pending.append(Path(line.removeprefix("/image ").strip()))
                continue
            failed |= not _turn(chat, line, pending, asked)
            pending = []
    if failed and not sys.stdin.isatty():
        raise typer.Exit(EXIT_REFUSED)


def _turn(chat: Chat, question: str, images: list[Path], asked: _Asked) -> bool:
    """Answer one question of a conversation; return whether it was answered."""
    try:
        result = _print_answer(chat.stream(question, list(images), **vars(asked.generation)))
    except PrompruneError as error:
        console.print(f"[bold red]error:[/] {plain(str(error))}", soft_wrap=True)
        return False
    except KeyboardInterrupt:  # during an answer; at the prompt it ends the command
        _write("\n")
        return False
    if asked.stats:
        _print_stats(None, result, None)
    return True


def _read_line() -> str:
    if sys.stdin.isatty():
        console.print("[bold]> [/]", end="")
    return read_stdin(one_line=True).strip()


def _print_stats(device: str | None, result: Result, load_ms: float | None) -> None:
    timings = result.timings
    rate = timings.decode_tokens_per_s
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for number, selection in enumerate(result.selection, start=1):
        name = "visual tokens" if len(result.selection) == 1 else f"visual tokens, image {number}"
        table.add_row(name, f"{selection.keep_tokens} of {selection.num_tokens}", _describe(selection))
    if load_ms is not None:
        table.add_row("load", f"{load_ms:.1f} ms", f"on {device}")
    table.add_row("preprocess", f"{timings.preprocess_ms + timings.prompt_ms:.1f} ms", "images and prompt")
    encoded = f"{timings.encoded_images} of {len(result.selection)} images encoded now"
    table.add_row("vision + selection", f"{timings.vision_ms:.1f} ms", encoded)
    table.add_row("splice", f"{timings.splice_ms:.1f} ms", "")
    reused = f", {timings.reused_tokens} of them reused" if timings.reused_tokens else ""
    table.add_row("prefill", f"{timings.prefill_ms:.1f} ms", f"{timings.prompt_tokens} tokens{reused}")
    table.add_row("first token", f"{timings.first_token_ms:.1f} ms", "after the package was loaded")
    table.add_row("decode", f"{timings.decode_ms:.1f} ms", "" if rate is None else f"{rate:.1f} tokens/s")
    table.add_row("answer", f"{timings.new_tokens} tokens", f"ended by {result.finish_reason}")
    table.add_row("KV cache", f"{timings.kv_cache_bytes / 1e6:.2f} MB", "")
    console.print(table)


def _describe(selection: TokenSelection) -> str:
    if not selection.ran:
        return "no selection in this package"
    saliency = selection.saliency_count or 0
    return (
        f"{saliency} for saliency, {selection.keep_tokens - saliency} for coverage, "
        f"spectral entropy {selection.spectral_entropy:.3f}"
    )


def _check_pictures(output: Path, num_images: int, *, interactive: bool) -> None:
    """Refuse an unusable output for pictures before anything is computed."""
    if num_images == 0 or interactive:
        raise typer.BadParameter("received --show-tokens without --image, or with --interactive; expected an image")
    check_output_file(output, "--show-tokens", suffixes=tuple(_PICTURE_FORMATS))


def _show(asked: _Asked) -> None:
    """Draw the kept tokens of images without a question."""
    with ImageEncoder.from_package(asked.package, **vars(asked.loading)) as encoder:
        alone = len(asked.images) == 1
        selections = [encoder.encode_image(path, alone=alone).selection for path in asked.images]
        _draw(encoder, asked, selections)
    if asked.as_json:
        print_json({**asked.report(encoder.device), "selection": [selection.to_dict() for selection in selections]})
        return
    for path, selection in zip(asked.images, selections, strict=True):
        kept = f"{selection.keep_tokens} of {selection.num_tokens} visual tokens"
        console.print(f"{plain(path.name)}: {kept}, {_describe(selection)}", soft_wrap=True)


def _draw(encoder: ImageEncoder, asked: _Asked, selections: Sequence[TokenSelection]) -> None:
    """Write one picture per image, if pictures were asked for: OUT.png, OUT-2.png, ..."""
    output = asked.show_tokens
    if output is None:
        return
    for number, (path, selection) in enumerate(zip(asked.images, selections, strict=True), start=1):
        target = output if number == 1 else output.with_stem(f"{output.stem}-{number}")
        view = encoder.view(path, alone=len(selections) == 1)
        _save(draw_kept_tokens(view, selection), target)
        if not asked.as_json:
            console.print(f"[dim]kept tokens of {plain(path.name)}: {plain(str(target))}[/]", soft_wrap=True)


def _save(picture: Image, target: Path) -> None:
    """Write a picture atomically."""
    content = io.BytesIO()
    picture.save(content, format=_PICTURE_FORMATS[target.suffix.lower()])
    with output_errors(target, fix="choose another name"):
        replace_file(target, content.getvalue())


if __name__ == "__main__":
    main()
