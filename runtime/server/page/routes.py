"""The routes of the page: static files and sample images, all kept in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from promprune.embedded.scenes import render_scene

__all__ = ["page_routes"]

_FOLDER: Final = Path(__file__).parent
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_SAMPLE_SEEDS: Final = (30_000_003, 30_000_005, 30_000_018, 30_000_009)  # scenes that index.html describes

# The page loads nothing from other hosts, and sends nothing to them, whatever an answer contains.
_HEADERS: Final = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


def page_routes() -> list[Route]:
    """Return the routes of ``/`` and of all that the page loads from ``/page/``."""
    files = {file.name: file for file in _FOLDER.iterdir() if file.suffix in _TYPES}
    index = files.pop("index.html")
    routes = [_route("/", index.read_bytes(), _TYPES[".html"])]
    routes += [_route(f"/page/{name}", file.read_bytes(), _TYPES[file.suffix]) for name, file in files.items()]
    routes += [_route(f"/page/sample-{seed}.png", _sample(seed), "image/png") for seed in _SAMPLE_SEEDS]
    return routes


def _route(path: str, content: bytes, media_type: str) -> Route:
    async def show(http: HttpRequest) -> Response:
        del http
        return Response(content, headers=_HEADERS, media_type=media_type)

    return Route(path, show)


def _sample(seed: int) -> bytes:
    """Render a scene of the embedded model as a PNG file."""
    content = io.BytesIO()
    render_scene(seed).image.save(content, "PNG")
    return content.getvalue()
