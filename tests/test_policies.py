"""The policies beside PromPrune: what each of them keeps, in all three forms of the selection, and as a package."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch

from promprune.embedded.scenes import render_scene
from promprune.errors import ConfigError
from promprune.export.config import ExportConfig
from promprune.export.graphs.selector import build_selector
from promprune.export.pipeline import default_output, export_package
from promprune.method.batched import prune_tokens
from promprune.method.config import LOOP_FORMS, POLICIES, SelectionConfig, SelectionPolicy
from promprune.method.reference import random_order, select_tokens
from promprune.package.manifest import CheckRecord
from promprune.runtime import ImageEncoder, draw_kept_tokens
from tests.support.feature_sets import feature_set
from tests.support.tiny_models import NUM_TOKENS

BASELINES = tuple(policy for policy in POLICIES if policy != "promprune")
N, D, T = 96, 64, 13


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    sets = [feature_set(seed, N, D) for seed in range(count)]
    return np.stack([x for _, x, _ in sets]), np.stack([a for _, _, a in sets])


def kept(policy: SelectionPolicy, mask: np.ndarray | None = None) -> list[list[int]]:
    x, a = images(5)
    config = SelectionConfig(policy=policy, order="selection")
    return [
        select_tokens(
            torch.from_numpy(x[b]).double(),
            torch.from_numpy(a[b]).double(),
            T,
            config,
            None if mask is None else torch.from_numpy(mask[b]),
        ).token_indices.tolist()
        for b in range(len(x))
    ]


def test_saliency_keeps_the_most_attended() -> None:
    _, a = images(5)
    assert kept("saliency") == [np.argsort(-row, kind="stable")[:T].tolist() for row in a]


def test_coverage_looks_at_no_saliency() -> None:
    x, _ = images(5)
    flat = torch.zeros(N, dtype=torch.float64)
    config = SelectionConfig(saliency_ratio_max=0, order="selection")
    for row, indices in zip(x, kept("coverage"), strict=True):
        assert indices == select_tokens(torch.from_numpy(row).double(), flat, T, config).token_indices.tolist()
        assert indices[0] == 0


def test_half_begins_with_half_of_saliency() -> None:
    both = zip(kept("half"), kept("saliency"), strict=True)
    assert all(half[:6] == saliency[:6] and half[6] != saliency[6] for half, saliency in both)


def test_random_is_one_frozen_order() -> None:
    """The literal is what numpy has drawn since 1.0; a package must keep the same tokens with every version."""
    assert random_order(16).tolist() == [1, 6, 8, 9, 13, 4, 2, 14, 10, 7, 15, 11, 3, 0, 5, 12]
    assert sorted(random_order(N).tolist()) == list(range(N))
    assert kept("random") == [random_order(N)[:T].tolist()] * 5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loop", LOOP_FORMS)
@pytest.mark.parametrize("policy", BASELINES)
def test_graph_and_torch_agree_with_the_method(policy: SelectionPolicy, loop: str, masked: bool) -> None:
    x, a = images(5)
    mask = np.random.default_rng(0).random((5, N)) < np.array([1, 0.9, 0.5, 0.2, 0.05])[:, None] if masked else None
    config = SelectionConfig(policy=policy, order="selection")
    model = build_selector(N, D, T, config, batch_size="batch", token_mask=masked, loop=loop)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"image_features": x, "saliency": a} | ({} if mask is None else {"token_mask": mask})
    indices, counts = session.run(["token_indices", "saliency_count"], feeds)
    torch_mask = None if mask is None else torch.from_numpy(mask)
    eager = prune_tokens(torch.from_numpy(x), torch.from_numpy(a), T, config=config, token_mask=torch_mask)
    expected = kept(policy, mask)
    assert eager.token_indices.tolist() == expected
    if mask is None or policy in ("saliency", "random"):
        assert indices.tolist() == expected
    else:  # when fewer real tokens than T are left, stages may order the rest differently: the sets are equal
        assert [sorted(row) for row in indices.tolist()] == [sorted(row) for row in expected]
    share = {"saliency": T, "coverage": 0, "half": 6, "random": 0}[policy]
    assert counts[:, 0].tolist() == eager.saliency_count.tolist() == [share] * 5


@pytest.mark.parametrize("policy", ["coverage", "random"])
def test_a_package_of_a_baseline_verifies_and_says_so(policy: str, tiny_llava: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        model=str(tiny_llava),
        output=tmp_path / "out",
        ratio=0.5,
        policy=policy,  # type: ignore[arg-type]
        vision_only=True,
    )
    manifest = export_package(config).manifest
    assert manifest.selection.config.policy == policy
    assert manifest.verification is not None
    checks: dict[str, CheckRecord] = {check.name: check for check in manifest.verification.checks}
    assert checks["kept sets equal to the float64 method's"].measured == 1
    with ImageEncoder.from_package(tmp_path / "out", provider="cpu") as encoder:
        image = render_scene(0).image
        selection = encoder.encode_image(image).selection
        draw_kept_tokens(encoder.view(image), selection)
    assert selection.to_dict()["policy"] == policy
    assert selection.saliency_count == 0
    if policy == "random":
        assert selection.token_indices.tolist() == sorted(random_order(NUM_TOKENS)[:8].tolist())


def test_names_and_refusals() -> None:
    assert get_args(SelectionPolicy) == POLICIES
    assert default_output(ExportConfig(policy="random", dtype="fp16")).name == "promprune-embedded-0.12-random-fp16"
    with pytest.raises(ConfigError, match="policy = 'best'"):
        SelectionConfig(policy="best")  # type: ignore[arg-type]
