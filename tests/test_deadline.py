"""``timeout_s``: between the steps, within a step of ONNX Runtime, and for each request of a batch."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from promprune.errors import ConfigError, DeadlineError
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.sessions.interrupt import end_runs_after, stoppable
from tests.support.endless import write_endless_package
from tests.support.fake_package import write_fake_package

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def load(folder: Path) -> VisionLanguagePipeline:
    return VisionLanguagePipeline.from_package(folder, provider="cpu", num_threads=1)


def test_a_graph_that_never_returns_is_ended(tmp_path: Path) -> None:
    write_endless_package(tmp_path / "package")
    with load(tmp_path / "package") as pipeline:
        started = time.perf_counter()
        for _ in range(2):
            with pytest.raises(DeadlineError, match=r"timeout_s = 0\.3"):
                pipeline.generate(PICTURE, "What?", timeout_s=0.3)
        with pytest.raises(DeadlineError):
            _ = pipeline.stream(PICTURE, "What?", timeout_s=0.3).result
        assert time.perf_counter() - started < 20


def test_an_answer_within_its_time_is_the_same(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "package")
    with load(tmp_path / "package") as pipeline:
        expected = pipeline.generate(PICTURE, "What?", max_new_tokens=8)
        assert pipeline.generate(PICTURE, "What?", max_new_tokens=8, timeout_s=600).token_ids == expected.token_ids


def test_the_deadline_passes_between_steps_and_while_a_request_waits(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "package")
    with load(tmp_path / "package") as pipeline:
        engine = pipeline.engine(max_batch=2)
        options = {"max_new_tokens": 200, "ignore_eos": True}
        running, late = (
            engine.add(pipeline.request(PICTURE, "What?", timeout_s=seconds, **options)) for seconds in (600, 30)
        )
        waiting = engine.add(pipeline.request(PICTURE, "What?", timeout_s=30, **options))
        engine.step()
        for request in (late, waiting):
            request.watch._start -= 30
        updated = [request for request, _ in engine.step()]
        assert isinstance(late.error, DeadlineError)
        assert isinstance(waiting.error, DeadlineError)
        assert set(updated) == {late, waiting, running}
        while engine.has_requests:
            engine.step()
        assert len(running.result().token_ids) == 200


def test_preprocessing_counts(tmp_path: Path) -> None:
    write_fake_package(tmp_path / "package")
    with load(tmp_path / "package") as pipeline, pytest.raises(DeadlineError):
        pipeline.request(PICTURE, "What?", timeout_s=1e-9)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    write_fake_package(tmp_path / "package")
    with load(tmp_path / "package") as pipeline, pytest.raises(ConfigError, match="seconds above 0"):
        pipeline.generate(PICTURE, "What?", timeout_s=value)


def test_runs_that_begin_too_late_are_ended_at_once() -> None:
    ended: list[str] = []
    with end_runs_after(0.01):
        time.sleep(0.2)
        with stoppable(lambda: ended.append("late")):
            assert ended == ["late"]
    with end_runs_after(None), stoppable(lambda: ended.append("never")):
        pass
    with stoppable(lambda: ended.append("never")):
        pass
    assert ended == ["late"]
