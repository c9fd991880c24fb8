"""A server on a free port, in the test's own process, and images as clients send them."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image
from starlette.applications import Starlette

from promprune.runtime import RuntimeConfig
from promprune.runtime.server.app import make_app
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.http import bind, make_server
from promprune.runtime.server.models import ModelCatalog


@dataclass
class RunningServer:
    """A server, and a client of it."""

    port: int
    app: Starlette
    client: httpx2.Client

    def chat(self, model: str, *content: dict[str, Any], **fields: Any) -> httpx2.Response:
        """Ask one question of parts."""
        messages = [{"role": "user", "content": list(content)}]
        return self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **fields})

    @property
    def lanes(self) -> list[Any]:
        """The requests that the server holds, per language model."""
        return list(self.app.state.service._lanes.values())

    def wait_until_idle(self, seconds: float = 5.0) -> None:
        """Wait until no request holds a slot or a place in the queue."""
        until = time.monotonic() + seconds
        while any(lane.accepted or lane.worker.engine.has_requests for lane in self.lanes):
            assert time.monotonic() < until, [(lane.accepted, lane.worker.engine.load) for lane in self.lanes]
            time.sleep(0.01)


@contextmanager
def running_server(*packages: Path | str, **options: Any) -> Iterator[RunningServer]:
    """Serve packages until the block ends; ``options`` are those of :class:`ServerConfig`."""
    config = ServerConfig(**{"port": 0, **options})
    loading = RuntimeConfig(provider="cpu")
    with bind(config) as listening, ModelCatalog.load([str(package) for package in packages], loading) as catalog:
        app = make_app(catalog, config)
        server = make_server(app, config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        port = listening.getsockname()[1]
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                yield RunningServer(port, app, client)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """Return an image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """Return an image as a file."""
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Return the content of a file as a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    """Return an image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(encoded(image))}}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": text}
