"""The verification of packages in half precision: a peaked saliency has a large error, and the selection is judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from promprune.export import ExportResult, export_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig
from promprune.export.verify import precision
from promprune.export.verify.language import _part_at_a_tie
from promprune.export.verify.verification import verify_package
from promprune.package.manifest import CheckRecord, VerificationRecord
from promprune.package.package import read_package
from tests.support.tiny_models import save_tiny_llava


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose vision tower has attention as peaked as a trained one's."""
    folder = save_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "peaked", vision={"num_hidden_layers": 6}, seed=2)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= 2.8
        layer.self_attn.k_proj.weight.data *= 2.8
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half(peaked: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    output = tmp_path_factory.mktemp("packages") / "peaked"
    return export_package(ExportConfig(model=str(peaked), dtype="fp16", ratio=0.25, vision_only=True, output=output))


def check_of(verification: VerificationRecord | None, name: str) -> CheckRecord:
    assert verification is not None
    (found,) = [check for check in verification.checks if check.name.startswith(name)]
    return found


def test_a_peaked_saliency_is_reported_and_not_refused(half: ExportResult) -> None:
    verification = half.manifest.verification
    saliency = check_of(verification, "saliency, relative error")
    assert saliency.advisory
    assert not saliency.passed
    assert check_of(verification, "kept tokens in common with fp32").passed
    assert verification is not None
    assert verification.passed


def test_beyond_the_fixed_limit_transformers_own_half_precision_decides(
    half: ExportResult, peaked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MIN_IN_COMMON", 1.1)  # no package reaches it
    record = verify_package(read_package(half.output), load_checkpoint(str(peaked)), num_images=4)
    common = check_of(record, "kept tokens in common with fp32")
    assert "; transformers in fp16: " in common.detail
    own = float(common.detail.split("fp16: ")[1].split()[0])
    assert common.limit == pytest.approx(own - precision.IN_COMMON_SLACK, abs=1e-3)
    assert record.passed


def test_other_kept_tokens_are_refused(half: ExportResult, tmp_path: Path) -> None:
    other = load_checkpoint(str(save_tiny_llava(tmp_path / "other", seed=1, vision={"num_hidden_layers": 6})))
    record = verify_package(read_package(half.output), other, num_images=4)
    assert not check_of(record, "kept tokens in common with fp32").passed


def test_closeness_is_the_mean_over_images() -> None:
    wanted = [(frozenset({1, 2, 3, 4}), 2), (frozenset({5, 6, 7, 8}), 0)]
    got = [(frozenset({1, 2, 3, 9}), 3), (frozenset({5, 6, 7, 8}), 0)]
    assert precision.Closeness.of(got, wanted) == precision.Closeness(in_common=0.875, count_difference=0.125)


def test_answers_may_part_where_two_logits_are_within_the_error() -> None:
    row = torch.tensor([0.0, 1.0, 1.01, 3.0])
    likely = torch.stack([row, row, row])
    assert _part_at_a_tie(likely, [3, 2, 0], [3, 1, 1], 0.05)  # 0.01 apart
    assert not _part_at_a_tie(likely, [3, 3, 0], [3, 1, 1], 0.05)  # 2 apart
    assert not _part_at_a_tie(likely, [3, 3, 0], [3, 3], 0.05)  # one ends: not a tie
