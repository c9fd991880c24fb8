"""Every error that promprune raises on purpose.

::

    PrompruneError
    ├── ConfigError             an option or argument is out of range, or contradicts another
    ├── ModelError              the source checkpoint cannot be read
    │   └── UnsupportedModelError   it can be read, but this family or feature is not exported
    ├── PackageError            an exported package is missing, damaged, or has another schema version
    ├── ImageError              an image cannot be read
    ├── PromptError             a prompt cannot be built, or does not fit the context
    ├── VerificationError       an exported graph disagrees with its source
    ├── DeadlineError           an answer took longer than it was allowed to
    ├── BackendError            an execution backend cannot be loaded, or fails while running
    │   └── WorkerError             the process of an untrusted package crashed, hung, or ran out of memory
    ├── MissingDependencyError  an optional extra is not installed
    └── OutputError             an output cannot be written to the requested place

Every message is one line that says what was received, what was expected, and what to do; it contains no control
characters. The command line prints it without a traceback and exits with 1.
"""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = [
    "BackendError",
    "ConfigError",
    "DeadlineError",
    "ImageError",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "PackageError",
    "PrompruneError",
    "PromptError",
    "UnsupportedModelError",
    "VerificationError",
    "WorkerError",
]

# Control characters, which a terminal would execute, and the bytes of names that are not UTF-8.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class PrompruneError(Exception):
    """Base of every error raised on purpose.

    Args:
        received: what was found, in words that a user can match with what they typed.
        expected: what would have been accepted.
        fix: what to do next; a command if there is one.
    """

    def __init__(self, received: str, *, expected: str = "", fix: str = "") -> None:
        parts = [received, f"expected {expected}" if expected else "", fix]
        super().__init__("; ".join(one_line(part) for part in parts if part))
        self.received = received
        self.expected = expected
        self.fix = fix


class ConfigError(PrompruneError):
    """An option or argument is out of range, or contradicts another."""


class ModelError(PrompruneError):
    """The source checkpoint cannot be read."""


class UnsupportedModelError(ModelError):
    """The checkpoint can be read, but its family, or a feature it uses, is not exported."""


class PackageError(PrompruneError):
    """An exported package is missing, damaged, or has another schema version."""


class ImageError(PrompruneError):
    """An image cannot be read."""


class PromptError(PrompruneError):
    """A prompt cannot be built, or does not fit the context."""


class DeadlineError(PrompruneError):
    """An answer took longer than ``timeout_s``."""


class VerificationError(PrompruneError):
    """An exported graph disagrees with the model it was made from.

    Args:
        received: what was found.
        checks: every check that was made, passed or not (:class:`promprune.package.manifest.CheckRecord`).
    """

    def __init__(self, received: str, *, expected: str = "", fix: str = "", checks: tuple[Any, ...] = ()) -> None:
        super().__init__(received, expected=expected, fix=fix)
        self.checks = checks


class BackendError(PrompruneError):
    """An execution backend cannot be loaded, or fails while running."""


class WorkerError(BackendError):
    """The process of an untrusted package crashed, ran out of memory, or did not answer in time."""


class MissingDependencyError(PrompruneError):
    """An optional extra is not installed; the message is the install command."""


class OutputError(PrompruneError):
    """An output cannot be written to the requested place."""


def one_line(text: str) -> str:
    """Return text on one line, with control characters replaced: file names may contain any character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message; the error's class name if the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
