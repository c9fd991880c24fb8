"""The process that runs an untrusted package; see :mod:`promprune.runtime.untrusted`."""

from __future__ import annotations

import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from promprune.errors import PrompruneError, first_line
from promprune.runtime.pipeline import VisionLanguagePipeline
from promprune.runtime.untrusted import Answer, Failure, ImagePart, Reply, WireRequest

__all__ = ["main"]


def main(handle: str, memory_bytes: str, folder: str) -> None:
    """Load a package, and answer requests until the connection is closed.

    Args:
        handle: file descriptor of the connection.
        memory_bytes: limit of the address space.
        folder: the package.
    """
    _limit(int(memory_bytes))
    _end_with_parent()
    connection = Connection(int(handle))
    try:
        settings = msgspec.json.decode(connection.recv_bytes())
        pipeline = VisionLanguagePipeline.from_package(folder, **settings)
        _send(connection, Reply(manifest=pipeline.manifest, device=pipeline.device, notes=pipeline.notes))
    except Exception as error:
        _send(connection, Reply(failure=_failure(error)))
        return
    while True:
        try:
            request = msgspec.json.decode(connection.recv_bytes(), type=WireRequest)
            requests = [([_image(connection, part) for part in parts], prompt) for parts, prompt in request.requests]
        except (EOFError, OSError):
            return
        try:
            _answer(connection, pipeline, requests, request)
        except MemoryError:
            raise  # what is left may be incomplete: end, so that the next request gets a new process
        except Exception as error:
            _send(connection, Reply(failure=_failure(error)))


def _answer(connection: Connection, pipeline: VisionLanguagePipeline, requests: Any, request: WireRequest) -> None:
    if not request.streamed:
        results = pipeline.generate_batch(requests, **request.options)
    else:
        ((images, prompt),) = requests
        stream = pipeline.stream(images, prompt, **request.options)
        for text in stream:
            _send(connection, Reply(text=text))
        results = [stream.result]
    _send(connection, Reply(answers=tuple(map(Answer.of, results))))


def _image(connection: Connection, part: ImagePart) -> Any:
    content = connection.recv_bytes()
    return content if part.shape is None else np.frombuffer(content, np.uint8).reshape(part.shape)


def _failure(error: Exception) -> Failure:
    if isinstance(error, PrompruneError):
        return Failure(type(error).__name__, error.received, error.expected, error.fix)
    return Failure("WorkerError", f"the untrusted package failed ({type(error).__name__}: {first_line(error)})")


def _send(connection: Connection, reply: Reply) -> None:
    connection.send_bytes(msgspec.json.encode(reply))


def _limit(memory_bytes: int) -> None:
    """Limit the memory, and forbid to write files and core dumps."""
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _end_with_parent() -> None:
    """End this process soon after its parent has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
