"""Errors of the API, in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from promprune.errors import ConfigError, ImageError, PrompruneError, PromptError
from promprune.runtime.server.schema import ErrorBody, ErrorDetail

__all__ = ["ApiError", "api_error", "internal_error", "too_many_requests"]

# Errors that the request caused -> their code.
_REFUSED: Final = {ImageError: "invalid_image", PromptError: "invalid_prompt", ConfigError: "invalid_value"}
_MAX_CHARACTERS: Final = 1000  # of a message, which may quote the request


class ApiError(Exception):
    """An answer other than the one that was asked for.

    Args:
        status: HTTP status.
        message: one line for the developer who called.
        kind: OpenAI's ``type``.
        code: what went wrong, for programs.
        param: the field of the request that is to blame.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message = message if len(message) <= _MAX_CHARACTERS else f"{message[:_MAX_CHARACTERS]}..."
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    @property
    def code(self) -> str | None:
        """What went wrong, for programs."""
        return self.body.error.code


def api_error(error: Exception, param: str | None = "messages") -> ApiError:
    """Return the API's error for an exception that ended a request."""
    if isinstance(error, ApiError):
        return error
    for kind, code in _REFUSED.items():
        if isinstance(error, kind):
            return ApiError(400, str(error), code=code, param=param)
    return internal_error(error)


def internal_error(error: BaseException) -> ApiError:
    """Return the API's error for a failure of the server; only errors made for users are shown."""
    message = str(error) if isinstance(error, PrompruneError) else "the server failed; its log has the reason"
    return ApiError(500, message, kind="server_error", code="internal_error")


def too_many_requests(limit: int) -> ApiError:
    """Return the error of a request for which the queue has no place."""
    return ApiError(
        429,
        f"the server works on {limit} requests already; try again later",
        kind="rate_limit_error",
        code="queue_full",
        headers={"retry-after": "1"},
    )
