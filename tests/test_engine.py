"""The engine: every request gets the answer that it gets alone, whichever others arrive, leave or fail."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from promprune.errors import BackendError, ConfigError, PackageError
from promprune.export import ExportResult
from promprune.runtime import EncodedImage, Engine, Request, Result, VisionLanguagePipeline
from promprune.runtime.engine.cache import CachedPrefix
from tests.support.fake_package import write_fake_package

TEXTS = ("a", "What is it?", "How many red shapes are there? " * 3, "Is the circle left of the square?")
# The embedded model ends its answers after a word, surely: a penalty, or a high temperature, lets it go on with tokens
# that depend on everything before.
SAMPLING: tuple[Mapping[str, Any], ...] = (
    {},
    {"repetition_penalty": 5.0, "ignore_eos": True},
    {"repetition_penalty": 2.0, "ignore_eos": True, "stop": ("e", "3")},
    {"temperature": 5.0, "seed": 5, "ignore_eos": True},
)
LENGTHS = (1, 2, 5, 9)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8))


class Ask(NamedTuple):
    """A request of a schedule.

    Attributes:
        text, images: the question, and the number of pictures.
        encoded: whether the pictures are encoded before.
        follows: whether it is the second turn of a conversation whose keys and values are kept; for some requests they
            can be reused only up to the text of the first turn, which differs.
        sampling, length: settings of choosing tokens, and the largest number of tokens.
        arrives: the step before which it is added.
        cancelled: number of steps after which it is cancelled; None for never.
    """

    text: int
    images: int
    encoded: bool
    follows: bool
    sampling: int
    length: int
    arrives: int
    cancelled: int | None


class Schedule(NamedTuple):
    """Requests, and the limits of an engine."""

    asks: list[Ask]
    max_batch: int | None
    max_cache_tokens: int | None


ASKS = st.builds(
    Ask,
    text=st.integers(0, len(TEXTS) - 1),
    images=st.sampled_from((0, 0, 1, 2)),
    encoded=st.booleans(),
    follows=st.booleans(),
    sampling=st.integers(0, len(SAMPLING) - 1),
    length=st.sampled_from(LENGTHS),
    arrives=st.integers(0, 12),
    cancelled=st.sampled_from((None, None, None, 0, 1, 3)),
)
SCHEDULES = st.builds(
    Schedule,
    asks=st.lists(ASKS, min_size=1, max_size=6),
    max_batch=st.sampled_from((None, 1, 2, 3)),
    max_cache_tokens=st.sampled_from((None, 0, 100, 250)),  # beyond the largest request
)


class Model:
    """A pipeline, with the answers it gives alone."""

    def __init__(self, pipeline: VisionLanguagePipeline) -> None:
        self.pipeline = pipeline
        self.alone = cache(self._alone)
        self.images = cache(lambda number: pipeline.encode_image(picture(number)))
        self.turn = cache(self._turn)

    def request(self, ask: Ask) -> Request:
        pictures = [self.images(n) if ask.encoded else picture(n) for n in range(ask.images)]
        options = {**SAMPLING[ask.sampling], "max_new_tokens": ask.length}
        if not ask.follows:
            return self.pipeline.request(pictures, TEXTS[ask.text], **options)
        first, prefix = self.turn()
        images = [*first.encoded_images, *pictures]
        parts = [{"type": "image"}] * len(pictures)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXTS[1 + 2 * (ask.text % 2)]}]},
            {"role": "assistant", "content": first.text.strip()},
            {"role": "user", "content": [*parts, {"type": "text", "text": TEXTS[ask.text]}]},
        ]
        return self.pipeline.request(images, messages, prefix=prefix, **options)

    def _turn(self) -> tuple[Request, CachedPrefix]:
        """Run the first turn of a conversation."""
        engine = self.pipeline.engine()
        request = engine.add(self.pipeline.request(picture(0), TEXTS[1], keep_cache=True, max_new_tokens=4))
        while engine.has_requests:
            engine.step()
        assert request.cached_prefix is not None
        return request, request.cached_prefix

    def _alone(self, ask: Ask) -> tuple[Result, np.ndarray]:
        request = self.request(ask)
        request.prefix, request.reused_tokens = None, 0  # what was said before is prefilled again
        engine, logits = self.pipeline.engine(), record_logits(request)
        engine.add(request)
        while engine.has_requests:
            engine.step()
        return request.result(), np.stack(logits)


def record_logits(request: Request) -> list[np.ndarray]:
    """Return a list that gets the logits of every token that is chosen for a request."""
    rows: list[np.ndarray] = []
    choose = request.choose_token

    def recording(logits: np.ndarray) -> str:
        rows.append(logits.copy())
        return choose(logits)

    request.choose_token = recording  # type: ignore[method-assign]
    return rows


def check_schedule(model: Model, schedule: Schedule) -> None:
    """Run a schedule, and compare every answer with the one that the request gets alone."""
    requests = [(ask, model.request(ask)) for ask in schedule.asks]
    limit = schedule.max_cache_tokens
    if limit is not None:
        limit += max(request.most_tokens for _, request in requests)
    engine = model.pipeline.engine(max_batch=schedule.max_batch, max_cache_tokens=limit)
    texts: dict[Request, str] = {request: "" for _, request in requests}
    logits = {request: record_logits(request) for _, request in requests}
    for step in count():
        for ask, request in requests:
            if step == ask.arrives:
                engine.add(request)
            if ask.cancelled is not None and step == ask.arrives + ask.cancelled:
                engine.cancel(request)
        for request, text in engine.step():
            assert not request.cancelled
            texts[request] += text
        check_limits(requests, schedule.max_batch, limit)
        if not engine.has_requests and all(step >= ask.arrives for ask in schedule.asks):
            break
    for ask, request in requests:
        expected, expected_logits = model.alone(ask._replace(arrives=0, cancelled=None, encoded=True))
        found_logits = np.array(logits[request]).reshape(-1, expected_logits.shape[1])
        np.testing.assert_allclose(found_logits, expected_logits[: len(found_logits)], rtol=1e-3, atol=1e-3)
        assert request.slot is None
        if request.cancelled:
            assert tuple(request.token_ids) == expected.token_ids[: len(request.token_ids)]
        else:
            found = request.result()
            assert found.token_ids == expected.token_ids
            assert found.text == expected.text == texts[request]
            assert found.finish_reason == expected.finish_reason


def check_limits(requests: list[tuple[Ask, Request]], max_batch: int | None, max_cache_tokens: int | None) -> None:
    slots = [request.slot for _, request in requests if request.slot is not None]
    rows = {id(slot.cache): slot.cache.batch * int(slot.cache.lengths.max()) for slot in slots}
    assert max_batch is None or len(slots) <= max_batch
    assert max_cache_tokens is None or sum(rows.values()) <= max_cache_tokens


@pytest.fixture(scope="module", params=["portable", "lowered"])
def embedded(
    request: pytest.FixtureRequest, embedded_export: ExportResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    package, lowered = embedded_export.output, request.param == "lowered"
    if not lowered:
        ignored = shutil.ignore_patterns("engines")
        package = shutil.copytree(package, tmp_path_factory.mktemp("packages") / "portable", ignore=ignored)
    with VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1) as pipeline:
        assert any(note.startswith("decoder lowered") for note in pipeline.notes) == lowered
        yield Model(pipeline)


@settings(max_examples=60, deadline=None)
@given(schedule=SCHEDULES)
def test_every_schedule_gives_the_answers_of_requests_alone(embedded: Model, schedule: Schedule) -> None:
    check_schedule(embedded, schedule)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(schedule=SCHEDULES)
def test_500_schedules_give_the_answers_of_requests_alone(embedded: Model, schedule: Schedule) -> None:
    check_schedule(embedded, schedule)


# One request at a time, with the fake package


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[VisionLanguagePipeline]:
    write_fake_package(tmp_path / "package")
    with VisionLanguagePipeline.from_package(tmp_path / "package", provider="cpu", num_threads=1) as loaded:
        yield loaded


def ask(pipeline: VisionLanguagePipeline, text: str, images: Any = (), **options: Any) -> Request:
    return pipeline.request(images, text, **{"max_new_tokens": 6, "ignore_eos": True, **options})


def answer(engine: Engine) -> None:
    while engine.has_requests:
        engine.step()


def test_requests_start_in_the_order_of_their_arrival(pipeline: VisionLanguagePipeline) -> None:
    engine = pipeline.engine(max_batch=2)
    requests = [engine.add(ask(pipeline, "x" * (1 + n), max_new_tokens=2 + n)) for n in range(4)]
    started: list[list[int]] = []
    while engine.has_requests:
        engine.step()
        started.append([n for n, request in enumerate(requests) if request.token_ids])
    assert started == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3], *[[0, 1, 2, 3]] * (len(started) - 4)]
    assert [len(request.token_ids) for request in requests] == [2, 3, 4, 5]


def test_a_request_that_waits_for_memory_is_not_overtaken(pipeline: VisionLanguagePipeline) -> None:
    """Two rows of the larger one do not fit, but the small one would."""
    sizes = [ask(pipeline, text).most_tokens for text in ("x" * 50, "x" * 80, "y")]
    engine = pipeline.engine(max_cache_tokens=sum(sizes[:2]))
    large, larger, small = (engine.add(ask(pipeline, text)) for text in ("x" * 50, "x" * 80, "y"))
    engine.step()
    assert [len(request.token_ids) for request in (large, larger, small)] == [
        1,
        0,
        0,
    ]
    answer(engine)
    assert all(request.finish_reason == "length" for request in (large, larger, small))


def test_few_prompts_start_in_one_step_if_their_tokens_are_limited(pipeline: VisionLanguagePipeline) -> None:
    texts = ("x" * 50, "y", "y", "x" * 80, "y")
    one, short = (len(ask(pipeline, text).prompt_ids) for text in texts[:2])
    engine = pipeline.engine(max_prefill_tokens=one + short)
    requests = [engine.add(ask(pipeline, text)) for text in texts]
    started = []
    for _ in range(4):
        engine.step()
        started.append(sum(bool(request.token_ids) for request in requests))
    assert started == [2, 3, 4, 5]  # the largest prompt exceeds the limit, and starts alone
    answer(engine)
    assert all(request.finish_reason == "length" for request in requests)


def test_an_engine_tells_its_load(pipeline: VisionLanguagePipeline) -> None:
    engine = pipeline.engine(max_batch=2)
    requests = [engine.add(ask(pipeline, text)) for text in ("a", "bbb", "c")]
    assert engine.load == (3, 0, 0)
    engine.step()
    assert engine.load == (1, 2, 2 * requests[1].most_tokens)
    answer(engine)
    assert engine.load == (0, 0, 0)


def test_a_request_that_never_fits_is_refused(pipeline: VisionLanguagePipeline) -> None:
    engine = pipeline.engine(max_cache_tokens=10)
    with pytest.raises(ConfigError, match="up to 30 tokens; expected at most max_cache_tokens = 10"):
        engine.add(ask(pipeline, "x" * 8))
    with pytest.raises(ConfigError, match="max_batch = 0"):
        pipeline.engine(max_batch=0)
    assert not engine.has_requests


def test_cancelling_frees_the_row_at_once(pipeline: VisionLanguagePipeline) -> None:
    alone = pipeline.generate((), "b", max_new_tokens=6, ignore_eos=True).token_ids
    engine = pipeline.engine(max_batch=2)
    first, second, third = (engine.add(ask(pipeline, text)) for text in "abc")
    engine.step()
    engine.cancel(first)
    assert first.slot is None
    assert engine.step() == [(second, second.texts[-1]), (third, third.texts[-1])]
    engine.cancel(third)
    engine.step()
    assert second.slot is not None
    assert second.slot.cache.batch == 1
    answer(engine)
    assert second.result().token_ids == tuple(alone)
    for request in (first, third):
        with pytest.raises(BackendError, match="was not finished"):
            request.result()
    engine.cancel(second)  # too late: it stays answered
    assert second.result().token_ids == tuple(alone)


def test_a_waiting_request_can_be_cancelled(pipeline: VisionLanguagePipeline) -> None:
    engine = pipeline.engine(max_batch=1)
    first, second = engine.add(ask(pipeline, "a")), engine.add(ask(pipeline, "b"))
    engine.cancel(second)
    answer(engine)
    assert (len(first.token_ids), second.token_ids) == (6, [])


class BrokenTokenizer:
    def decode(self, *_: Any, **__: Any) -> str:
        raise RuntimeError("panicked")


def fail_tokenizer(pipeline: VisionLanguagePipeline, request: Request) -> None:
    del pipeline
    request._stream._tokenizer = BrokenTokenizer()  # type: ignore[assignment]


def spoil_logits(pipeline: VisionLanguagePipeline, request: Request) -> None:
    forward = pipeline.language_model.decoder.forward

    def spoiled(*args: Any) -> Any:
        logits, cache = forward(*args)
        if request.slot is not None and len(request.token_ids) == 2:
            logits = logits.copy()
            logits[request.slot.row] = np.nan
        return logits, cache

    pipeline.language_model.decoder.forward = spoiled  # type: ignore[method-assign]


def fail_encoding(pipeline: VisionLanguagePipeline, request: Request) -> None:
    encode = pipeline.encoder.encode

    def failing(image: Any) -> Any:
        if image is request.images[0]:
            raise BackendError("no more memory")
        return encode(image)

    pipeline.encoder.encode = failing  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        (fail_tokenizer, PackageError, "tokenizer fails on the answer"),
        (spoil_logits, BackendError, "not finite"),
        (fail_encoding, BackendError, "no more memory"),
    ],
)
def test_a_request_that_fails_ends_alone(
    pipeline: VisionLanguagePipeline,
    fail: Callable[[VisionLanguagePipeline, Request], None],
    kind: type[Exception],
    message: str,
) -> None:
    images = [picture(0), picture(1), picture(2)]
    expected = [pipeline.generate(image, "?", max_new_tokens=6, ignore_eos=True).token_ids for image in images]
    requests = [ask(pipeline, "?", image) for image in images]
    fail(pipeline, requests[1])
    engine, updates = pipeline.engine(), []
    for request in requests:
        engine.add(request)
    while engine.has_requests:
        updates += [request for request, _ in engine.step()]
    with pytest.raises(kind, match=message):
        requests[1].result()
    assert requests[1].slot is None
    assert [requests[n].result().token_ids for n in (0, 2)] == [expected[0], expected[2]]
    assert updates.count(requests[0]) == 6
    assert requests[1] in updates


def test_a_prefill_that_fails_or_is_interrupted_leaves_running_requests_as_they_are(
    pipeline: VisionLanguagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [pipeline.generate((), text, max_new_tokens=6, ignore_eos=True).token_ids for text in "ab"]
    engine, error = pipeline.engine(), RuntimeError("no more memory")
    running = engine.add(ask(pipeline, "a"))
    engine.step()
    interrupted = engine.add(ask(pipeline, "b"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.language_model, "splice", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.step()  # prefills it again
    failing = engine.add(ask(pipeline, "c"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.language_model, "splice", lambda *_: (_ for _ in ()).throw(error))
        engine.step()
    answer(engine)
    assert failing.error is error
    assert [request.result().token_ids for request in (running, interrupted)] == expected


def test_other_threads_add_and_cancel_while_it_steps(pipeline: VisionLanguagePipeline) -> None:
    texts = [f"question {n}" for n in range(24)]
    expected = [pipeline.generate((), text, max_new_tokens=12, ignore_eos=True).token_ids for text in texts]
    engine, stop = pipeline.engine(max_batch=5), threading.Event()
    requests: dict[int, Request] = {}

    def serve() -> None:
        while engine.has_requests or not stop.is_set():
            engine.step()

    def send(numbers: range) -> None:
        for number in numbers:
            requests[number] = engine.add(ask(pipeline, texts[number], max_new_tokens=12))
            if number % 4 == 3:
                engine.cancel(requests[number])

    server = threading.Thread(target=serve)
    clients = [threading.Thread(target=send, args=(range(start, 24, 3),)) for start in range(3)]
    for thread in (server, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    stop.set()
    server.join()
    for number, request in requests.items():
        assert request.done
        assert request.slot is None
        if number % 4 != 3:
            assert request.result().token_ids == expected[number]


def test_images_that_are_encoded_already_are_not_encoded_in_a_step(
    pipeline: VisionLanguagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline.generate(picture(1), "?", max_new_tokens=3, ignore_eos=True)
    request = ask(pipeline, "?", picture(1), max_new_tokens=3)
    request.encode_images(pipeline.encoder.encode)  # a server does this on another thread
    monkeypatch.setattr(pipeline.encoder, "_run", lambda *_: pytest.fail("it was encoded again"))
    engine = pipeline.engine()
    engine.add(request)
    answer(engine)
    assert all(isinstance(image, EncodedImage) for image in request.images)
    assert request.result().token_ids == expected.token_ids
    assert request.result().timings.encoded_images == 0  # the cache of images had it
