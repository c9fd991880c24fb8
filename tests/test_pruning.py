"""prune_tokens against the float64 reference, and the Triton kernel, interpreted, against the loop it replaces."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from promprune.errors import ConfigError
from promprune.method.batched import PrunedTokens, prune_tokens
from promprune.method.config import SelectionConfig
from promprune.method.entropy import spectral_entropy
from promprune.method.reference import select_tokens
from tests.support.feature_sets import feature_set

SELECTION = SelectionConfig(order="selection")
COVERAGE = SelectionConfig(saliency_ratio_min=0, saliency_ratio_max=0, order="selection")
HALF = SelectionConfig(saliency_ratio_min=0.5, saliency_ratio_max=0.5, order="selection")


def batch(size: int, n: int = 144, d: int = 160) -> tuple[Tensor, Tensor]:
    sets = [feature_set(seed, n, d) for seed in range(size)]
    return torch.from_numpy(np.stack([x for _, x, _ in sets])), torch.from_numpy(np.stack([a for _, _, a in sets]))


def assert_agrees(x: Tensor, a: Tensor, keep: int, config: SelectionConfig, mask: Tensor | None = None) -> PrunedTokens:
    got = prune_tokens(x, a, keep, config=config, token_mask=mask)
    for b in range(len(x)):
        valid = None if mask is None else mask[b]
        want = select_tokens(x[b].double(), a[b].double(), keep, config, valid)
        assert got.token_indices[b].tolist() == want.token_indices.tolist()
        assert got.saliency_mask[b].tolist() == want.saliency_mask.tolist()
        assert int(got.saliency_count[b]) == want.saliency_count
        assert float(got.spectral_entropy[b]) == pytest.approx(want.spectral_entropy, abs=5e-5)
        assert torch.equal(got.features[b], x[b, want.token_indices])
    return got


@pytest.mark.parametrize("config", [SelectionConfig(), SELECTION, HALF, COVERAGE])
def test_agrees_with_the_reference(config: SelectionConfig) -> None:
    assert_agrees(*batch(6), 23, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, a = batch(4)
    assert assert_agrees(x.to(dtype), a, 23, SelectionConfig()).features.dtype == dtype


@pytest.mark.parametrize("keep", [1, 63, 64])
def test_extreme_budgets(keep: int) -> None:
    assert_agrees(*batch(3, 64, 128), keep, HALF)


def test_more_tokens_than_features() -> None:
    assert_agrees(*batch(5, 200, 24), 20, SelectionConfig())


def test_many_picks_after_the_rank_is_exhausted() -> None:
    x, a = batch(5, 200, 64)
    got = prune_tokens(x, a, 192, config=COVERAGE).token_indices
    assert all(len(set(row)) == 192 for row in got.tolist())
    assert all(row[70:] == sorted(row[70:]) for row in got.tolist())


@pytest.mark.parametrize("config", [SelectionConfig(), HALF, COVERAGE])
def test_padding(config: SelectionConfig) -> None:
    x, a = batch(4)
    mask = torch.rand(4, 144, generator=torch.Generator().manual_seed(0)) < 0.6
    x[~mask] = math.nan
    a[~mask] = math.nan
    assert_agrees(x, a, 23, config, mask)


def test_too_few_tokens_are_filled_up_with_padding() -> None:
    x, a = batch(2)
    mask = torch.zeros(2, 144, dtype=torch.bool)
    mask[0, [100, 120]] = True
    got = prune_tokens(x, a, 5, token_mask=mask, config=HALF)
    assert set(got.token_indices[0].tolist()) == {100, 120, 0, 1, 2}
    assert sorted(got.token_indices[1].tolist()) == [0, 1, 2, 3, 4]


def test_not_finite_is_flagged() -> None:
    x, a = batch(3)
    x[0, 5, 5] = math.inf
    a[1, 7] = math.nan
    got = prune_tokens(x, a, 23)
    assert got.spectral_entropy.isnan().tolist() == [True, True, False]
    assert all(len(set(row)) == 23 for row in got.token_indices.tolist())


def test_blank_and_tied() -> None:
    x, a = torch.ones(2, 40, 16), torch.ones(2, 40)
    x[1] = 0
    got = prune_tokens(x, a, 9, config=SELECTION)
    assert got.spectral_entropy.tolist() == [1, 1]
    assert got.token_indices.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize(("n", "d"), [(16, 48), (576, 1024)])
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.03, 0.01, 0.001])
def test_tokens_that_are_nearly_alike_have_a_high_entropy(n: int, d: int, noise: float) -> None:
    """For example a plain wall; rounding errors must not exceed the spectrum."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, d, generator=random) + noise * torch.randn(2, n, d, generator=random)
    entropy = prune_tokens(x, torch.rand(2, n, generator=random), keep_tokens=2).spectral_entropy
    for got, features in zip(entropy.tolist(), x, strict=True):
        wanted = float(spectral_entropy(features.double()))
        assert wanted - 1e-4 <= got <= 1 + 1e-6
        assert got in (1, pytest.approx(wanted, abs=1e-4))


