"""Several packages of one language model in one process, and answers of a length that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from promprune.errors import PackageError
from promprune.export import ExportResult
from promprune.runtime import VisionLanguagePipeline
from tests.fake_package import EOS, FakeModel, write_fake_package

PICTURE = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 40).convert("RGB")


def test_another_ratio_shares_the_language_model(tiny_export: ExportResult, tiny_full_export: ExportResult) -> None:
    with VisionLanguagePipeline.from_package(tiny_full_export.output, provider="cpu") as full:
        shared = full.with_vision_of(tiny_export.output, provider="cpu")
        assert shared.manifest == tiny_export.manifest
        got = shared.generate(PICTURE, "What is this?", max_new_tokens=8)
        with VisionLanguagePipeline.from_package(tiny_export.output, provider="cpu") as alone:
            assert got.token_ids == alone.generate(PICTURE, "What is this?", max_new_tokens=8).token_ids
        assert (
            got.timings.prompt_tokens < full.generate(PICTURE, "What is this?", max_new_tokens=1).timings.prompt_tokens
        )


def test_another_language_model_is_refused(tiny_full_export: ExportResult, tmp_path: Path) -> None:
    write_fake_package(tmp_path / "other")
    with (
        VisionLanguagePipeline.from_package(tiny_full_export.output, provider="cpu") as pipeline,
        pytest.raises(PackageError, match="another language model; expected the same files"),
    ):
        pipeline.with_vision_of(tmp_path / "other", provider="cpu")


def test_the_end_of_sequence_can_be_ignored(tmp_path: Path) -> None:
    for seed in range(60):  # until a model says it early
        folder = tmp_path / str(seed)
        write_fake_package(folder, FakeModel(seed=seed))
        with VisionLanguagePipeline.from_package(folder, provider="cpu") as pipeline:
            stopped = pipeline.generate(PICTURE, "What?", max_new_tokens=12)
            if stopped.finish_reason == "length":
                continue
            whole = pipeline.generate(PICTURE, "What?", max_new_tokens=12, ignore_eos=True)
            assert stopped.token_ids[-1] == EOS
            assert len(whole.token_ids) == 12
            assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
            assert whole.finish_reason == "length"
            return
    pytest.fail("no model ended its answer")
