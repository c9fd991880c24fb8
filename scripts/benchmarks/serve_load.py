"""Measure promprune-serve under load: answers, time to first token, memory, and what batching brings.

    python scripts/benchmarks/serve_load.py PACKAGE [PACKAGE ...]
    python scripts/benchmarks/serve_load.py PACKAGE --clients 16 --seconds 60 --batch-seconds 10 --rounds 5

Starts a server for the packages, which must be of the embedded model, and asks it from threads of this process, over
loopback:

1. ``--clients`` clients stream for ``--seconds``. Each asks about its own images in turns, which are more than the
   server keeps encoded, and compares every answer with the one that the runtime gave before, without the server.
2. 1 and 8 clients in turns ask for answers of exactly 64 tokens, ``--rounds`` times for ``--batch-seconds`` each, with
   images that were encoded before. The ratio of their tokens per second says what batching brings.
3. A server that runs 2 requests and lets 4 wait is asked by all clients for ``--batch-seconds``: it must refuse some
   with status 429, answer the others correctly, and answer afterwards.
4. A server is killed and started again; the time to the first answer is measured.

The last line on stdout is JSON. Exit code 1 if an answer was wrong or an error occurred.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from promprune.embedded.scenes import TEST_SEEDS, questions, render_scene
from promprune.package.manifest import read_manifest
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.server.models import model_name

IMAGES_PER_CLIENT = 3
NEW_TOKENS = 64
MANY = 8


@dataclass(frozen=True)
class Ask:
    """A request, and the text that has to come back."""

    body: bytes
    text: str


@dataclass
class Tally:
    """What some clients saw."""

    first_token_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def make_asks(packages: list[Path], clients: int) -> list[list[Ask]]:
    """Return each client's questions about different images, with the runtime's own answers."""
    asks: list[list[Ask]] = [[] for _ in range(clients)]
    pipelines = [VisionLanguagePipeline.from_package(package, provider="cpu") for package in packages]
    names = [model_name(read_manifest(package), package) for package in packages]
    for number in range(clients * IMAGES_PER_CLIENT):
        scene = render_scene(TEST_SEEDS[number])
        question = questions(scene)[0].text
        answer = pipelines[number % len(packages)].generate(scene.image, question).text.lstrip()
        body = body_of(names[number % len(packages)], scene.image, question, stream=True)
        asks[number % clients].append(Ask(body, answer))
    for pipeline in pipelines:
        pipeline.close()
    return asks


def body_of(model: str, image: Any, question: str, **fields: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return json.dumps({"model": model, "messages": [{"role": "user", "content": parts}], **fields}).encode()


def post(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection.getresponse()


def stream_once(connection: http.client.HTTPConnection, ask: Ask, tally: Tally) -> None:
    """Ask for a stream, and compare its text."""
    start, text, first = time.perf_counter(), "", None
    response = post(connection, ask.body)
    if response.status == 429:
        response.read()
        tally.refused += 1
        return
    if response.status != 200:
        tally.failures.append(f"status {response.status}: {response.read()[:200]!r}")
        return
    while line := response.readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices")
            new = choices[0]["delta"].get("content", "") if choices else ""
            if new and first is None:
                first = (time.perf_counter() - start) * 1000
            text += new
    if text != ask.text:
        tally.failures.append(f"answered {text!r} instead of {ask.text!r}")
    if first is not None:
        tally.first_token_ms.append(first)


def complete_once(connection: http.client.HTTPConnection, ask: Ask, tally: Tally) -> None:
    """Ask for a complete answer, and count its tokens."""
    content = json.loads(post(connection, ask.body).read())
    if "usage" not in content:
        tally.failures.append(str(content)[:200])
        return
    tally.tokens += content["usage"]["completion_tokens"]


Once = Callable[[http.client.HTTPConnection, Ask, Tally], None]


def run_clients(port: int, asks: list[list[Ask]], seconds: float, once: Once) -> Tally:
    """Run one client per list of asks, which it repeats on its own connection for some seconds."""
    tallies = [Tally() for _ in asks]
    until = time.perf_counter() + seconds

    def client(own: list[Ask], tally: Tally) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            for ask in cycle(own):
                if time.perf_counter() >= until:
                    break
                once(connection, ask, tally)
        except (OSError, http.client.HTTPException, ValueError) as error:
            tally.failures.append(repr(error))
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=pair) for pair in zip(asks, tallies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Tally(
        [value for tally in tallies for value in tally.first_token_ms],
        sum(tally.tokens for tally in tallies),
        sum(tally.refused for tally in tallies),
        [failure for tally in tallies for failure in tally.failures],
    )


class Server:
    """The server's process."""

    def __init__(self, packages: list[Path], threads: int | None, *options: str) -> None:
        command = [sys.executable, "-m", "promprune.runtime.commands.serve", "--port", "0", *options]
        command += map(str, packages)
        if threads is not None:
            command += ["--num-threads", str(threads)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            if '"listening"' in line:
                self.port = json.loads(line)["port"]
                break
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)  # or the pipe would fill up
        self._reader.start()

    def rss_mb(self) -> float:
        """Return the resident memory, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6


@contextmanager
def serving(packages: list[Path], threads: int | None, *options: str) -> Iterator[Server]:
    server = Server(packages, threads, *options)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


def measure_load(server: Server, asks: list[list[Ask]], seconds: float) -> dict[str, Any]:
    """Ask from all clients at once, and sample the memory once per second."""
    samples: list[tuple[float, float]] = []
    done = threading.Event()
    start = time.perf_counter()

    def sample() -> None:
        while not done.wait(1):
            samples.append((time.perf_counter() - start, server.rss_mb()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    tally = run_clients(server.port, asks, seconds, stream_once)
    done.set()
    sampler.join()
    late = [rss for when, rss in samples if when >= seconds / 3] or [server.rss_mb()]
    percentiles = quantiles(tally.first_token_ms, n=100) if len(tally.first_token_ms) > 1 else [0.0] * 99
    return {
        "clients": len(asks),
        "seconds": seconds,
        "answers": len(tally.first_token_ms),
        "failures": len(tally.failures) + tally.refused,
        "first_failures": tally.failures[:3],
        "first_token_p50_ms": round(percentiles[49], 1),
        "first_token_p99_ms": round(percentiles[98], 1),
        "rss_mb": round(late[-1], 1),
        "rss_growth_last_two_thirds": round(max(late) / late[0] - 1, 4),
    }


def measure_batching(server: Server, packages: list[Path], seconds: float, rounds: int) -> dict[str, Any]:
    """Compare the tokens per second of many clients with those of one, in turns."""
    name = model_name(read_manifest(packages[0]), packages[0])
    fields = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
    scenes = [render_scene(TEST_SEEDS[number]) for number in range(MANY)]
    asks = [[Ask(body_of(name, scene.image, questions(scene)[0].text, **fields), "")] for scene in scenes]
    rates: dict[int, list[float]] = {1: [], MANY: []}
    failures: list[str] = []
    run_clients(server.port, asks, 1, complete_once)  # encodes the images
    for number in range(rounds):
        for count in sorted(rates, reverse=bool(number % 2)):
            start = time.perf_counter()
            tally = run_clients(server.port, asks[:count], seconds, complete_once)
            rates[count].append(tally.tokens / (time.perf_counter() - start))
            failures += tally.failures
    found = {count: median(values) for count, values in rates.items()}
    return {
        "new_tokens": NEW_TOKENS,
        "one_client_tokens_per_s": round(found[1], 1),
        f"{MANY}_clients_tokens_per_s": round(found[MANY], 1),
        "ratio": round(found[MANY] / found[1], 2),
        "ratios": [round(many / one, 2) for one, many in zip(rates[1], rates[MANY], strict=True)],
        "failures": len(failures),
        "first_failures": failures[:3],
    }


def measure_overload(
    packages: list[Path], threads: int | None, asks: list[list[Ask]], seconds: float
) -> dict[str, Any]:
    """Ask a server with small limits from all clients at once, and then once more."""
    with serving(packages, threads, "--max-batch", "2", "--max-queue", "4") as server:
        tally, after = run_clients(server.port, asks, seconds, stream_once), Tally()
        stream_once(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60), asks[0][0], after)
    failures = [*tally.failures, *after.failures]
    return {
        "answers": len(tally.first_token_ms),
        "refused": tally.refused,
        "answers_afterwards": len(after.first_token_ms),
        "failures": len(failures) + (tally.refused == 0) + after.refused,
        "first_failures": failures[:3],
    }


def measure_restart(packages: list[Path], threads: int | None, ask: Ask) -> dict[str, Any]:
    """Kill a server under load, start another one, and time its first answer."""
    server = Server(packages, threads)
    tally = Tally()
    server.process.kill()
    server.process.wait()
    start = time.perf_counter()
    with serving(packages, threads) as restarted:
        stream_once(http.client.HTTPConnection("127.0.0.1", restarted.port, timeout=60), ask, tally)
        return {"first_answer_s": round(time.perf_counter() - start, 2), "failures": len(tally.failures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, metavar="PACKAGE")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--batch-seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    asks = make_asks(args.packages, args.clients)
    with serving(args.packages, args.threads) as server:
        load = measure_load(server, asks, args.seconds)
        batching = measure_batching(server, args.packages, args.batch_seconds, args.rounds)
    overload = measure_overload(args.packages, args.threads, asks, args.batch_seconds)
    restart = measure_restart(args.packages, args.threads, asks[0][0])
    cpus = len(os.sched_getaffinity(0))
    parts = {"load": load, "batching": batching, "overload": overload, "restart": restart}
    print(json.dumps({"cpus": cpus, **parts}))
    sys.exit(any(part["failures"] for part in parts.values()))


if __name__ == "__main__":
    main()
