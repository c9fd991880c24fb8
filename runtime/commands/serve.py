"""``promprune-serve``: answer over HTTP, as OpenAI's chat completions do, with exported packages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from promprune.errors import ConfigError
from promprune.runtime.commands.options import (
    Backend,
    CheckWeights,
    CudaGraphs,
    MaxImagePixels,
    NumThreads,
    PrefillChunk,
    Provider,
    Version,
    integer_option,
    number_option,
)
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.terminal import missing_extra, run_command

__all__ = ["main", "serve"]


def serve(
    packages: Annotated[
        list[str],
        typer.Argument(
            help="Folders written by promprune-export. NAME=FOLDER serves a folder as NAME@RATIO.",
            metavar="PACKAGE",
            show_default=False,
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", metavar="ADDRESS")
    ] = ServerConfig.host,
    port: Annotated[int, integer_option("Port to listen on; 0 for a free one.", "PORT")] = ServerConfig.port,
    max_batch: Annotated[
        int, integer_option("Most requests of one language model that run at once.")
    ] = ServerConfig.max_batch,
    max_queue: Annotated[
        int, integer_option("Most accepted requests that do not run yet; further ones get status 429.")
    ] = ServerConfig.max_queue,
    max_cache_tokens: Annotated[
        int | None, integer_option("Most positions of the KV cache of one language model.", show_default="no limit")
    ] = ServerConfig.max_cache_tokens,
    max_new_tokens: Annotated[int, integer_option("Most tokens of one answer.")] = ServerConfig.max_new_tokens,
    max_images: Annotated[int, integer_option("Most images of one request.")] = ServerConfig.max_images,
    max_body_bytes: Annotated[int, integer_option("Most bytes of one request.")] = ServerConfig.max_body_bytes,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images from http: and https: URLs of public addresses.")
    ] = ServerConfig.allow_remote_images,
    request_timeout: Annotated[
        float, number_option("Most seconds for one answer.", "SECONDS")
    ] = ServerConfig.request_timeout_s,
    drain_timeout: Annotated[
        float, number_option("Most seconds that a shutdown waits for accepted requests.", "SECONDS")
    ] = ServerConfig.drain_timeout_s,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys, one per line; every call of /v1 needs one of them.", metavar="FILE"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may call the server from a browser; repeat it.", metavar="ORIGIN"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host header that is answered; repeat it. Default: this machine's own names on a loopback address, "
            "else any.",
            metavar="NAME",
        ),
    ] = None,
    backend: Backend = RuntimeConfig.backend,
    provider: Provider = RuntimeConfig.provider,
    num_threads: NumThreads = RuntimeConfig.num_threads,
    prefill_chunk: PrefillChunk = RuntimeConfig.prefill_chunk,
    cuda_graphs: CudaGraphs = RuntimeConfig.cuda_graphs,
    max_image_pixels: MaxImagePixels = RuntimeConfig.max_image_pixels,
    check_weights: CheckWeights = RuntimeConfig.check_weights,
    version: Version = False,
) -> None:
    """Serve exported packages over HTTP, with OpenAI's API for chat completions.

    Packages of one language model with different ratios share it; a client chooses the ratio by the name of the model,
    such as llava-1.5-7b-hf@0.12. Logs go to stderr, one JSON object per line.

    Examples:

      promprune-serve llava-0.12

      promprune-serve llava-0.12 llava-1.0 --host 0.0.0.0 --api-keys keys.txt
    """
    settings = ServerConfig(
        host=host,
        port=port,
        max_batch=max_batch,
        max_queue=max_queue,
        max_cache_tokens=max_cache_tokens,
        max_new_tokens=max_new_tokens,
        max_images=max_images,
        max_body_bytes=max_body_bytes,
        allow_remote_images=allow_remote_images,
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        api_keys=_read_keys(api_keys),
        allowed_origins=tuple(allow_origin or ()),
        allowed_hosts=tuple(allow_host or ()),
    )
    loading = RuntimeConfig(
        backend=backend,
        provider=provider,  # type: ignore[arg-type]  # RuntimeConfig checks it
        num_threads=num_threads,
        prefill_chunk=prefill_chunk,
        cuda_graphs=cuda_graphs,
        max_image_pixels=max_image_pixels,
        check_weights=check_weights,
    )
    _serve(packages, settings, loading)


def main() -> None:
    """Entry point of ``promprune-serve``."""
    run_command(serve)


def _serve(packages: list[str], settings: ServerConfig, loading: RuntimeConfig) -> None:
    with missing_extra("server"):
        from promprune.runtime.server.app import make_app
        from promprune.runtime.server.http import bind, serve
        from promprune.runtime.server.logs import configure_logs, log_event
        from promprune.runtime.server.models import ModelCatalog
    with bind(settings) as listening, ModelCatalog.load(packages, loading) as catalog:
        configure_logs()
        if not settings.is_local and not settings.api_keys:
            log_event("open", logging.WARNING, reason="everybody who reaches this address may ask; see --api-keys")
        for model in catalog:
            model.warm_up()
            log_event("model", name=model.name, device=model.pipeline.device)
        serve(make_app(catalog, settings), settings, listening)


def _read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys of a file: its lines that are not empty."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", expected="a text file with one key per line") from error
    if not keys:
        raise ConfigError(f"{path} has no keys", expected="one key per line")
    return keys


if __name__ == "__main__":
    main()
