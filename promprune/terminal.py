"""What all commands share: starting, reporting errors and progress, and printing tables."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from promprune._version import __version__
from promprune.errors import ConfigError, MissingDependencyError, PrompruneError, one_line
from promprune.progress import Progress, Step

__all__ = [
    "EXIT_REFUSED",
    "EXIT_USAGE",
    "console",
    "decode_argument",
    "missing_extra",
    "missing_package",
    "option_type",
    "plain",
    "print_json",
    "read_stdin",
    "run_command",
    "show_progress",
    "version_callback",
]

EXIT_REFUSED: Final = 1  # refused, failed, or failed verification
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

# The control characters that JSON does not escape, and the bytes of names that are not UTF-8.
_UNESCAPED: Final = re.compile(r"[\x7f-\x9f\ud800-\udfff]")
_MAX_INPUT_BYTES: Final = 8 * 1024 * 1024

# A width of 0, which some terminals report before they are drawn, would cut every line to nothing.
if os.environ.get("COLUMNS") == "0":
    del os.environ["COLUMNS"]

# Progress and tables go to stderr; stdout carries the answer, or the JSON.
console = Console(stderr=True, highlight=False)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line of stdout, with all control characters escaped."""
    line = json.dumps(content, ensure_ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"))
    sys.stdout.write(_UNESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n")
    sys.stdout.flush()


def read_stdin(*, one_line: bool = False) -> str:
    """Return the text on stdin, or its next line, which is empty at the end; it is UTF-8 in every locale.

    Raises:
        ConfigError: it is closed, not UTF-8, or very long.
    """
    stream: Any = getattr(sys.stdin, "buffer", sys.stdin)
    try:
        content = stream.readline(_MAX_INPUT_BYTES + 1) if one_line else stream.read(_MAX_INPUT_BYTES + 1)
        if len(content) > _MAX_INPUT_BYTES:
            raise ConfigError("received a very long text on stdin", expected=f"at most {_MAX_INPUT_BYTES} bytes")
        return content if isinstance(content, str) else content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text on stdin is not text ({error})", expected="UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError("stdin is closed", expected="an open stdin") from error


def decode_argument(text: str) -> str:
    """Return a text of the command line as UTF-8, whatever the locale; unchanged if it is not."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


class _Closed(io.TextIOBase):
    """Takes the place of a standard stream that was closed when the process began."""

    encoding = "utf-8"

    def read(self, size: int | None = -1) -> str:
        raise OSError(errno.EBADF, "is closed", "stdin")

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        raise OSError(errno.EBADF, "is closed", "stdin")

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "is closed", "stdout")


def _open_standard_streams() -> None:
    """Let no other file become stdin, stdout or stderr, and give every stream that was closed an object."""
    with contextlib.suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    if sys.stdin is None:
        sys.stdin = _Closed()
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def run_command(
    command: Callable[..., None], *, name: str | None = None, arguments: list[str] | None = None
) -> NoReturn:
    """Run one function as a command line program, and exit.

    ``name`` and ``arguments`` are those of the process unless given.

    Exit codes: 0 done; 1 refused, failed, or failed verification; 2 wrong usage; 130 interrupted. Every error that a
    user can cause is reported as one line on stderr.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command()(command)
    signal.signal(signal.SIGTERM, _terminate)
    _open_standard_streams()
    try:
        exit_code = app(arguments, prog_name=name, standalone_mode=False)
    except PrompruneError as error:
        _fail(str(error), EXIT_REFUSED)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_REFUSED)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", EXIT_REFUSED)
    except MemoryError:
        _fail("out of memory; expected more free memory; use a smaller model or fewer images at a time", EXIT_REFUSED)
    except Exception as error:
        if type(error).__name__ == "Abort":  # Ctrl-C at a prompt
            _fail("interrupted", EXIT_INTERRUPTED)
        if not hasattr(error, "format_message"):  # not a usage error of the command line library
            raise
        _fail(f"{error.format_message().rstrip('.')}; see --help", EXIT_USAGE)
    if exit_code == EXIT_INTERRUPTED:  # Ctrl-C: the command line library returns its own exit code for it
        _fail("interrupted", EXIT_INTERRUPTED)
    sys.exit(exit_code if isinstance(exit_code, int) else 0)


def option_type(convert: Callable[[str], Any], expected: str) -> Callable[[Any], Any]:
    """Make a parser for an option that says what was received and what was expected."""

    def parse(value: Any) -> Any:
        try:
            return convert(value)
        except ValueError as error:
            raise typer.BadParameter(f"received {value!r}; expected {expected}") from error

    return parse


@contextlib.contextmanager
def missing_extra(extra: str) -> Iterator[None]:
    """Turn a failed import of a missing package into an error with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("promprune"):
            raise
        raise MissingDependencyError(
            f"this command needs {error.name}, which is not installed", fix=f"pip install 'promprune[{extra}]'"
        ) from error


@contextlib.contextmanager
def missing_package(distribution: str, *modules: str) -> Iterator[None]:
    """Turn a failed import of one of ``modules`` into an error with the command that installs them."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise MissingDependencyError(
            f"this needs {error.name}, which is not installed", fix=f"pip install {distribution}"
        ) from error


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """Show progress on stderr: a bar over all steps, one for the running step, and a line for each finished step."""
    columns = (SpinnerColumn(), TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn())
    phase = TextColumn("[dim]{task.fields[phase]}")
    with Bars(*columns, TimeElapsedColumn(), phase, console=console, transient=True) as bars:
        yield _RichProgress(bars)


class _RichProgress:
    """The steps of a command."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._announced = 0
        self._all = bars.add_task("", total=None, phase="")

    def announce(self, steps: int) -> None:
        self._announced += steps
        self._bars.update(self._all, total=self._announced)

    @contextlib.contextmanager
    def step(self, description: str, *, items: int | None = None) -> Iterator[Step]:
        self._bars.update(self._all, description=plain(description))
        running = self._bars.add_task("", total=items, visible=items is not None, phase="")
        started = time.perf_counter()
        try:
            yield _RichStep(self._bars, running)
        finally:
            self._bars.remove_task(running)
        self._bars.advance(self._all)
        self._bars.print(f"[green]done[/]  {plain(description):<36} {time.perf_counter() - started:6.1f} s")


class _RichStep:
    """The bar of the running step; hidden until the step reports something."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, items: int = 1) -> None:
        self._bars.advance(self._task, items)

    def report(self, fraction: float, phase: str) -> None:
        self._bars.update(self._task, total=100, completed=100 * fraction, phase=plain(phase), visible=True)


def plain(text: str) -> str:
    """Return text on one line for :data:`console`, with rich markup and control characters escaped."""
    return escape(one_line(text))


def version_callback(value: bool) -> None:
    """Print the version and stop."""
    if value:
        sys.stdout.write(f"promprune {__version__}\n")
        raise typer.Exit


def _terminate(signum: int, frame: object) -> NoReturn:
    """Unwind as on Ctrl-C, so that half-written outputs are removed."""
    del frame
    sys.exit(128 + signum)


def _fail(message: str, exit_code: int) -> NoReturn:
    console.print(f"[bold red]error:[/] {plain(message)}", soft_wrap=True)
    sys.exit(exit_code)
