"""Packages that are not trusted: the pipeline runs in a process of its own, with limits of memory and time.

The process gets requests and returns answers as JSON and plain bytes, never as pickles: whatever happens in it, the
caller reads data of known types. If it crashes, hangs or runs out of memory, the request ends with a
:class:`~promprune.errors.WorkerError`, and the next request starts a new process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
import numpy as np

from promprune import errors
from promprune.checks import config_from_options
from promprune.errors import BackendError, ConfigError, PrompruneError, WorkerError
from promprune.package.manifest import Manifest
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.result import Result, ResultStream, Timings
from promprune.runtime.engine.sampling import FinishReason
from promprune.runtime.images.encoded import TokenGrid, TokenSelection
from promprune.runtime.images.encoder import Images, ImageSource, as_image_list
from promprune.runtime.images.preprocess import load_image, read_image_file
from promprune.runtime.sessions.config import RuntimeConfig

if TYPE_CHECKING:
    from promprune.runtime.pipeline import Prompt

__all__ = ["Failure", "ImagePart", "Reply", "Selection", "UntrustedPipeline", "UntrustedStream", "WireRequest"]

_MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
_GRACE_S: Final = 1.0  # for the worker to notice a deadline by itself
_LIBRARIES_BYTES: Final = 3 * 2**30  # address space of Python and its libraries, with their threads


class ImagePart(msgspec.Struct, frozen=True):
    """An image in a request: the size of its bytes, which follow, and its shape if they are pixels."""

    size_bytes: int
    shape: tuple[int, int, int] | None = None


class WireRequest(msgspec.Struct, frozen=True):
    """What the worker is asked to answer; the bytes of the images follow."""

    requests: tuple[tuple[tuple[ImagePart, ...], Any], ...]
    options: dict[str, Any]
    streamed: bool


class Selection(msgspec.Struct, frozen=True):
    """A :class:`TokenSelection` as plain numbers."""

    grids: tuple[TokenGrid, ...]
    token_indices: list[int]
    saliency_mask: list[bool] | None
    spectral_entropies: tuple[float, ...]
    policy: str

    @classmethod
    def of(cls, selection: TokenSelection) -> Self:
        """Describe a selection."""
        plain = selection.to_dict()
        return msgspec.convert({name: plain[name] for name in cls.__struct_fields__}, cls)

    def restore(self) -> TokenSelection:
        """Return the selection."""
        mask = None if self.saliency_mask is None else np.array(self.saliency_mask, np.bool_)
        indices = np.array(self.token_indices, np.int64)
        return TokenSelection(self.grids, indices, mask, self.spectral_entropies, self.policy)  # type: ignore[arg-type]


class Answer(msgspec.Struct, frozen=True):
    """A :class:`Result` as plain values."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    selection: tuple[Selection, ...]

    @classmethod
    def of(cls, result: Result) -> Self:
        """Describe a result."""
        selection = tuple(map(Selection.of, result.selection))
        return cls(result.text, result.token_ids, result.finish_reason, result.timings, selection)

    def restore(self) -> Result:
        """Return the result."""
        selection = tuple(one.restore() for one in self.selection)
        return Result(self.text, self.token_ids, self.finish_reason, self.timings, selection)


class Failure(msgspec.Struct, frozen=True):
    """An error that was raised on purpose; ``kind`` is the name of its class in :mod:`promprune.errors`."""

    kind: str
    received: str
    expected: str = ""
    fix: str = ""

    def restore(self) -> PrompruneError:
        """Return the error."""
        kind = getattr(errors, self.kind, None) if self.kind in errors.__all__ else None
        if not isinstance(kind, type) or not issubclass(kind, PrompruneError):
            kind = WorkerError
        return kind(self.received[:2000], expected=self.expected[:2000], fix=self.fix[:2000])


class Reply(msgspec.Struct, frozen=True):
    """What the worker sends: that it is ready, a piece of text, the answers, or an error."""

    manifest: Manifest | None = None
    device: str = ""
    notes: tuple[str, ...] = ()
    text: str | None = None
    answers: tuple[Answer, ...] | None = None
    failure: Failure | None = None


