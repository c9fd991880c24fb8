"""Settings of the server: its address, its limits, and who may use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from promprune.checks import check_integer, check_number, require

__all__ = ["ServerConfig"]

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_MAX_TIMEOUT_S: Final = 86_400


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the server.

    Attributes:
        host, port: the address to listen on; port 0 for any free one.
        max_batch: most requests of one language model that run at once; each holds a KV cache slot.
        max_queue: most accepted requests per language model that do not run yet; further ones get status 429.
        max_cache_tokens: most positions of the KV cache of one language model; None for no limit.
        max_prefill_tokens: most tokens of the prompts that start in one step, so that running answers wait less.
        max_new_tokens: most tokens of one answer.
        max_images: most images of one request.
        max_body_bytes: most bytes of one request's body.
        allow_remote_images: fetch images that are named by http: and https: URLs, from public addresses.
        request_timeout_s: most seconds from the end of a request's body to the end of its answer.
        body_timeout_s: most seconds in which a request's body must arrive.
        header_timeout_s: most seconds in which a request's headers must arrive.
        drain_timeout_s: most seconds that a shutdown waits for accepted requests.
        api_keys: keys of which every request to ``/v1`` must have one; empty if none is needed.
        allowed_origins: origins of web pages that browsers may let call the server (CORS).
        allowed_hosts: ``Host`` headers that are answered, without port; empty for any, except that a server on a
            loopback address answers requests to that address only, which stops DNS rebinding.

    Raises:
        ConfigError: a value has the wrong type, or is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16
    max_queue: int = 64
    max_cache_tokens: int | None = None
    max_prefill_tokens: int = 2048
    max_new_tokens: int = 1024
    max_images: int = 8
    max_body_bytes: int = 32 * 1024 * 1024
    allow_remote_images: bool = False
    request_timeout_s: float = 120.0
    body_timeout_s: float = 30.0
    header_timeout_s: float = 10.0
    drain_timeout_s: float = 130.0
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.host), "host", self.host, "a name or an address")
        check_integer(self, "port", least=0, most=65_535)
        check_integer(self, "max_queue", least=0)
        check_integer(self, "max_cache_tokens", least=1, optional=True)
        for name in ("max_batch", "max_prefill_tokens", "max_new_tokens", "max_images", "max_body_bytes"):
            check_integer(self, name, least=1)
        for name in ("request_timeout_s", "body_timeout_s", "header_timeout_s", "drain_timeout_s"):
            valid = f"a number of seconds above 0, at most {_MAX_TIMEOUT_S}"
            check_number(self, name, lambda value: 0 < value <= _MAX_TIMEOUT_S, valid)
        for key in self.api_keys:
            require(len(key) >= 16, "api_keys", f"a key of {len(key)} characters", "at least 16 characters per key")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in _LOOPBACK

    @property
    def answered_hosts(self) -> tuple[str, ...]:
        """The ``Host`` headers that are answered, without port; empty for any."""
        if self.allowed_hosts or not self.is_local:
            return self.allowed_hosts
        return _LOOPBACK
