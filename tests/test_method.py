"""The reference selection against hand-worked cases, brute force, and the authors' own procedure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from promprune.errors import ConfigError
from promprune.export.baselines.authors_method import authors_select
from promprune.method.config import SelectionConfig
from promprune.method.entropy import saliency_count, saliency_ratio, spectral_entropy, unit_tokens
from promprune.method.reference import select_tokens
from tests.support.feature_sets import KINDS, feature_set

SELECTION = SelectionConfig(order="selection")


def half_saliency(order: str = "selection") -> SelectionConfig:
    """A budget split of one half whatever the entropy."""
    return SelectionConfig(saliency_ratio_min=0.5, saliency_ratio_max=0.5, order=order)  # type: ignore[arg-type]


def coverage_only() -> SelectionConfig:
    return SelectionConfig(saliency_ratio_min=0, saliency_ratio_max=0, order="selection")


def random_set(seed: int, n: int = 40, d: int = 24) -> tuple[Tensor, Tensor]:
    _, x, a = feature_set(seed, n, d)
    return torch.from_numpy(x).double(), torch.from_numpy(a).double()


class TestEntropy:
    def test_orthogonal_tokens(self) -> None:
        # g g^T = I - 1/4: eigenvalues 1, 1, 1, 0, so p = 1/3 three times.
        assert float(spectral_entropy(torch.eye(4, dtype=torch.float64))) == pytest.approx(
            math.log(3) / math.log(4), abs=1e-9
        )

    def test_two_directions_have_one_eigenvalue(self) -> None:
        x = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 1, 1]]
        assert float(spectral_entropy(x)) == pytest.approx(0, abs=1e-9)

    def test_blank_image_is_busy(self) -> None:
        assert float(spectral_entropy(torch.ones(9, 5, dtype=torch.float64))) == pytest.approx(1, abs=1e-6)

    def test_single_token(self) -> None:
        assert float(spectral_entropy(torch.ones(1, 5))) == 1.0

    @pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
    def test_is_the_entropy_of_the_singular_values(self, shape: tuple[int, int]) -> None:
        x = np.random.default_rng(0).standard_normal(shape)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        p = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
        p = p[p > 1e-20] / p.sum()
        expected = -(p * np.log(p)).sum() / math.log(min(shape))
        assert float(spectral_entropy(torch.from_numpy(x))) == pytest.approx(expected, abs=1e-9)

    def test_nan_and_infinity_give_nan(self) -> None:
        for bad in (math.nan, math.inf):
            x = torch.ones(6, 4)
            x[2, 1] = bad
            assert math.isnan(float(spectral_entropy(x)))

    def test_half_precision_is_computed_in_float32(self) -> None:
        x, _ = random_set(3)
        half = spectral_entropy(x.half())
        assert half.dtype == torch.float32
        assert float(half) == pytest.approx(float(spectral_entropy(x.half().double())), abs=1e-5)


class TestBudget:
    @pytest.mark.parametrize(
        ("entropy", "expected"), [(0.42, 0.5), (0.40, 1 / (1 + math.exp(-1))), (0.0, 1.0), (1.0, 0.0)]
    )
    def test_ratio(self, entropy: float, expected: float) -> None:
        ratio = saliency_ratio(torch.tensor(entropy, dtype=torch.float64), SelectionConfig())
        assert float(ratio) == pytest.approx(expected, abs=1e-6)

    def test_ratio_limits(self) -> None:
        config = SelectionConfig(saliency_ratio_min=0.2, saliency_ratio_max=0.6)
        ratio = saliency_ratio(torch.tensor([0.0, 0.42, 1.0], dtype=torch.float64), config)
        assert ratio.tolist() == pytest.approx([0.6, 0.4, 0.2], abs=1e-6)

    def test_count_rounds_half_to_even(self) -> None:
        half = torch.tensor(0.5, dtype=torch.float64)
        assert [int(saliency_count(half, t)) for t in (1, 3, 5, 7)] == [0, 2, 2, 4]

    def test_count_of_nan_is_the_whole_budget(self) -> None:
        assert int(saliency_count(torch.tensor(math.nan), 7)) == 7


class TestSelection:
    def test_hand_worked(self) -> None:
        e = torch.eye(4, dtype=torch.float64)
        x = torch.stack([e[0], e[1], (e[0] + e[1]) / 2**0.5, e[2]])
        saliency = torch.tensor([0.1, 0.2, 0.9, 0.0], dtype=torch.float64)
        # Saliency takes token 2. The one least similar to it is token 3; then 0 and 1 tie, and 0 comes first.
        chosen = select_tokens(x, saliency, 4, half_saliency())
        assert chosen.saliency_count == 2
        assert chosen.token_indices.tolist() == [2, 1, 3, 0]
        chosen = select_tokens(x, saliency, 2, half_saliency())
        assert chosen.token_indices.tolist() == [2, 3]
        assert chosen.saliency_mask.tolist() == [True, False]

    def test_spatial_order_is_the_selection_sorted(self) -> None:
        x, a = random_set(1)
        by_choice, by_place = (select_tokens(x, a, 12, half_saliency(o)) for o in ("selection", "spatial"))
        assert by_place.token_indices.tolist() == sorted(by_choice.token_indices.tolist())
        salient = set(by_choice.token_indices[:6].tolist())
        assert by_place.saliency_mask.tolist() == [i in salient for i in by_place.token_indices.tolist()]

    @pytest.mark.parametrize("seed", range(5))
    def test_coverage_maximises_the_determinant_greedily(self, seed: int) -> None:
        x, a = random_set(seed, n=14, d=10)
        kernel = (unit_tokens(x) @ unit_tokens(x).T).numpy()
        picked = [0]
        while len(picked) < 7:
            rest = [i for i in range(14) if i not in picked]
            picked.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*picked, i], [*picked, i])])))
        assert select_tokens(x, a, 7, coverage_only()).token_indices.tolist() == picked

    @pytest.mark.parametrize("seed", range(15))
    def test_same_set_as_the_authors_in_float64(self, seed: int) -> None:
        _, features, attention = feature_set(seed, 144, 160)
        x, a = torch.from_numpy(features).double(), torch.from_numpy(attention).double()
        theirs = authors_select(x[None], a[None], 32, first_token_seeds=True)
        ours = select_tokens(x, a, 32)
        assert ours.saliency_count == theirs.counts[0]
        assert ours.spectral_entropy == pytest.approx(float(theirs.entropy[0]), abs=1e-9)
        assert set(ours.token_indices.tolist()) == set(theirs.indices[0].tolist())

    def test_the_fault_of_repeated_tokens_is_not_reproduced(self) -> None:
        x = torch.ones(1, 30, 8)
        a = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
        theirs = authors_select(x, a, 10).indices[0].tolist()
        ours = select_tokens(x[0].double(), a[0].double(), 10).token_indices.tolist()
        assert len(set(theirs)) < 10
        assert ours == list(range(10))

    def test_every_token(self) -> None:
        x, a = random_set(2)
        assert sorted(select_tokens(x, a, 40).token_indices.tolist()) == list(range(40))

    def test_ties_go_to_the_lowest_index(self) -> None:
        x, _ = random_set(2)
        config = SelectionConfig(saliency_ratio_min=1, order="selection")
        assert select_tokens(x, torch.ones(40).double(), 9, config).token_indices.tolist() == list(range(9))

    def test_zero_vectors_come_last(self) -> None:
        x, a = random_set(2, d=60)
        x[:10] = 0
        chosen = select_tokens(x, a, 33, coverage_only()).token_indices.tolist()
        assert chosen[0] == 10
        assert [i for i in chosen if i < 10] == chosen[30:] == [0, 1, 2]

    def test_not_finite(self) -> None:
        x, a = random_set(2)
        x[3, 3] = math.inf
        chosen = select_tokens(x, a, 9, SELECTION)
        assert math.isnan(chosen.spectral_entropy)
        assert chosen.token_indices.tolist() == a.argsort(descending=True)[:9].tolist()

    def test_nan_saliency_ranks_last(self) -> None:
        x, a = random_set(2)
        a[a.argmax()] = math.nan
        chosen = select_tokens(x, a, 39, SELECTION)
        assert math.isnan(chosen.spectral_entropy)
        assert int(a.isnan().nonzero()) not in chosen.token_indices.tolist()


class TestPadding:
    @pytest.mark.parametrize("seed", range(5))
    def test_is_as_if_it_were_not_there(self, seed: int) -> None:
        x, a = random_set(seed)
        mask = torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.7
        padded = x.clone()
        padded[~mask] = math.nan
        chosen = select_tokens(padded, a, 12, SELECTION, token_mask=mask)
        alone = select_tokens(x[mask], a[mask], 12, SELECTION)
        assert chosen.token_indices.tolist() == mask.nonzero().squeeze(1)[alone.token_indices].tolist()
        assert chosen.spectral_entropy == alone.spectral_entropy

    def test_fills_up_with_padding_in_order(self) -> None:
        x, a = random_set(0)
        mask = torch.zeros(40, dtype=torch.bool)
        mask[[30, 20, 10]] = True
        for config in (SELECTION, half_saliency(), coverage_only()):
            chosen = select_tokens(x, a, 6, config, token_mask=mask).token_indices.tolist()
            assert set(chosen) == {10, 20, 30, 0, 1, 2}
            assert [i for i in chosen if i < 10] == [0, 1, 2]


class TestRefusals:
    @pytest.mark.parametrize("keep", [0, 41, -1])
    def test_budget(self, keep: int) -> None:
        x, a = random_set(0)
        with pytest.raises(ConfigError, match="keep_tokens"):
            select_tokens(x, a, keep)

    def test_shapes(self) -> None:
        x, a = random_set(0)
        with pytest.raises(ConfigError, match=r"\[N, D\]"):
            select_tokens(x, a[:-1], 4)
        with pytest.raises(ConfigError, match=r"\[N, D\]"):
            select_tokens(x[None], a, 4)
        with pytest.raises(ConfigError, match="token_mask"):
            select_tokens(x, a, 4, token_mask=torch.ones(40))


SEEDS = st.integers(0, 10_000)
KEEP = st.integers(1, 30)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, keep=KEEP)
def test_always_distinct_and_in_range(seed: int, keep: int) -> None:
    x, a = random_set(seed, n=30, d=12)
    indices = select_tokens(x, a, keep).token_indices.tolist()
    assert len(set(indices)) == keep
    assert all(0 <= i < 30 for i in indices)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, keep=KEEP, exponent=st.integers(-20, 20))
def test_scaling_the_features_or_the_saliency_changes_nothing(seed: int, keep: int, exponent: int) -> None:
    x, a = random_set(seed, n=30, d=12)
    before = select_tokens(x, a, keep, SELECTION)
    after = select_tokens(x * 2.0**exponent, a * 3, keep, SELECTION)
    assert before.token_indices.tolist() == after.token_indices.tolist()


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, keep=KEEP)
def test_permuting_the_tokens_permutes_the_selection(seed: int, keep: int) -> None:
    x, a = random_set(seed, n=30, d=40)
    before = select_tokens(x, a, keep, SELECTION)
    if before.saliency_count == 0:  # the first pick is then the first token: a tie
        return
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    after = select_tokens(x[permutation], a[permutation], keep, SELECTION)
    assert permutation[after.token_indices].tolist() == before.token_indices.tolist()


def test_the_feature_sets_exercise_both_stages() -> None:
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(60):
        kind, x, a = feature_set(seed, 100, 128)
        ratios[kind].append(select_tokens(torch.from_numpy(x).double(), torch.from_numpy(a), 20).saliency_ratio)
    everything = np.concatenate(list(ratios.values()))
    assert (everything < 0.05).any()
    assert (everything > 0.95).any()
    assert ((everything > 0.2) & (everything < 0.8)).any()