class _Worker:
    """One process with a loaded package."""

    def __init__(self, folder: Path, config: RuntimeConfig) -> None:
        ours, theirs = socket.socketpair()
        settings = {**asdict(config), "untrusted": False, "provider": "cpu"}
        command = [sys.executable, "-P", "-m", "promprune.runtime.worker", str(theirs.fileno())]
        self.connection = Connection(ours.detach())
        self._why = ""
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(_memory_limit(folder, config)), str(folder.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            with self.time_limit(config.worker_timeout_s):
                self.send(msgspec.json.encode(settings))
                self.ready = self.receive()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """End the process if the block takes longer, which ends all waiting for it."""
        timer = threading.Timer(seconds, self.kill, [f"did not answer within {seconds:g} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def send(self, content: bytes) -> None:
        """Send bytes.

        Raises:
            WorkerError: the process has ended.
        """
        try:
            self.connection.send_bytes(content)
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Reply:
        """Return the next reply.

        Raises:
            PrompruneError: the reply is an error.
            WorkerError: the process has ended, or what it sent is no reply.
        """
        try:
            reply = msgspec.json.decode(self.connection.recv_bytes(_MAX_REPLY_BYTES), type=Reply)
        except (OSError, EOFError, MemoryError, msgspec.DecodeError, ValueError, PrompruneError) as error:
            raise self._ended() from error
        if reply.failure is not None:
            raise reply.failure.restore()
        return reply

    def _ended(self) -> WorkerError:
        self.kill("sent something else than an answer")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        code = self._process.returncode
        ended = self._why if code is None or code == -9 else ""
        reason = ended or (f"was ended by signal {-code}" if code and code < 0 else f"ended with code {code}")
        return WorkerError(
            f"the process of the untrusted package {reason}",
            fix="do not use this package, or allow it more with worker_memory_mb or worker_timeout_s",
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None and not self.connection.closed

    def kill(self, why: str) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._why = self._why or why
            self._process.kill()

    def close(self) -> None:
        """End the process, and wait for it."""
        self.kill("was closed")
        self._process.wait()
        self.connection.close()


class UntrustedPipeline:
    """The answers of a :class:`VisionLanguagePipeline`, from a process with limits.

    ``generate``, ``generate_batch`` and ``stream`` are those of the pipeline; there is no ``chat`` and no ``encoder``.
    Thread-safe: every request that begins while others are answered starts another process.

    Attributes:
        manifest: the package's manifest.
        device: ``"CPU"``.
        notes: see :attr:`VisionLanguagePipeline.notes`.
    """

    def __init__(self, folder: str | Path, config: RuntimeConfig) -> None:
        if os.name != "posix":
            raise ConfigError("received untrusted = True", expected="Linux or macOS, which can limit a process")
        self._folder, self._config = Path(folder), config
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False
        with self._using() as worker:
            ready = worker.ready
        if ready.manifest is None:
            raise WorkerError("the process of the untrusted package sent no manifest")
        self.manifest, self.device, self.notes = ready.manifest, ready.device, ready.notes

    def generate(self, images: Images = (), prompt: Prompt = "", **options: Any) -> Result:
        """Answer one prompt; see :meth:`VisionLanguagePipeline.generate`.

        Raises:
            WorkerError: the process crashed, ran out of memory, or did not answer in time.
        """
        return self.generate_batch([(images, prompt)], **options)[0]

    def generate_batch(self, requests: Sequence[tuple[Images, Prompt]], **options: Any) -> list[Result]:
        """Answer several prompts; see :meth:`VisionLanguagePipeline.generate_batch`. Errors as in :meth:`generate`."""
        config = config_from_options(GenerationConfig, options)
        with self._using() as worker, worker.time_limit(self._seconds(config)):
            self._send(worker, requests, config, streamed=False)
            answers = worker.receive().answers
        if answers is None or len(answers) != len(requests):
            raise WorkerError("the process of the untrusted package sent other answers than those asked for")
        return [answer.restore() for answer in answers]

    def stream(self, images: Images = (), prompt: Prompt = "", **options: Any) -> UntrustedStream:
        """Answer one prompt, with the text while it is generated.

        Errors as in :meth:`generate`, while the stream is read.
        """
        config = config_from_options(GenerationConfig, options)
        return UntrustedStream(self._stream(images, prompt, config))

    def _stream(self, images: Images, prompt: Prompt, config: GenerationConfig) -> Iterator[str | Result]:
        with self._using() as worker, worker.time_limit(self._seconds(config)):
            self._send(worker, [(images, prompt)], config, streamed=True)
            while (reply := worker.receive()).answers is None:
                if reply.text:
                    yield reply.text
        yield from (answer.restore() for answer in reply.answers[:1])

    @contextmanager
    def _using(self) -> Iterator[_Worker]:
        """Yield a worker that nobody else uses; only after a request that it completed, it is used again."""
        with self._lock:
            if self._closed:
                raise BackendError("the package was closed", fix="load it again")
            worker = self._idle.pop() if self._idle else None
        if worker is None or not worker.is_alive:
            worker = _Worker(self._folder, self._config)
        reusable = False
        try:
            yield worker
            reusable = True
        except WorkerError:
            raise
        except PrompruneError:
            reusable = True  # it refused the request, and waits for the next one
            raise
        finally:
            with self._lock:
                keep = reusable and worker.is_alive and not self._idle and not self._closed
                if keep:
                    self._idle.append(worker)
            if not keep:
                worker.close()

    def _send(
        self, worker: _Worker, requests: Sequence[tuple[Images, Prompt]], config: GenerationConfig, *, streamed: bool
    ) -> None:
        parts, contents = [], []
        for images, prompt in requests:
            pictures = [self._image(image) for image in as_image_list(images)]
            parts.append((tuple(part for part, _ in pictures), prompt))
            contents += [content for _, content in pictures]
        try:
            message = msgspec.json.encode(WireRequest(tuple(parts), asdict(config), streamed))
        except (TypeError, ValueError, UnicodeEncodeError) as error:
            raise errors.PromptError(f"the prompt cannot be sent ({error})", expected="texts and lists") from error
        for content in (message, *contents):
            worker.send(content)

    def _image(self, image: ImageSource) -> tuple[ImagePart, bytes]:
        """Return an image as the bytes of its file, which the worker decodes; or as pixels, if it is decoded here."""
        most = self._config.max_image_pixels
        if isinstance(image, (bytes, bytearray, memoryview)):
            content = bytes(image)
        elif isinstance(image, (str, Path)):
            content = read_image_file(image, max_pixels=most)
        else:
            pixels = np.asarray(load_image(image, max_pixels=most))  # type: ignore[arg-type]
            return ImagePart(pixels.nbytes, pixels.shape), pixels.tobytes()
        return ImagePart(len(content)), content

    def _seconds(self, config: GenerationConfig) -> float:
        return self._config.worker_timeout_s if config.timeout_s is None else config.timeout_s + _GRACE_S

    def close(self) -> None:
        """End the idle process; using the pipeline afterwards raises a BackendError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class UntrustedStream(ResultStream):
    """The text of one answer while it is generated, then ``result``; see :class:`AnswerStream`."""

    def __init__(self, pieces: Iterator[str | Result]) -> None:
        self._pieces = pieces

    def __next__(self) -> str:
        for piece in self._pieces:
            if isinstance(piece, str):
                return piece
            self._result = piece
        raise StopIteration

    def close(self) -> None:
        """Stop generating; ends the process, unless the answer is complete."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def _memory_limit(folder: Path, config: RuntimeConfig) -> int:
    """Return the address space of the process, in bytes: by default three times the files' blocks, plus libraries."""
    if config.worker_memory_mb is not None:
        return config.worker_memory_mb * 2**20
    used = 0
    with suppress(OSError):
        used = sum(os.lstat(path).st_blocks * 512 for path in folder.rglob("*"))
    return 3 * used + _LIBRARIES_BYTES
