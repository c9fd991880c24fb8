"""Fetching the images of a request over HTTP, so that nobody can reach the local network through the server (SSRF).

A host is resolved once, all its addresses must be public, and the connection goes to the address that was checked, so
that a second answer of the name server changes nothing. Redirects are followed by hand, with the same checks.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

__all__ = ["RemoteImageError", "RemoteImages", "is_public"]

_PORTS: Final[Mapping[str, int]] = MappingProxyType({"http": 80, "https": 443})
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MAX_REDIRECTS: Final = 3
_CHUNK_BYTES: Final = 64 * 1024
_HEADERS: Final = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "promprune", "connection": "close"}
# Networks that are reached through a gateway, which could lead into the local network.
_TUNNELS: Final = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))


class RemoteImageError(Exception):
    """An image cannot be fetched; the message is for the client."""


class _Target(NamedTuple):
    """What a URL names."""

    scheme: str
    host: str
    port: int
    path: str


class RemoteImages:
    """Fetches images; can be used from several threads.

    Args:
        timeout_s: most seconds for one image, redirects included; the name server's time is not.
        resolve: returns the addresses of a host, like ``socket.getaddrinfo``.
        allowed: tells whether an address may be connected to.
        ports: the port of each scheme; no others are allowed.
    """

    def __init__(
        self,
        timeout_s: float = 10.0,
        *,
        resolve: Callable[..., list[Any]] = socket.getaddrinfo,
        allowed: Callable[[str], bool] | None = None,
        ports: Mapping[str, int] = _PORTS,
    ) -> None:
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._allowed = allowed or is_public
        self._ports = ports

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """Return the content of an image.

        Raises:
            RemoteImageError: the URL is not allowed, or it does not give an image of at most ``max_bytes`` in time.
        """
        until = time.monotonic() + self._timeout_s
        for _ in range(_MAX_REDIRECTS + 1):
            with self._open(self._target(url), until) as response:
                if response.status not in _REDIRECTS:
                    return _read(response, max_bytes, until)
                url = urljoin(url, response.headers.get("location", ""))
        raise RemoteImageError(f"the image is behind more than {_MAX_REDIRECTS} redirects")

    def _target(self, url: str) -> _Target:
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parts.hostname or "").encode("idna").decode("ascii")
        except (ValueError, UnicodeError) as error:
            raise RemoteImageError("the URL of the image is not valid") from error
        if parts.scheme not in self._ports or not host or parts.username is not None or parts.password is not None:
            raise RemoteImageError("the URL of the image must be http:// or https:// with a host and without a user")
        if port not in (None, self._ports[parts.scheme]):
            raise RemoteImageError("the URL of the image must not name another port than that of its scheme")
        return _Target(parts.scheme, host, self._ports[parts.scheme], _path_of(parts))

    @contextmanager
    def _open(self, target: _Target, until: float) -> Iterator[http.client.HTTPResponse]:
        """Ask for a path; the connection is closed with the block, and at the latest when the time is over."""
        try:
            with self._connect(target, until) as plain, _closing_at(until, plain) as use:
                connection = http.client.HTTPConnection(target.host, target.port)
                connection.sock = use(_encrypted(plain, target.host)) if target.scheme == "https" else plain
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                connection.request("GET", target.path, headers=_HEADERS)
                yield connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = " in time" if time.monotonic() >= until else ""
            raise RemoteImageError(f"the image could not be fetched{late}") from error

    def _connect(self, target: _Target, until: float) -> socket.socket:
        """Connect to the first address of a host, all of which must be allowed."""
        found = self._resolve(target.host, target.port, type=socket.SOCK_STREAM)
        addresses = [address[4] for address in found]
        if not addresses or not all(self._allowed(str(address[0])) for address in addresses):
            raise RemoteImageError("the host of the image has an address that is not public")
        return socket.create_connection(addresses[0][:2], timeout=max(0.001, until - time.monotonic()))


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a zone, for example
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.is_site_local or any(ip in tunnel for tunnel in _TUNNELS):
            return False
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_link_local or ip.is_loopback
    return ip.is_global and not special


def _path_of(parts: SplitResult) -> str:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii() or any(character <= " " or character == "\x7f" for character in path):
        raise RemoteImageError("the URL of the image must be percent-encoded")
    return path


def _encrypted(plain: socket.socket, host: str) -> ssl.SSLSocket:
    """Return a socket that takes the place of another one; its handshake has to follow."""
    context = ssl.create_default_context()
    return context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


@contextmanager
def _closing_at(until: float, first: socket.socket) -> Iterator[Callable[[socket.socket], socket.socket]]:
    """End every wait for a connection at a time, and close it after the block.

    Yields a function that replaces the socket by another one of the same connection, and returns that.
    """
    sockets = [first]

    def use(other: socket.socket) -> socket.socket:
        sockets.append(other)
        return other

    def shut_down() -> None:
        with suppress(OSError):
            socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)  # not that of SSL, which another thread uses

    over = threading.Timer(max(0.0, until - time.monotonic()), shut_down)
    over.daemon = True
    over.start()
    try:
        yield use
    finally:
        over.cancel()
        sockets[-1].close()


def _read(response: http.client.HTTPResponse, max_bytes: int, until: float) -> bytes:
    if response.status != 200:
        raise RemoteImageError(f"the host of the image answered with status {response.status}")
    if not response.headers.get_content_type().startswith("image/"):
        raise RemoteImageError("the host of the image did not send an image")
    content = bytearray()
    while chunk := response.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > max_bytes:
            raise RemoteImageError(f"the image has more than {max_bytes} bytes")
    if response.length or time.monotonic() >= until:  # ended by the timer, or by the host
        raise RemoteImageError("the image could not be fetched completely")
    return bytes(content)