def test_no_gradient_and_no_autocast() -> None:
    x, a = batch(2)
    expected = prune_tokens(x, a, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = prune_tokens(x.clone().requires_grad_(), a, 23)
    assert not got.features.requires_grad
    assert torch.equal(got.token_indices, expected.token_indices)
    assert torch.equal(got.spectral_entropy, expected.spectral_entropy)


def test_the_products_keep_their_precision_under_both_settings_of_tf32() -> None:
    """In a separate process: the newer setting makes PyTorch refuse the older one."""
    code = (
        "import torch; from promprune.method.batched import prune_tokens\n"
        "setting = torch.backends.cuda.matmul\n"
        "setting.fp32_precision = 'tf32'\n"
        "prune_tokens(torch.rand(1, 32, 8), torch.rand(1, 32), 5)\n"
        "print(setting.fp32_precision)\n"
        "setting.allow_tf32 = True\n"
        "prune_tokens(torch.rand(1, 32, 8), torch.rand(1, 32), 5)\n"
        "print(setting.allow_tf32)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["tf32", "True"], done.stderr


def test_runs_without_data() -> None:
    """Tensors on the meta device have no values: reading one would raise."""
    x, a = torch.empty(2, 64, 32, device="meta"), torch.empty(2, 64, device="meta")
    got = prune_tokens(x, a, 9, token_mask=torch.empty(2, 64, dtype=torch.bool, device="meta"))
    assert got.features.shape == (2, 9, 32)
    assert got.token_indices.dtype == torch.int64


def test_refusals() -> None:
    x, a = batch(2)
    with pytest.raises(ConfigError, match="keep_tokens"):
        prune_tokens(x, a, 145)
    with pytest.raises(ConfigError, match=r"\[B, N, D\]"):
        prune_tokens(x[0], a[0], 5)
    with pytest.raises(ConfigError, match="token_mask"):
        prune_tokens(x, a, 5, token_mask=torch.ones(2, 144))


KERNEL_CHECK = """
import torch
from promprune.method.triton_kernel import fused_coverage_picks
from promprune.method.batched import _coverage_loop
from tests.support.feature_sets import feature_set

for n, d, keep in ((40, 60, 7), (100, 30, 90), (144, 160, 23)):
    x = torch.stack([torch.from_numpy(feature_set(seed, n, d)[1]) for seed in range(3)])
    unit = x / x.norm(dim=-1, keepdim=True)
    unit[:, 3] = 0
    unit[1] = unit[1, :1]
    kernel = unit @ unit.mT
    loss = torch.zeros(3, n)
    loss[:, 3] = 1
    loss[:, 5] = 2
    loss[:, [1, 8]] = 1e30
    loss[:, 2] = -1e-30
    count = torch.tensor([0, 2, keep])
    expected = _coverage_loop(kernel, loss, keep)
    got = fused_coverage_picks(kernel, loss, count, keep)
    for image, taken in enumerate(count.tolist()):
        steps = keep - taken
        assert got[image, :steps].tolist() == expected[image, :steps].tolist(), (n, image)
        assert len(set(got[image, :steps].tolist())) == steps
print("same picks")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton")
def test_the_kernel_picks_what_the_loop_picks() -> None:
    run = subprocess.run(
        [sys.executable, "-c", KERNEL_CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout.strip() == "same picks", run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", [SelectionConfig(), HALF, COVERAGE])
def test_on_the_device(config: SelectionConfig) -> None:
    x, a = batch(6)
    device_x, device_a = x.cuda(), a.cuda()
    prune_tokens(device_x, device_a, 23, config=config)  # compiles the kernel, copies the coefficients
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = prune_tokens(device_x, device_a, 23, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for b in range(6):
        want = select_tokens(x[b].double(), a[b].double(), 23, config)
        assert got.token_indices[b].tolist() == want.token_indices.tolist()
