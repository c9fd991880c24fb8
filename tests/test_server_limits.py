"""The server under load and at its limits: a full queue, deadlines, clients that go away, keys, hosts and origins."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from promprune.errors import BackendError, ConfigError
from promprune.runtime import RuntimeConfig
from promprune.runtime.engine.engine import Engine
from promprune.runtime.server.app import make_app
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.models import ModelCatalog
from tests.support.fake_package import write_fake_package
from tests.support.server import RunningServer, data_url, encoded, image_part, picture, running_server, text_part

MODEL = "fake@0.25"
LONG: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "pruned"
    write_fake_package(folder)
    return folder


class Gate:
    """Lets the engines of all servers step only while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._open.set()
        step = Engine.step

        def gated(engine: Engine) -> Any:
            self._open.wait(30)
            return step(engine)

        monkeypatch.setattr(Engine, "step", gated)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def ask_in_background(server: RunningServer, count: int, **fields: Any) -> tuple[list[threading.Thread], list[int]]:
    """Send requests on threads; return these, and the list of the statuses that come back."""
    statuses: list[int] = []
    asks = [
        threading.Thread(target=lambda: statuses.append(server.chat(MODEL, text_part("a"), **fields).status_code))
        for _ in range(count)
    ]
    for ask in asks:
        ask.start()
    return asks, statuses


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.005)


