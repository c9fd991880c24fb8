"""The ASGI application: routes, middleware, and the life of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from promprune.runtime.server.body import BodyReader
from promprune.runtime.server.chat import complete_chat
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.guard import AccessLog, Guard
from promprune.runtime.server.metrics import Metrics
from promprune.runtime.server.models import ModelCatalog
from promprune.runtime.server.openapi import openapi_document
from promprune.runtime.server.page.routes import page_routes
from promprune.runtime.server.responses import error_response, json_response
from promprune.runtime.server.schema import ModelList
from promprune.runtime.server.service import ChatService, unknown_model

__all__ = ["make_app"]


def make_app(catalog: ModelCatalog, config: ServerConfig) -> Starlette:
    """Return the application that answers with the models of a catalog.

    Attributes of its ``state``: ``service`` (:class:`ChatService`) while it runs, and ``draining``, which the server
    sets to true when it stops accepting requests.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.service = ChatService(catalog, config, metrics)
        yield
        app.state.service.close()

    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )
    middleware = [
        Middleware(AccessLog, metrics),
        *([cors] if config.allowed_origins else []),
        Middleware(Guard, config),
    ]
    app = Starlette(
        routes=[*ROUTES, *page_routes()],
        middleware=middleware,
        exception_handlers={ApiError: _answer_api_error, HTTPException: _answer_http_error},  # type: ignore[dict-item]
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.bodies, app.state.draining = BodyReader(config), False
    return app


async def list_models(http: HttpRequest) -> Response:
    """``GET /v1/models``."""
    service: ChatService = http.app.state.service
    return json_response(ModelList(data=[model.card(service.config.max_images) for model in service.catalog]))


async def show_model(http: HttpRequest) -> Response:
    """``GET /v1/models/NAME``."""
    service: ChatService = http.app.state.service
    name: str = http.path_params["name"]
    model = service.catalog.find(name)
    if model is None:
        raise unknown_model(name, service.catalog)
    return json_response(model.card(service.config.max_images))


async def show_health(http: HttpRequest) -> Response:
    """``GET /healthz``: whether the process works; if not, restart it."""
    service: ChatService = http.app.state.service
    return _status("ok" if service.is_alive else "an engine's thread has ended", healthy=service.is_alive)


async def show_readiness(http: HttpRequest) -> Response:
    """``GET /readyz``: whether new requests are welcome."""
    service: ChatService = http.app.state.service
    ready = service.is_alive and not http.app.state.draining
    return _status("ready" if ready else "draining", healthy=ready)


async def show_metrics(http: HttpRequest) -> Response:
    """``GET /metrics``."""
    service: ChatService = http.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def show_openapi(http: HttpRequest) -> Response:
    """``GET /openapi.json``."""
    service: ChatService = http.app.state.service
    return json_response(openapi_document([model.name for model in service.catalog]))


def _status(text: str, *, healthy: bool) -> Response:
    return json_response({"status": text}, 200 if healthy else 503)


async def _answer_api_error(http: HttpRequest, error: ApiError) -> Response:
    http.scope["state"]["error"] = error
    return error_response(error)


async def _answer_http_error(http: HttpRequest, error: HTTPException) -> Response:
    """Answer what the router refuses: 404 and 405."""
    known = {404: "there is no such address", 405: "the method is not allowed at this address"}
    text = known.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "refused")
    return await _answer_api_error(http, ApiError(error.status_code, text, code=code, headers=error.headers))


ROUTES = [
    Route("/v1/chat/completions", complete_chat, methods=["POST"]),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
    Route("/healthz", show_health),
    Route("/readyz", show_readiness),
    Route("/metrics", show_metrics),
    Route("/openapi.json", show_openapi),
]
