"""Middleware: who may call the server, and what is logged of every call."""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError, internal_error
from promprune.runtime.server.logs import log_event, log_failure
from promprune.runtime.server.metrics import Metrics
from promprune.runtime.server.responses import error_response

__all__ = ["AccessLog", "Guard"]

_MAX_HEADERS: Final = 100


class AccessLog:
    """Gives every request an id, logs it without its content, counts it, and turns a failure into an error response.

    Args:
        app: the application.
        metrics: where responses are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, request_id, status = time.perf_counter(), f"req_{uuid.uuid4().hex}", 0
        scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            log_failure(error)
            if not status:
                await error_response(internal_error(RuntimeError()))(scope, receive, send_with_headers)
        finally:
            self._metrics.note_response(status or 499)
            duration_ms = round((time.perf_counter() - started) * 1000, 1)
            fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
            log_event("request", **fields, status=status or 499, duration_ms=duration_ms, **_describe(scope))


def _describe(scope: Scope) -> dict[str, Any]:
    """Return what the log says of a chat: numbers and names only."""
    found: dict[str, Any] = {}
    error, answer = (scope["state"].get(name) for name in ("error", "answer"))
    if error is not None:
        found["error"] = error.code
    if answer is not None:
        found |= answer.describe()
    return found


class Guard:
    """Refuses calls to other hosts, calls without an API key, and requests whose length is ambiguous.

    Args:
        app: the application.
        config: hosts and keys.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in config.answered_hosts)
        self._digests = [_digest(key) for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] == "http":
            error = _broken_http(scope) or self._refusal(scope["path"], Headers(scope=scope))
            if error is not None:
                scope["state"]["error"] = error
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = _without_port(headers.get("host", ""))
        if self._hosts and host not in self._hosts:
            text = f"this server does not answer for the host {host[:100]!r}; start it with --allow-host to change that"
            return ApiError(421, text, code="wrong_host")
        needs_key = path.startswith("/v1/") or path == "/metrics"
        if self._digests and needs_key and not _is_known(headers.get("authorization", ""), self._digests):
            text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            headers_ = {"www-authenticate": "Bearer"}
            return ApiError(401, text, kind="authentication_error", code="invalid_api_key", headers=headers_)
        return None


def _broken_http(scope: Scope) -> ApiError | None:
    """Refuse what the HTTP library accepts, but what another server before this one could understand differently."""
    headers = Headers(scope=scope)
    close = {"connection": "close"}
    if scope["http_version"] not in ("1.0", "1.1"):
        return ApiError(400, "the version of HTTP is not 1.0 or 1.1", code="invalid_http", headers=close)
    if "transfer-encoding" in headers and "content-length" in headers:
        text = "the request has both Content-Length and Transfer-Encoding"
        return ApiError(400, text, code="invalid_http", headers=close)
    if len(scope["headers"]) > _MAX_HEADERS:
        return ApiError(431, f"the request has more than {_MAX_HEADERS} headers", code="invalid_http", headers=close)
    return None


def _without_port(host: str) -> str:
    """Return a ``Host`` header in lower case, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_known(authorization: str, digests: Sequence[bytes]) -> bool:
    """Compare a key with all known ones, in a time that does not depend on how much of it is right."""
    scheme, _, key = authorization.partition(" ")
    given = _digest(key.strip())
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    return any(matches) and scheme.lower() == "bearer"