def raw_request(port: int, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket of its own, and return that."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "a"}], **fields}


def test_a_full_queue_refuses_and_recovers(package: Path, gate: Gate) -> None:
    with running_server(package, max_batch=2, max_queue=3) as server:
        with gate.closed():
            asks, statuses = ask_in_background(server, 5, max_tokens=3)
            wait_for(lambda: server.lanes[0].accepted == 5)
            refused = server.chat(MODEL, text_part("a"))
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            assert "promprune_queue_length 5.0" in server.client.get("/metrics").text
        for ask in asks:
            ask.join()
        assert statuses == [200] * 5
        assert server.chat(MODEL, text_part("a"), max_tokens=3).status_code == 200
        server.wait_until_idle()


def test_a_deadline_ends_a_request_and_frees_its_slot(package: Path, gate: Gate) -> None:
    with running_server(package, request_timeout_s=0.3) as server:
        with gate.closed():
            late = server.chat(MODEL, text_part("a"))
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "timeout"
        server.wait_until_idle()
        assert server.chat(MODEL, text_part("a"), max_tokens=2).status_code == 200


def test_a_deadline_ends_a_stream_with_an_error(package: Path, gate: Gate) -> None:
    with running_server(package, request_timeout_s=0.3) as server:
        with gate.closed():
            *_, last, nothing = server.chat(MODEL, text_part("a"), stream=True).text.split("\n\n")
        assert nothing == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_leave_no_slot(package: Path, stream: bool) -> None:
    with running_server(package, max_batch=4) as server:
        for _ in range(6):
            connections = [raw_request(server.port, body_of(stream=stream, **LONG)) for _ in range(8)]
            wait_for(lambda: server.lanes[0].worker.engine.load.running > 0)
            for connection in connections:
                connection.close()
            server.wait_until_idle()
        assert 'outcome="cancelled"' in server.client.get("/metrics").text
        assert server.chat(MODEL, text_part("a"), max_tokens=2).status_code == 200


def test_a_client_that_does_not_read_is_given_up(package: Path) -> None:
    """The application is called without a server, with a connection that never takes anything."""
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def call(app: Starlette) -> None:
        messages = [{"type": "http.request", "body": json.dumps(body_of(stream=True)).encode(), "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        target = {"path": "/v1/chat/completions", "raw_path": b"", "query_string": b"", "http_version": "1.1"}
        scope = {"type": "http", "method": "POST", "headers": headers, "asgi": {"spec_version": "2.3"}, **target}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 10)
            assert all(lane.accepted == 0 for lane in app.state.service._lanes.values())

    config = ServerConfig(request_timeout_s=0.3)
    with ModelCatalog.load([str(package)], RuntimeConfig(provider="cpu")) as catalog:
        asyncio.run(call(make_app(catalog, config)))
    assert sent == ["http.response.start", "http.response.body"]


def test_a_client_that_goes_away_while_its_image_is_encoded(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from promprune.runtime.images.encoder import ImageEncoder

    begun, goes_on = threading.Event(), threading.Event()
    encode = ImageEncoder.encode

    def slow(encoder: ImageEncoder, image: Any) -> Any:
        begun.set()
        goes_on.wait(10)
        return encode(encoder, image)

    monkeypatch.setattr(ImageEncoder, "encode", slow)
    with running_server(package, max_batch=1, max_queue=0) as server:
        content = [image_part(picture(1)), text_part("a")]
        connection = raw_request(server.port, {"model": MODEL, "messages": [{"role": "user", "content": content}]})
        assert begun.wait(10)
        connection.close()
        # The thread still works on it, so its place and its memory are taken.
        wait_for(lambda: 'outcome="cancelled"' in server.client.get("/metrics").text)
        assert server.chat(MODEL, text_part("a")).status_code == 429
        whole = 8 * ServerConfig.max_body_bytes
        assert server.app.state.bodies.free_bytes < whole
        goes_on.set()
        server.wait_until_idle()
        assert server.app.state.bodies.free_bytes == whole
        assert server.chat(MODEL, text_part("a"), max_tokens=2).status_code == 200


def test_an_encode_does_not_stop_running_answers(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from promprune.runtime.images.encoder import ImageEncoder

    begun, goes_on = threading.Event(), threading.Event()
    encode = ImageEncoder.encode

    def slow(encoder: ImageEncoder, image: Any) -> Any:
        begun.set()
        goes_on.wait(20)
        return encode(encoder, image)

    monkeypatch.setattr(ImageEncoder, "encode", slow)
    with running_server(package) as server:
        found: list[int] = []
        ask = threading.Thread(
            target=lambda: found.append(server.chat(MODEL, image_part(picture(1)), text_part("a")).status_code)
        )
        ask.start()
        assert begun.wait(10)
        assert server.chat(MODEL, text_part("a"), max_tokens=50, ignore_eos=True).status_code == 200
        assert not found
        goes_on.set()
        ask.join()
        assert found == [200]


def test_a_failing_engine_is_an_error_in_openais_format(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(package) as server:
        with monkeypatch.context() as broken:

            def fail(engine: Engine) -> Any:
                raise KeyError("a bug")

            broken.setattr(Engine, "step", fail)
            got = server.chat(MODEL, text_part("a"))
            assert got.status_code == 500
            assert got.json()["error"]["code"] == "internal_error"
            assert "a bug" not in got.text
        assert server.chat(MODEL, text_part("a"), max_tokens=2).status_code == 200
        server.wait_until_idle()


def test_a_failing_graph_ends_a_stream_with_an_error(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from promprune.runtime.engine.language_model import LanguageModel

    def fail(*arguments: Any) -> Any:
        raise BackendError("the graph failed")

    with running_server(package) as server:
        monkeypatch.setattr(LanguageModel, "decode", fail)
        *_, last, _ = server.chat(MODEL, text_part("a"), stream=True, ignore_eos=True).text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        server.wait_until_idle()


def test_keys(package: Path) -> None:
    key = "sk-0123456789abcdef"
    with running_server(package, api_keys=(key, "another-key-0123456789")) as server:
        for wrong in ("", "Bearer", f"Basic {key}", f"Bearer {key}x", f"Bearer {key[:-1]}", "Bearer \u00e9"):
            got = server.client.get("/v1/models", headers={"authorization": wrong.encode()})
            assert got.status_code == 401
            assert got.json()["error"]["code"] == "invalid_api_key"
            assert got.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/healthz").status_code == 200
        for right in (f"Bearer {key}", f"bearer {key}", "Bearer another-key-0123456789"):
            assert server.client.get("/v1/models", headers={"authorization": right}).status_code == 200


def test_only_this_machine_is_answered_for(package: Path) -> None:
    with running_server(package) as server:
        for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.", "192.168.0.1:80", "[::2]"):
            got = server.client.get("/v1/models", headers={"host": host})
            assert got.status_code in (400, 421), host  # 400: the header is empty
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8000"):
            assert server.client.get("/v1/models", headers={"host": host}).status_code == 200
    with running_server(package, allowed_hosts=("my.example",)) as server:
        assert server.client.get("/v1/models", headers={"host": "my.example:443"}).status_code == 200
        assert server.client.get("/v1/models").status_code == 421


def test_other_origins_are_off_unless_allowed(package: Path) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with running_server(package) as server:
        assert server.client.options("/v1/chat/completions", headers=asks).status_code == 405
        got = server.client.get("/v1/models", headers={"origin": "https://page.example"})
        assert not [name for name in got.headers if name.startswith("access-control")]
        simple = {"content-type": "text/plain", "origin": "https://page.example"}
        assert server.client.post("/v1/chat/completions", headers=simple, content=b"{}").status_code == 415
    with running_server(package, allowed_origins=("https://page.example",)) as server:
        got = server.client.options("/v1/chat/completions", headers=asks)
        assert got.headers["access-control-allow-origin"] == "https://page.example"
        other = server.client.options("/v1/chat/completions", headers={**asks, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_bodies_are_limited_in_size_and_time(package: Path) -> None:
    with running_server(package, max_body_bytes=50_000, body_timeout_s=0.5) as server:
        got = server.chat(MODEL, text_part("x" * 60_000))
        assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
        with raw_request(server.port, body_of()) as slow:
            pass
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
        answer = b"".join(iter(lambda: slow.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in answer
        slow.close()
        server.wait_until_idle()


def test_all_bodies_together_are_limited(package: Path) -> None:
    with running_server(package, max_body_bytes=20_000, body_timeout_s=20) as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(8)]
        for connection in slow:
            connection.sendall(head + b"content-length: 20000\r\n\r\n" + b" " * 19_999)
        wait_for(lambda: server.app.state.bodies.free_bytes == 8)
        got = server.chat(MODEL, text_part("x"))
        assert (got.status_code, got.json()["error"]["code"]) == (429, "too_many_bodies")
        for connection in slow:
            connection.close()
        wait_for(lambda: server.app.state.bodies.free_bytes == 160_000)
        server.chat(MODEL, image_part(picture(1)), text_part("x"), max_tokens=2)
        server.chat(MODEL, text_part("<image>"))
        server.chat("none", text_part("x"))
        wait_for(lambda: server.app.state.bodies.free_bytes == 160_000)
        assert server.chat(MODEL, text_part("x"), max_tokens=2).status_code == 200


def test_slow_headers_are_closed_and_do_not_stop_service(package: Path) -> None:
    with running_server(package, header_timeout_s=0.5) as server:
        slow = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(200)]
        for number, connection in enumerate(slow):
            connection.sendall(b"GET / HTTP/1.1\r\nx: " if number % 2 else b"")
        assert server.chat(MODEL, text_part("a"), max_tokens=2).status_code == 200
        assert [connection.recv(100) for connection in slow] == [b""] * 200
        for connection in slow:
            connection.close()


def test_a_request_larger_than_the_cache_is_refused(package: Path) -> None:
    with running_server(package, max_cache_tokens=30) as server:
        got = server.chat(MODEL, text_part("a" * 20), max_tokens=20)
        assert got.status_code == 400
        assert "max_cache_tokens = 30" in got.json()["error"]["message"]
        server.wait_until_idle()


def test_logs_have_no_content(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from promprune.runtime.server.logs import configure_logs

    configure_logs()
    with running_server(package) as server:
        server.chat(MODEL, text_part("SECRET"), image_part(picture(1)), max_tokens=2)
        server.chat(MODEL, text_part("SECRET <image>"))
        server.client.post("/v1/chat/completions", json={"SECRET": "SECRET"})
        server.client.get("/nowhere?SECRET=SECRET")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 400, 404]
    assert requests[0]["prompt_tokens"] > 0
    assert requests[1]["error"] == "invalid_prompt"
    assert "SECRET" not in str(lines)
    assert data_url(encoded(picture(1)))[30:60] not in str(lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""),
        ("port", 65_536),
        ("port", -1),
        ("max_batch", 0),
        ("max_queue", -1),
        ("max_cache_tokens", 0),
        ("max_new_tokens", 0),
        ("max_images", 0),
        ("max_body_bytes", 0),
        ("request_timeout_s", 0),
        ("drain_timeout_s", float("inf")),
        ("api_keys", ("short",)),
    ],
)
def test_wrong_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"received {name} = "):
        ServerConfig(**{name: value})
