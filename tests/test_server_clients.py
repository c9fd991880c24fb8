"""The server with clients that others wrote, and with requests that are generated from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # else imported while a server's thread runs, which CPython 3.11 can fail at
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.fake_package import write_fake_package
from tests.support.server import RunningServer, image_part, picture, running_server, text_part

MODEL = "fake@0.25"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("packages") / "pruned"
    write_fake_package(folder)
    with running_server(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model") as missing:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "a"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    remote: Any = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(openai.BadRequestError, match="this server fetches no images") as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [remote]}])
    assert (refused.value.code, refused.value.param) == ("remote_image", "messages[0].content[0].image_url.url")
    with pytest.raises(openai.BadRequestError, match="`n` is supported only with the value 1"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}], n=2)


def test_a_message_of_the_openai_client_can_be_sent_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [image_part(picture(1)), text_part("a")]}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    messages += [first.choices[0].message, {"role": "user", "content": "b"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_the_stream_of_the_openai_client_ends_early(client: openai.OpenAI, server: RunningServer) -> None:
    with client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a"}],
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
    server.wait_until_idle()


def test_langchain_answers_and_streams(server: RunningServer, client: openai.OpenAI) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model=MODEL,
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key="none",  # type: ignore[arg-type]
        max_completion_tokens=8,
        temperature=0,
        stream_usage=True,
    )
    messages = [SystemMessage("Be brief."), HumanMessage([image_part(picture(1)), text_part("What is it?")])]
    wanted = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [image_part(picture(1)), text_part("What is it?")]},  # type: ignore[list-item]
        ],
        max_completion_tokens=8,
    )
    answer = model.invoke(messages)
    assert answer.content == wanted.choices[0].message.content
    assert wanted.usage is not None
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == wanted.usage.prompt_tokens
    assert "".join(str(chunk.content) for chunk in model.stream(messages)) == answer.content


def fuzz(server: RunningServer, examples: int) -> int:
    """Send requests that the document allows, and ones that it forbids; return how many there were."""
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    schema.config.update(base_url=f"http://127.0.0.1:{server.port}")
    sent = 0
    for operation in schema.get_all_operations():
        made = operation.ok()
        modes = [made.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @given(st.one_of(modes))
        @settings(
            max_examples=examples if "chat" in made.path else max(5, examples // 10),
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        )
        def check(case: Any) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=CHECKS, timeout=30)

        check()
    return sent


def test_generated_requests(server: RunningServer) -> None:
    assert fuzz(server, 40) > 40
    server.wait_until_idle()


@pytest.mark.slow
def test_many_generated_requests(server: RunningServer) -> None:
    assert fuzz(server, 500) > 500
    server.wait_until_idle()
