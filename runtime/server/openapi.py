"""The OpenAPI document, made from the schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from promprune._version import __version__
from promprune.runtime.server.schema import ChatChunk, ChatCompletion, ChatRequest, ErrorBody, ModelCard, ModelList

__all__ = ["openapi_document"]

_ERRORS: Final = {
    "400": "The request is refused; the message says why.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "405": "The method is not allowed.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The content type is not application/json.",
    "421": "The server does not answer for this host.",
    "429": "The queue is full; try again after Retry-After seconds.",
    "500": "The server failed.",
    "504": "The request took too long.",
}
# The data of the last event is [DONE].
_EVENT: Final = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/ChatChunk"},
        }
    },
}
_COMMON: Final = ("401", "405", "421")


def openapi_document(models: Sequence[str]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these models."""
    sent = (ChatCompletion, ChatChunk, ModelCard, ModelList, ErrorBody)
    _, components = msgspec.json.schema_components((ChatRequest, *sent), ref_template="#/components/schemas/{name}")
    components["ChatRequest"]["properties"]["model"] = {"enum": list(models)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "promprune",
            "version": __version__,
            "description": "OpenAI's chat completions for packages of promprune.",
        },
        "paths": {
            "/v1/chat/completions": {"post": _chat()},
            "/v1/models": {"get": _get("List the models", "ModelList")},
            "/v1/models/{name}": {"get": _get("Describe a model", "ModelCard", parameter="name")},
            "/healthz": {"get": _get("Whether the process works", None)},
            "/readyz": {"get": _get("Whether new requests are welcome", None)},
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _chat() -> dict[str, Any]:
    content = {
        "application/json": {"schema": _reference("ChatCompletion")},
        "text/event-stream": {"itemSchema": _EVENT},  # OpenAPI 3.2's way to describe one event; 3.1 has none
    }
    return {
        "operationId": "createChatCompletion",
        "summary": "Answer a chat about images",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference("ChatRequest")}}},
        "responses": {"200": {"description": "The answer.", "content": content}, **_errors(*_ERRORS)},
    }


def _get(summary: str, schema: str | None, *, parameter: str | None = None) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "object"} if schema is None else _reference(schema)
    content = {"application/json": {"schema": described}}
    errors = _errors(*_COMMON, *(["404"] if parameter else []))
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **errors},
    }
    if schema is None:
        operation["responses"]["503"] = {"description": "No", "content": content}
    if parameter:
        schema_of = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": schema_of}]
    return operation


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference("ErrorBody")}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
