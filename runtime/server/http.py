"""Serving the application over HTTP/1.1 with uvicorn: limits on headers, errors of the protocol, shutdown."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

import h11
import msgspec
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from promprune.errors import ConfigError
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.logs import log_event

__all__ = ["bind", "make_server", "serve"]

_MAX_HEADER_BYTES: Final = 64 * 1024
_BACKLOG: Final = 2048
_STALLED_S: Final = 30  # after which a connection is reset whose peer does not receive what was sent


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket that is bound to the server's address, before a large model is loaded.

    Raises:
        ConfigError: the address is unknown, or in use.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror or error})",
            expected="a free port of an address of this machine",
            fix="choose another --host or --port",
        ) from error
    return bound


def serve(app: Starlette, config: ServerConfig, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then finish the accepted requests; a second SIGINT stops at once."""
    asyncio.run(make_server(app, config).serve(sockets=[listening]))
    log_event("stopped")


def make_server(app: Starlette, config: ServerConfig) -> uvicorn.Server:
    """Return uvicorn's server for the application."""
    settings = uvicorn.Config(
        app,
        loop="asyncio",
        http=_protocol(config),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(config.drain_timeout_s),
    )
    return _Server(settings, app)


class _Server(uvicorn.Server):
    """Logs the address once it answers, tells the application that it drains, and does not raise signals again."""

    def __init__(self, settings: uvicorn.Config, app: Starlette) -> None:
        super().__init__(settings)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log the address."""
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            named = f"[{host}]" if ":" in host else host
            log_event("listening", url=f"http://{named}:{port}", host=host, port=port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        log_event("draining", signal=sig)
        self._app.state.draining = True
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; Python delivers them to the main thread only."""
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(config: ServerConfig) -> type[H11Protocol]:
    """Return the protocol of one connection."""
    refused = msgspec.json.encode(ApiError(400, "this is not a valid HTTP request", code="invalid_http").body)

    class Protocol(H11Protocol):
        """Closes connections whose headers do not arrive in time; answers broken requests in OpenAI's format."""

        _waiting_for_headers: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            _give_up_on_stalled_peers(transport.get_extra_info("socket"))
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._waiting_for_headers is None:
                self._wait_for_headers()

        def send_400_response(self, msg: str) -> None:
            del msg
            length = str(len(refused)).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", length),
                (b"connection", b"close"),
            ]
            with suppress(h11.LocalProtocolError):  # a response has begun
                self.transport.write(self.conn.send(h11.Response(status_code=400, headers=headers)) or b"")
                self.transport.write(self.conn.send(h11.Data(data=refused)) or b"")
                self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
            self.transport.close()

        def _wait_for_headers(self) -> None:
            self._waiting_for_headers = self.loop.call_later(config.header_timeout_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waiting_for_headers is not None:
                self._waiting_for_headers.cancel()
                self._waiting_for_headers = None

    return Protocol


def _give_up_on_stalled_peers(connection: socket.socket | None) -> None:
    """Let the kernel reset a connection whose peer receives nothing, which would keep its buffers for ever."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if connection is not None and option is not None:
        connection.setsockopt(socket.IPPROTO_TCP, option, _STALLED_S * 1000)
