"""Images that the server fetches: only if allowed, only from public addresses, and within limits."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from promprune.runtime.server import preparation
from promprune.runtime.server.remote import RemoteImageError, RemoteImages, is_public
from tests.support.fake_package import write_fake_package
from tests.support.server import encoded, image_part, picture, running_server, text_part

PNG = encoded(picture(1))
CERTIFICATE = Path(__file__).parent / "support" / "images_example.pem"
MODEL = "fake@0.25"
PRIVATE = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "fe80::1", "fe80::1%eth0"),
    *("fc00::1", "fd00::1", "fec0::1", "ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"),
    *("2002:7f00:1::", "2001:0:7f00:1::", "100::1", "", "localhost", "1", "127.1", "0x7f000001"),
)
PUBLIC = ("8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


class Handler(http.server.BaseHTTPRequestHandler):
    """A host of images, and of what pretends to be one."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
        name = self.path.strip("/").partition("?")[0]
        if name == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\n")
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif name == "slow-headers":
            for byte in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 90:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif name.startswith("redirect-"):
            left = int(name.removeprefix("redirect-"))
            self.send(302, location=f"/redirect-{left - 1}" if left > 1 else "/image")
        elif name == "away":
            self.send(302, location="http://private.example/secret")
        elif name == "to-file":
            self.send(302, location="file:///etc/passwd")
        elif name == "html":
            self.send(200, b"<html>", content_type="text/html")
        elif name == "missing":
            self.send(404, b"none")
        elif name == "short":
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 1000\r\n\r\nabc")
            self.close_connection = True
        elif name == "large":
            self.send(200, PNG + b"\x00" * 100_000)
        elif name == "garbage":
            self.wfile.write(b"\x00\xff" * 100)
            self.close_connection = True
        else:
            self.send(200, PNG)

    def send(self, status: int, content: bytes = b"", content_type: str = "image/png", **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with suppress(OSError):  # the client is gone
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[http.server.ThreadingHTTPServer]:
    handler = type("OwnHandler", (Handler,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Names:
    """A name server: every name is on this machine, and said to be public, but for one."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, name: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(name)
        if name == "unknown.example":
            raise socket.gaierror("no such host")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


def remote_of(host: http.server.ThreadingHTTPServer, names: Any = None, **options: Any) -> RemoteImages:
    """Return a fetcher that takes this machine for a public host, at the port of the host."""
    port = host.server_address[1]
    made = {"ports": {"http": port, "https": port}, "allowed": lambda address: address == "127.0.0.1", **options}
    return RemoteImages(resolve=names or Names(), **made)


def seen_by(host: http.server.ThreadingHTTPServer) -> list[dict[str, str]]:
    seen: list[dict[str, str]] = host.RequestHandlerClass.seen  # type: ignore[attr-defined]
    return seen


def test_an_image_is_fetched(host: http.server.ThreadingHTTPServer) -> None:
    assert remote_of(host).fetch("http://images.example/image?a=b#c", 100_000) == PNG
    (request,) = seen_by(host)
    assert request["path"] == "/image?a=b"
    assert request["host"].partition(":")[0] == "images.example"
    assert "cookie" not in request
    assert "authorization" not in request


def test_a_few_redirects_are_followed(host: http.server.ThreadingHTTPServer) -> None:
    names = Names()
    assert remote_of(host, names).fetch("http://images.example/redirect-3", 100_000) == PNG
    assert names.asked == ["images.example"] * 4  # each hop is resolved and checked
    with pytest.raises(RemoteImageError, match="more than 3 redirects"):
        remote_of(host).fetch("http://images.example/redirect-4", 100_000)


REFUSED = {
    "http://images.example/missing": "status 404",
    "http://images.example/html": "did not send an image",
    "http://images.example/short": "could not be fetched",
    "http://images.example/garbage": "could not be fetched",
    "http://images.example/large": "more than 50000 bytes",
    "http://images.example/to-file": "must be http",
    "http://unknown.example/": "could not be fetched",
    "http://user:secret@images.example/": "without a user",
    "http://images.example:22/": "another port",
    "http://images.example:99999/": "not valid",
    "http://[::1/": "not valid",
    "http:///image": "with a host",
    "http://": "with a host",
    "ftp://images.example/": "must be http",
    "http://images.example/a b": "percent-encoded",
    "http://images.example/\u00e9": "percent-encoded",
    "http://" + "a" * 300 + ".example/": "not valid",
    "https://images.example/image": "could not be fetched",  # no TLS there
}


@pytest.mark.parametrize("url", REFUSED, ids=lambda url: url[:50])
def test_what_is_refused(host: http.server.ThreadingHTTPServer, url: str) -> None:
    with pytest.raises(RemoteImageError, match=REFUSED[url]):
        remote_of(host).fetch(url, 50_000)


def test_a_line_break_makes_no_second_request(host: http.server.ThreadingHTTPServer) -> None:
    for url in ("http://images.example/a\r\nx: y", "http://images.example/a%0d%0ax:%20y", "http://images.example\r\n/"):
        try:
            remote_of(host).fetch(url, 50_000)
        except RemoteImageError:
            continue
    assert all("x" not in request for request in seen_by(host))


@pytest.mark.parametrize("name", ["slow", "slow-headers"])
def test_a_host_that_trickles_is_cut_off(host: http.server.ThreadingHTTPServer, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(RemoteImageError, match="could not be fetched"):
        remote_of(host, timeout_s=0.4).fetch(f"http://images.example/{name}", 50_000)
    assert time.monotonic() - start < 3


def test_a_handshake_that_never_ends_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"https": silent.getsockname()[1]}
        remote = RemoteImages(0.3, resolve=Names(), allowed=lambda _: True, ports=ports)
        start = time.monotonic()
        with pytest.raises(RemoteImageError, match="in time"):
            remote.fetch("https://images.example/", 50_000)
        assert time.monotonic() - start < 3


def test_a_host_with_one_private_address_is_refused(host: http.server.ThreadingHTTPServer) -> None:
    def names(name: str, port: int, **_: Any) -> list[Any]:
        found = ["10.0.0.1"] if name == "private.example" else ["127.0.0.1", "10.0.0.1"]
        found = ["127.0.0.1"] if name == "images.example" else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    for url in ("http://mixed.example/image", "http://images.example/away", "http://private.example/"):
        with pytest.raises(RemoteImageError, match="not public"):
            remote_of(host, names).fetch(url, 50_000)
    assert [request["path"] for request in seen_by(host)] == ["/away"]


def test_a_name_that_changes_its_address_reaches_only_the_one_that_was_checked(
    host: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the second answer of the name server would be another address."""
    asked: list[str] = []
    connect = socket.create_connection

    def names(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def checked(address: Any, *arguments: Any, **options: Any) -> socket.socket:
        assert address[0] == "127.0.0.1"
        return connect(address, *arguments, **options)

    monkeypatch.setattr(socket, "create_connection", checked)
    assert remote_of(host, names).fetch("http://images.example/image", 50_000) == PNG
    assert asked == ["images.example"]


def test_certificates_are_checked(host: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(CERTIFICATE)
    host.socket = theirs.wrap_socket(host.socket, server_side=True)
    with pytest.raises(RemoteImageError, match="could not be fetched"):
        remote_of(host).fetch("https://images.example/image", 100_000)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    assert remote_of(host).fetch("https://images.example/image", 100_000) == PNG
    with pytest.raises(RemoteImageError, match="could not be fetched"):  # the certificate is of another host
        remote_of(host).fetch("https://other.example/image", 100_000)


def remote_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_the_server_fetches_images_only_if_allowed(
    host: http.server.ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fake_package(tmp_path / "package")
    remote = remote_of(host)
    monkeypatch.setattr(preparation, "RemoteImages", lambda: remote)
    with running_server(tmp_path / "package") as server:
        refused = server.chat(MODEL, remote_part("http://images.example/image"), text_part("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "remote_image")
        assert seen_by(host) == []
    with running_server(tmp_path / "package", allow_remote_images=True, max_body_bytes=60_000) as server:
        fetched = server.chat(MODEL, remote_part("http://images.example/image"), text_part("a"), max_tokens=5)
        sent = server.chat(MODEL, image_part(picture(1)), text_part("a"), max_tokens=5)
        assert fetched.json()["choices"] == sent.json()["choices"]
        large = server.chat(MODEL, image_part(picture(1)), remote_part("http://images.example/large"), text_part("a"))
        error = large.json()["error"]
        assert (large.status_code, error["code"]) == (400, "remote_image")
        assert error["param"] == "messages[0].content[1].image_url.url"
        server.wait_until_idle()
        assert server.app.state.bodies.free_bytes == 8 * 60_000


def test_the_server_reaches_no_address_of_its_own_network(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "package")
    with running_server(tmp_path / "package", allow_remote_images=True) as server:
        for url in ("http://127.0.0.1/", "http://localhost/", "http://169.254.169.254/latest/", "http://[::1]/"):
            got = server.chat(MODEL, remote_part(url), text_part("a"))
            assert got.status_code == 400, url
            assert "not public" in got.json()["error"]["message"]
