"""Metrics for Prometheus. Times are in seconds, as its conventions ask for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from promprune.runtime.engine.request import Request

__all__ = ["Metrics"]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKENS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHARES: Final = tuple(tenth / 10 for tenth in range(1, 11))


class Watched(Protocol):
    """A lane, as the metrics see it."""

    worker: Any
    accepted: int

    @property
    def waiting(self) -> int:
        """Number of accepted requests that do not run yet."""


class Metrics:
    """Everything that ``/metrics`` shows."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"promprune_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Collection[float]) -> Histogram:
            return Histogram(f"promprune_{name}", text, ["model"], buckets=tuple(buckets), registry=registry)

        self._requests = counter("requests", "Chat completions by how they ended.", "model", "outcome")
        self._responses = counter("http_responses", "HTTP responses by status.", "status")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts, kept visual tokens included.", "model")
        self._new_tokens = counter("generated_tokens", "Generated tokens.", "model")
        self._images = counter("images", "Images by whether the vision encoder ran for them.", "model", "encoded")
        self._first = histogram("first_token_seconds", "From the request to the first token.", _SECONDS)
        self._each = histogram("token_seconds", "Per token after the first.", _TOKEN_SECONDS)
        self._total = histogram("request_seconds", "From the request to the last token.", _SECONDS)
        self._kept = histogram("kept_tokens", "Kept visual tokens per image.", _TOKENS)
        self._saliency = histogram("saliency_tokens", "T_sal: tokens kept for saliency per image.", _TOKENS)
        self._entropy = histogram("spectral_entropy", "Normalised spectral entropy per image.", _SHARES)

    def watch(self, lanes: Iterable[Watched], max_batch: int) -> None:
        """Show how many requests wait and run in these lanes, together."""
        self._registry.register(_LaneCollector(list(lanes), max_batch))

    def note_response(self, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(str(status)).inc()

    def note_end(self, model: str, outcome: str, request: Request | None) -> None:
        """Count a request that ended; times and tokens only of complete answers."""
        self._requests.labels(model, outcome).inc()
        if request is None or request.finish_reason is None:
            return
        timings = request.result().timings
        self._prompt_tokens.labels(model).inc(timings.prompt_tokens)
        self._new_tokens.labels(model).inc(timings.new_tokens)
        self._images.labels(model, "now").inc(timings.encoded_images)
        self._images.labels(model, "before").inc(len(request.images) - timings.encoded_images)
        self._first.labels(model).observe(timings.first_token_ms / 1000)
        self._total.labels(model).observe(timings.total_ms / 1000)
        if timings.decode_tokens_per_s:
            self._each.labels(model).observe(1 / timings.decode_tokens_per_s)
        for image in request.encoded_images:
            self._kept.labels(model).observe(image.selection.keep_tokens)
            if image.selection.ran:
                self._saliency.labels(model).observe(image.selection.saliency_count or 0)
                self._entropy.labels(model).observe(image.selection.spectral_entropy or 0.0)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _LaneCollector(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, lanes: list[Watched], max_batch: int) -> None:
        self._lanes = lanes
        self._max_batch = max_batch

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield the gauges."""
        loads = [lane.worker.engine.load for lane in self._lanes]
        gauges = {
            "queue_length": ("Accepted requests that do not run yet.", sum(lane.waiting for lane in self._lanes)),
            "running_requests": ("Requests that hold a KV cache slot.", sum(load.running for load in loads)),
            "cache_slots": ("KV cache slots.", self._max_batch * len(loads)),
            "cache_tokens": ("Reserved positions of the KV cache.", sum(load.cache_tokens for load in loads)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"promprune_{name}", text, value=value)
