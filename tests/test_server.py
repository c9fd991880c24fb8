"""The server: every answer is the one that the runtime gives, and every refusal is an error in OpenAI's format."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from promprune.errors import ConfigError
from promprune.runtime import RuntimeConfig, VisionLanguagePipeline, load_image
from promprune.runtime.server.models import ModelCatalog
from tests.support.fake_package import NUM_TOKENS, FakeModel, write_fake_package
from tests.support.server import RunningServer, encoded, image_part, picture, running_server, text_part

PRUNED, FULL = "fake@0.25", "fake@1.0"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model with 4 and with all 16 visual tokens."""
    folder = tmp_path_factory.mktemp("packages")
    write_fake_package(folder / "pruned")
    write_fake_package(folder / "full", FakeModel(keep_tokens=NUM_TOKENS))
    return [folder / "pruned", folder / "full"]


@pytest.fixture(scope="module")
def server(packages: list[Path]) -> Iterator[RunningServer]:
    with running_server(*packages, max_images=3, max_new_tokens=200, max_body_bytes=200_000) as running:
        yield running


@pytest.fixture(scope="module")
def pipelines(packages: list[Path]) -> Iterator[dict[str, VisionLanguagePipeline]]:
    """The same packages, without the server."""
    pruned, full = (VisionLanguagePipeline.from_package(package, provider="cpu") for package in packages)
    with pruned, full:
        yield {PRUNED: pruned, FULL: full}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, and check that it is in OpenAI's format."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream that ends as it should."""
    *events, last, nothing = text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("model", [PRUNED, FULL])
def test_the_openai_client_gets_the_answer_of_the_runtime(
    client: openai.OpenAI, pipelines: dict[str, VisionLanguagePipeline], model: str
) -> None:
    got = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [image_part(picture(1)), text_part("What is it?")]}],  # type: ignore[list-item]
        max_completion_tokens=12,
    )
    wanted = pipelines[model].generate(encoded(picture(1)), "What is it?", max_new_tokens=12)
    assert got.choices[0].message.content == wanted.text.lstrip()
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert got.usage is not None
    assert got.usage.prompt_tokens == wanted.timings.prompt_tokens
    assert got.usage.completion_tokens == len(wanted.token_ids)
    detail = got.usage.prompt_tokens_details
    assert (detail.visual_tokens, detail.kept_tokens) == (16, wanted.selection[0].keep_tokens)  # type: ignore[union-attr]
    image = got.model_extra["promprune"]["images"][0]  # type: ignore[index]
    assert image["token_indices"] == wanted.selection[0].token_indices.tolist()
    assert image["saliency_count"] == wanted.selection[0].saliency_count
    assert image["grids"] == [{"rows": 4, "columns": 4, "left": 0, "top": 0, "width": 32, "height": 32}]
    assert (image["view_width"], image["view_height"]) == (32, 32)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, pipelines: dict[str, VisionLanguagePipeline]) -> None:
    chunks = list(
        client.chat.completions.create(
            model=PRUNED,
            messages=[{"role": "user", "content": [text_part("a"), image_part(picture(2)), text_part("b")]}],  # type: ignore[list-item]
            max_completion_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    prompt = [{"role": "user", "content": parts}]
    wanted = pipelines[PRUNED].generate(encoded(picture(2)), prompt, max_new_tokens=20, ignore_eos=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted.text.lstrip()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].model_extra["promprune"]["images"][0]["kept_tokens"] == 4  # type: ignore[index]
    timings = chunks[-2].model_extra["promprune"]["timings"]  # type: ignore[index]
    assert timings["first_token_ms"] >= timings["prefill_ms"] + timings["queue_ms"]


def test_without_usage_a_stream_has_none(server: RunningServer) -> None:
    got = server.chat(PRUNED, text_part("a"), stream=True, max_tokens=3)
    assert got.headers["content-type"].startswith("text/event-stream")
    assert all("usage" not in event for event in events_of(got.text))


def test_settings_reach_the_runtime(server: RunningServer, pipelines: dict[str, VisionLanguagePipeline]) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "top_k": 50, "repetition_penalty": 1.2}
    got = server.chat(FULL, text_part("a"), max_tokens=30, stop=["e"], ignore_eos=True, **options).json()
    wanted = pipelines[FULL].generate([], "a", max_new_tokens=30, stop=["e"], ignore_eos=True, **options)
    assert got["choices"][0]["message"]["content"] == wanted.text.lstrip()
    assert got["choices"][0]["finish_reason"] == wanted.finish_reason


def test_a_conversation_is_rendered_with_all_its_turns(
    server: RunningServer, pipelines: dict[str, VisionLanguagePipeline]
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [image_part(picture(1)), text_part("What?")]},
        {"role": "assistant", "content": "A circle.", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": [text_part("And here?"), image_part(picture(2))]},
    ]
    body = {"model": FULL, "messages": messages, "max_tokens": 8}
    got = server.client.post("/v1/chat/completions", json=body).json()
    image = {"type": "image"}
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, image]},
    ]
    wanted = pipelines[FULL].generate([encoded(picture(1)), encoded(picture(2))], prompt, max_new_tokens=8)
    assert got["choices"][0]["message"]["content"] == wanted.text.lstrip()
    assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "visual_tokens": 32, "kept_tokens": 32}


