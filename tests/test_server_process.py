"""``promprune-serve`` as a process: signals, restarts, and what is refused before it serves."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from promprune.runtime.commands.serve import main
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.http import bind
from tests.support.command_line import run
from tests.support.fake_package import write_fake_package

MODEL = "fake@0.25"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "pruned"
    write_fake_package(folder)
    return folder


class Process:
    """A running server."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "promprune.runtime.commands.serve", *arguments]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.popen.stderr is not None
        self.lines: list[dict[str, Any]] = []
        for line in self.popen.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1]["event"] == "listening":
                break
        self.port: int = self.lines[-1]["port"]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self.lines += map(json.loads, self.popen.stderr or ())

    def ask(self, **fields: Any) -> http.client.HTTPResponse:
        """Send a chat, and return the response as soon as its headers are there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse()

    def end(self, number: int) -> int:
        """Send a signal, and return the exit code."""
        self.popen.send_signal(number)
        code = self.popen.wait(60)
        self._reader.join()
        return code


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    running = Process(*arguments)
    try:
        yield running
    finally:
        if running.popen.poll() is None:
            running.end(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_was_accepted(package: Path, number: int, sigint_handled: None) -> None:
    with process(str(package), "--port", "0", "--max-batch", "2") as server:
        responses: list[http.client.HTTPResponse] = []
        answers: list[bytes] = []

        def ask(stream: bool) -> None:
            response = server.ask(stream=stream, max_tokens=200, ignore_eos=True)
            responses.append(response)
            answers.append(response.read())

        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(20)]
        for thread in threads:
            thread.start()
        while not responses:
            time.sleep(0.005)
        running = 20 - len(answers)
        assert server.end(number) == 0
        for thread in threads:
            thread.join()
    assert running > 10, "the answers were complete before the signal"
    assert [response.status for response in responses] == [200] * 20
    assert all(answer.endswith(b"data: [DONE]\n\n") or b'"usage"' in answer for answer in answers)
    events = [line["event"] for line in server.lines]
    assert events[-1] == "stopped"
    assert events.count("request") == 20
    with pytest.raises(ConnectionRefusedError):
        server.ask()


def test_a_killed_server_starts_again_on_its_port(package: Path) -> None:
    with process(str(package), "--port", "0") as first:
        assert first.ask(stream=True, max_tokens=200, ignore_eos=True).status == 200
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    with process(str(package), "--port", str(first.port)) as second:
        assert second.ask(max_tokens=2).status == 200
        assert second.end(signal.SIGTERM) == 0


def test_what_cannot_be_served_is_one_line(package: Path, tmp_path: Path) -> None:
    with bind(ServerConfig(port=0)) as taken:
        taken.listen()
        outcome = run(main, str(package), "--port", str(taken.getsockname()[1]))
    assert outcome.exit_code == 1
    assert "cannot listen on 127.0.0.1 port" in outcome.stderr
    outcome = run(main, str(tmp_path / "none"), "--port", "0")
    assert outcome.exit_code == 1
    assert "is not an exported package" in outcome.stderr
    outcome = run(main, str(package), str(package), "--port", "0")
    assert outcome.exit_code == 1
    assert "two packages are called fake@0.25" in outcome.stderr
    outcome = run(main, str(package), "--host", "no.such.host.invalid")
    assert outcome.exit_code == 1
    assert "cannot listen on no.such.host.invalid" in outcome.stderr
    assert all(line.startswith("error: ") for line in outcome.error_lines)


def test_files_of_keys(package: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for content, message in ((None, "cannot be read"), (b"\n \n", "has no keys"), (b"\xff", "cannot be read")):
        if content is not None:
            keys.write_bytes(content)
        outcome = run(main, str(package), "--port", "0", "--api-keys", str(keys))
        assert outcome.exit_code == 1
        assert message in outcome.stderr
    keys.write_text("short\n")
    assert "at least 16 characters per key" in run(main, str(package), "--api-keys", str(keys)).stderr
    assert os.fspath(keys) not in run(main, str(package), "--api-keys", str(keys)).stdout


def test_a_key_is_needed_if_there_is_a_file_of_keys(package: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key-0123456789abcdef\n\nanother-key-0123456789\n")
    with process(str(package), "--port", "0", "--api-keys", str(tmp_path / "keys")) as server:
        assert server.ask().status == 401
        assert server.end(signal.SIGTERM) == 0
        assert "a-key" not in str(server.lines)