def test_many_clients_at_once_get_their_own_answers(
    server: RunningServer, pipelines: dict[str, VisionLanguagePipeline]
) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        model = (PRUNED, FULL)[number % 2]
        got = server.chat(model, image_part(picture(number)), text_part("What?"), max_tokens=20, ignore_eos=True)
        found[number] = got.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(12):
        pipeline = pipelines[(PRUNED, FULL)[number % 2]]
        wanted = pipeline.generate(encoded(picture(number)), "What?", max_new_tokens=20, ignore_eos=True)
        assert found[number] == wanted.text.lstrip()
    server.wait_until_idle()


def test_views_are_what_the_model_sees(server: RunningServer, pipelines: dict[str, VisionLanguagePipeline]) -> None:
    asked: dict[str, Any] = {"max_tokens": 1, "promprune": {"views": True}}
    content = [image_part(picture(4)), text_part("a")]
    whole = server.chat(PRUNED, *content, **asked).json()["promprune"]["images"][0]
    stream = events_of(server.chat(PRUNED, *content, stream=True, **asked).text)
    assert stream[0]["promprune"]["images"] == [whole]
    view = load_image(base64.b64decode(whole["view"].removeprefix("data:image/jpeg;base64,")))
    assert view.size == (whole["view_width"], whole["view_height"])
    wanted = np.asarray(pipelines[PRUNED].encoder.view(encoded(picture(4)))).astype(int)
    assert np.abs(np.asarray(view) - wanted).mean() < 40  # a JPEG of noise
    assert "view" not in server.chat(PRUNED, *content, max_tokens=1).json()["promprune"]["images"][0]


def test_models_are_listed_with_their_ratios(client: openai.OpenAI, server: RunningServer) -> None:
    models = {model.id: model.model_extra["promprune"] for model in client.models.list()}  # type: ignore[index]
    assert models[PRUNED] == {
        "ratio": 0.25,
        "visual_tokens": 16,
        "kept_tokens": 4,
        "context_length": 256,
        "max_images": 3,
    }
    assert models[FULL]["kept_tokens"] == 16
    assert client.models.retrieve(PRUNED).id == PRUNED
    assert error_of(server.client.get("/v1/models/none"), 404)["code"] == "model_not_found"


def test_the_openapi_document_names_the_models(server: RunningServer) -> None:
    document = server.client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert schema["model"] == {"enum": [PRUNED, FULL]}
    assert schema["n"]["enum"] == [1, None]


def test_packages_of_one_language_model_share_it(packages: list[Path]) -> None:
    with ModelCatalog.load([str(package) for package in packages], RuntimeConfig(provider="cpu")) as catalog:
        first, second = (model.pipeline for model in catalog)
        assert first.language_model is second.language_model
        assert first.encoder is not second.encoder


def test_names_of_models(packages: list[Path]) -> None:
    config = RuntimeConfig(provider="cpu")
    with ModelCatalog.load([str(packages[0]), f"other={packages[0]}"], config) as catalog:
        assert [model.name for model in catalog] == [PRUNED, "other@0.25"]
    with pytest.raises(ConfigError, match=r"two packages are called fake@0\.25"):
        ModelCatalog.load([str(packages[0]), str(packages[0])], config)


def test_state_and_metrics(server: RunningServer) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok"}
    assert server.client.get("/readyz").json() == {"status": "ready"}
    before = samples_of(server)
    server.chat(PRUNED, image_part(picture(3)), text_part("a"), max_tokens=5, ignore_eos=True)
    after = samples_of(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    label = f'{{model="{PRUNED}"}}'
    assert grown(f'promprune_requests_total{{model="{PRUNED}",outcome="length"}}') == 1
    assert grown(f"promprune_generated_tokens_total{label}") == 5
    assert grown(f"promprune_kept_tokens_sum{label}") == 4
    for name in ("first_token_seconds", "token_seconds", "spectral_entropy", "saliency_tokens"):
        assert grown(f"promprune_{name}_count{label}") == 1
    assert after["promprune_running_requests"] == after["promprune_queue_length"] == 0
    assert after["promprune_cache_slots"] == 16


def samples_of(server: RunningServer) -> dict[str, float]:
    lines = server.client.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}
