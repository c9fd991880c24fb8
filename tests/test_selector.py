"""The exported selection graph in ONNX Runtime against the float64 reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from promprune.errors import ConfigError
from promprune.export.graphs.selector import build_selector
from promprune.method.config import LOOP_FORMS, SelectionConfig
from promprune.method.entropy_table import ENTROPY_TABLE
from promprune.method.reference import Selection, select_tokens
from tests.support.feature_sets import feature_set

Array = NDArray[Any]
NAMES = ["selected_features", "token_indices", "saliency_mask", "saliency_count", "spectral_entropy"]
SELECTION = SelectionConfig(order="selection")
COVERAGE = SelectionConfig(saliency_ratio_min=0, saliency_ratio_max=0, order="selection")
HALF = SelectionConfig(saliency_ratio_min=0.5, saliency_ratio_max=0.5, order="selection")


@cache
def session(*sizes: int, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    options.setdefault("batch_size", "batch")
    model = build_selector(*sizes, **options).SerializeToString()
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def run(x: Array, a: Array, keep: int, mask: Array | None = None, **options: Any) -> dict[str, Array]:
    """Run the graph on ``x [B, N, D]`` and check what holds of every output."""
    batch, n, d = x.shape
    feeds = {"image_features": x, "saliency": a}
    if mask is not None:
        feeds["token_mask"] = mask
    outputs = session(n, d, keep, token_mask=mask is not None, **options).run(NAMES, feeds)
    got = dict(zip(NAMES, outputs, strict=True))
    indices = got["token_indices"]
    assert indices.shape == got["saliency_mask"].shape == (batch, keep)
    assert all(len(set(row)) == keep for row in indices.tolist())
    assert indices.min() >= 0
    assert indices.max() < n
    expected = np.take_along_axis(x, indices[:, :, None], axis=1)
    assert np.array_equal(got["selected_features"], expected, equal_nan=True)
    assert (got["saliency_mask"].sum(1) == got["saliency_count"][:, 0]).all()
    return got


def tolerance(n: int, d: int) -> float:
    """The bound of promprune.method.entropy_table for any spectrum, and what float32 adds to it."""
    rank = max(min(n, d), 2)
    return ENTROPY_TABLE.delta * (1 + rank * ENTROPY_TABLE.x0) / math.log(rank) + 2e-5


def reference(x: Array, a: Array, keep: int, config: SelectionConfig, mask: Array | None = None) -> Selection:
    valid = None if mask is None else torch.from_numpy(mask)
    features = torch.from_numpy(x.astype(np.float64))
    return select_tokens(features, torch.from_numpy(a.astype(np.float64)), keep, config, valid)


def assert_agrees(x: Array, a: Array, keep: int, mask: Array | None = None, **options: Any) -> dict[str, Array]:
    """Every image of the batch: the same tokens in the same order from the same stages as the reference."""
    got = run(x, a, keep, mask, **options)
    for b in range(len(x)):
        valid = None if mask is None else mask[b]
        want = reference(x[b], a[b], keep, options.get("config", SelectionConfig()), valid)
        assert got["spectral_entropy"][b, 0] == pytest.approx(want.spectral_entropy, abs=tolerance(*x.shape[1:]))
        assert got["saliency_count"][b, 0] == want.saliency_count
        assert got["token_indices"][b].tolist() == want.token_indices.tolist()
        assert got["saliency_mask"][b].tolist() == want.saliency_mask.tolist()
    return got


def batch(seeds: range, n: int, d: int) -> tuple[Array, Array]:
    sets = [feature_set(seed, n, d) for seed in seeds]
    return np.stack([x for _, x, _ in sets]), np.stack([a for _, _, a in sets])


def one(seed: int, n: int = 144, d: int = 160) -> tuple[Array, Array]:
    return batch(range(seed, seed + 1), n, d)


class TestAgreement:
    @pytest.mark.parametrize("loop", LOOP_FORMS)
    @pytest.mark.parametrize("config", [SelectionConfig(), SELECTION, HALF, COVERAGE])
    def test_orders_and_loops(self, config: SelectionConfig, loop: str) -> None:
        assert_agrees(*batch(range(6), 144, 160), 23, config=config, loop=loop)

    def test_real_size(self) -> None:
        x, a = batch(range(40, 50), 576, 512)
        same = 0
        for i in range(10):
            got = run(x[i : i + 1], a[i : i + 1], 69)
            want = reference(x[i], a[i], 69, SelectionConfig())
            assert got["spectral_entropy"][0, 0] == pytest.approx(want.spectral_entropy, abs=2e-5)
            assert abs(got["saliency_count"][0, 0] - want.saliency_count) <= 1
            same += got["token_indices"][0].tolist() == want.token_indices.tolist()
        assert same >= 9

    @pytest.mark.slow
    @pytest.mark.parametrize("keep", [64, 69, 128, 192])
    def test_hundred_sets(self, keep: int) -> None:
        same = counts = 0
        for seed in range(100):
            x, a = one(seed, 576, 1024)
            got, want = run(x, a, keep), reference(x[0], a[0], keep, SelectionConfig())
            same += got["token_indices"][0].tolist() == want.token_indices.tolist()
            counts += int(got["saliency_count"][0, 0]) == want.saliency_count
        assert same >= 97
        assert counts >= 99

    @pytest.mark.parametrize("n", [1, 2, 7, 256, 729, 1024])
    def test_numbers_of_tokens(self, n: int) -> None:
        assert_agrees(*one(n, n, 96), max(1, n // 9))

    @pytest.mark.slow
    def test_many_tokens(self) -> None:
        assert_agrees(*one(0, 2880, 512), 345)

    def test_more_tokens_than_features(self) -> None:
        assert_agrees(*batch(range(5), 200, 24), 20)

    @pytest.mark.parametrize("keep", [1, 143, 144])
    def test_extreme_budgets(self, keep: int) -> None:
        x, a = batch(range(3), 144, 300)
        for config in (HALF, SelectionConfig()):
            assert_agrees(x, a, keep, config=config)

    @pytest.mark.parametrize("size", [1, 5, 16])
    def test_batches_equal_single_images(self, size: int) -> None:
        x, a = batch(range(size), 64, 48)
        together = run(x, a, 9)
        fixed = session(64, 48, 9, batch_size=size).run(NAMES, {"image_features": x, "saliency": a})
        for name, value in zip(NAMES, fixed, strict=True):
            assert np.allclose(together[name], value, atol=1e-6)
        for b in range(size):
            alone = run(x[b : b + 1], a[b : b + 1], 9)
            assert alone["token_indices"][0].tolist() == together["token_indices"][b].tolist()

    def test_float16_features(self) -> None:
        x, a = batch(range(4), 144, 160)
        got = assert_agrees(x.astype(np.float16), a, 23, dtype="float16")
        assert got["selected_features"].dtype == np.float16

    def test_the_budget_split_follows_its_settings(self) -> None:
        x, a = batch(range(5), 144, 160)
        for mu, tau in ((0.3, 0.05), (0.6, 0.1), (0.5, 0.5)):
            assert_agrees(x, a, 23, config=SelectionConfig(mu=mu, tau=tau, saliency_ratio_min=0.1))


def test_bfloat16_features() -> None:
    """Between two casts, because the Python API takes no bfloat16 arrays."""
    x, a = batch(range(4), 144, 160)
    model = build_selector(144, 160, 23, batch_size="batch", dtype="bfloat16")
    model.graph.input[0].name = "outer"
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    cast = onnx.helper.make_node("Cast", ["outer"], ["image_features"], to=onnx.TensorProto.BFLOAT16)
    back = onnx.helper.make_node("Cast", ["selected_features"], ["selected"], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    model.graph.node.append(back)
    model.graph.output[0].name = "selected"
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    running = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    features, indices = running.run(["selected", "token_indices"], {"outer": x, "saliency": a})
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for b in range(4):
        want = reference(rounded[b], a[b], 23, SelectionConfig())
        assert indices[b].tolist() == want.token_indices.tolist()
        assert np.array_equal(features[b], rounded[b][indices[b]])


def _edge_cases() -> Iterator[tuple[str, Callable[[np.random.Generator], Array], int]]:
    """Name, features [N, D] and the number of leading picks that are decided by more than rounding."""
    yield "all equal", lambda r: np.ones((60, 1)) * r.standard_normal(40), 20
    yield "one outlier", lambda r: np.vstack([np.ones((59, 1)) * r.standard_normal(40), r.standard_normal(40)]), 20
    yield "two directions", lambda r: r.standard_normal((2, 40))[r.integers(0, 2, 60)], 20
    yield "four directions", lambda r: r.standard_normal((4, 40))[r.integers(0, 4, 60)], 20
    yield "orthogonal", lambda r: np.linalg.qr(r.standard_normal((60, 60)))[0], 1
    yield "independent", lambda r: r.standard_normal((60, 200)), 20
    yield "some zero", lambda r: r.standard_normal((60, 200)) * (r.random((60, 1)) < 0.5), 20
    yield "all zero", lambda r: np.zeros((60, 40)), 20
    yield "one token left", lambda r: r.standard_normal((60, 40)) * (np.arange(60) == 17)[:, None], 20


EDGE_CASES = {name: (make, decided) for name, make, decided in _edge_cases()}


class TestEdgeCases:
    @pytest.mark.parametrize("name", EDGE_CASES)
    def test_degenerate_images(self, name: str) -> None:
        make, decided = EDGE_CASES[name]
        rng = np.random.default_rng(1)
        x = make(rng).astype(np.float32)[None]
        a = rng.random((1, 60)).astype(np.float32)
        got = run(x, a, 20, config=SELECTION)
        want = reference(x[0], a[0], 20, SELECTION)
        assert got["spectral_entropy"][0, 0] == pytest.approx(want.spectral_entropy, abs=1e-4)
        assert got["saliency_count"][0, 0] == want.saliency_count
        assert got["token_indices"][0, :decided].tolist() == want.token_indices[:decided].tolist()

    @pytest.mark.parametrize("loop", LOOP_FORMS)
    @pytest.mark.parametrize(("n", "d"), [(200, 64), (144, 20), (100, 2)])
    def test_many_picks_after_the_rank_is_exhausted(self, n: int, d: int, loop: str) -> None:
        x, a = batch(range(5), n, d)
        got = run(x, a, n - 5, config=COVERAGE, loop=loop)
        for b in range(5):
            want = reference(x[b], a[b], n - 5, COVERAGE).token_indices.tolist()
            assert got["token_indices"][b].tolist()[: d // 2] == want[: d // 2]
            # Whatever is left when nothing is left to span comes in index order.
            tail = got["token_indices"][b].tolist()[d + 5 :]
            assert tail == sorted(tail)

    def test_nearly_blank(self) -> None:
        # Noise of 1e-6 is below what float32 resolves: taken for blank, so coverage chooses, as the reference does.
        rng = np.random.default_rng(0)
        x = (1 + 1e-6 * rng.standard_normal((1, 100, 64))).astype(np.float32)
        got = run(x, rng.random((1, 100)).astype(np.float32), 12)
        assert got["spectral_entropy"][0, 0] == 1
        assert got["saliency_count"][0, 0] == 0
        assert reference(x[0], np.zeros(100), 12, SELECTION).saliency_count == 0

    def test_duplicates_are_not_covered_twice(self) -> None:
        x, a = one(1, 60, 128)
        doubled = np.concatenate([x, x], axis=1)
        got = run(doubled, np.concatenate([a, a], axis=1), 50, config=COVERAGE)
        assert len({i % 60 for i in got["token_indices"][0].tolist()}) == 50

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_scale(self, scale: float) -> None:
        x, a = batch(range(5), 144, 160)
        expected = run(x, a, 23)
        got = run((x * np.float32(scale)).astype(np.float32), a, 23)
        assert np.array_equal(got["token_indices"], expected["token_indices"])

    def test_near_the_limit_of_float16(self) -> None:
        x, a = batch(range(5), 144, 160)
        x = (x / np.abs(x).max() * 65000).astype(np.float16)
        assert np.abs(x).max() > 60000
        assert_agrees(x, a, 23, dtype="float16")

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_features_that_are_not_finite_are_flagged(self, bad: float) -> None:
        x, a = batch(range(3), 144, 160)
        x[1, 7, 9] = bad
        got = run(x, a, 23, config=SELECTION)
        assert np.isnan(got["spectral_entropy"][:, 0]).tolist() == [False, True, False]
        assert got["saliency_count"][1, 0] == 23
        assert got["token_indices"][1].tolist() == np.argsort(-a[1], kind="stable")[:23].tolist()
        for b in (0, 2):
            assert got["token_indices"][b].tolist() == reference(x[b], a[b], 23, SELECTION).token_indices.tolist()

    @pytest.mark.parametrize("loop", LOOP_FORMS)
    def test_everything_is_not_finite(self, loop: str) -> None:
        x = np.full((1, 30, 16), math.nan, np.float32)
        got = run(x, np.full((1, 30), math.nan, np.float32), 7, loop=loop)
        assert np.isnan(got["spectral_entropy"][0, 0])

    def test_saliency_that_is_not_finite_is_flagged(self) -> None:
        for bad in (math.nan, math.inf):
            x, a = batch(range(2), 144, 160)
            a[0, 3] = bad
            got = run(x, a, 23)
            assert np.isnan(got["spectral_entropy"][:, 0]).tolist() == [True, False]

    def test_constant_and_quantised_saliency(self) -> None:
        x, a = batch(range(5), 144, 160)
        for tied in (np.ones_like(a), np.round(a * 500) / 500):
            assert_agrees(x, tied, 23, config=SELECTION)
            assert_agrees(x, tied, 23, config=HALF)


class TestPadding:
    @pytest.mark.parametrize("loop", LOOP_FORMS)
    @pytest.mark.parametrize("config", [SelectionConfig(), SELECTION, HALF, COVERAGE])
    def test_agrees(self, config: SelectionConfig, loop: str) -> None:
        x, a = batch(range(6), 144, 160)
        mask = np.random.default_rng(0).random((6, 144)) < np.array([1, 0.9, 0.7, 0.5, 0.4, 0.3])[:, None]
        mask[:, 0] = True
        x[~mask] = math.nan
        a[~mask] = math.nan
        got = assert_agrees(x, a, 23, mask, config=config, loop=loop)
        assert all(mask[b, got["token_indices"][b]].all() for b in range(6))

    def test_too_few_tokens(self) -> None:
        x, a = batch(range(4), 60, 40)
        mask = np.zeros((4, 60), bool)
        mask[1, [50]] = True
        mask[2, [50, 40]] = True
        mask[3, 30:41] = True
        for config in (SELECTION, HALF, COVERAGE):
            got = run(x, a, 12, mask, config=config)
            for b in range(4):
                kept = got["token_indices"][b]
                assert mask[b, kept].sum() == mask[b].sum()
                want = reference(x[b], a[b], 12, config, mask[b])
                assert sorted(kept) == sorted(want.token_indices.tolist())
                assert got["spectral_entropy"][b, 0] == pytest.approx(want.spectral_entropy, abs=1e-4)

    def test_a_full_mask_changes_nothing(self) -> None:
        x, a = batch(range(4), 144, 160)
        got = run(x, a, 23, np.ones((4, 144), bool))
        assert np.array_equal(got["token_indices"], run(x, a, 23)["token_indices"])


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


class TestGraph:
    @pytest.mark.parametrize("token_mask", [False, True])
    @pytest.mark.parametrize("opset", [18, 20, 23])
    def test_standard_operators_and_few_nodes(self, opset: int, token_mask: bool) -> None:
        model = build_selector(576, 4096, 69, batch_size="batch", opset=opset, token_mask=token_mask, dtype="float16")
        nodes = list(all_nodes(model.graph))
        assert all(node.domain == "" for node in nodes)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        if not token_mask:
            assert len(nodes) <= 150
        assert model.ByteSize() < 200_000

    def test_authored_in_less_than_a_second(self) -> None:
        start = time.perf_counter()
        build_selector(576, 4096, 69)
        assert time.perf_counter() - start < 1

    def test_signature(self) -> None:
        model = build_selector(576, 4096, 69, batch_size="batch", token_mask=True, dtype="float16")
        shapes = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        assert shapes == {
            "image_features": ["batch", 576, 4096],
            "saliency": ["batch", 576],
            "token_mask": ["batch", 576],
            "selected_features": ["batch", 69, 4096],
            "token_indices": ["batch", 69],
            "saliency_mask": ["batch", 69],
            "saliency_count": ["batch", 1],
            "spectral_entropy": ["batch", 1],
        }

    def test_same_arguments_same_bytes(self) -> None:
        first, second = (build_selector(64, 32, 7).SerializeToString(deterministic=True) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize(
        ("sizes", "options"),
        [
            ((0, 8, 1), {}),
            ((8, 0, 1), {}),
            ((8, 8, 0), {}),
            ((8, 8, 9), {}),
            ((8, 8, 2), {"batch_size": 0}),
            ((8, 8, 2), {"batch_size": "any size"}),
            ((8, 8, 2), {"dtype": "float64"}),
            ((8, 8, 2), {"opset": 17}),
            ((8, 8, 2), {"loop": "while"}),
        ],
    )
    def test_refusals(self, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"received .*expected"):
            build_selector(*sizes, **options)


@pytest.mark.parametrize("target", ["SM89", "SM120"])
def test_builds_with_tensorrt_for_rtx(target: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(build_selector(576, 1024, 69).SerializeToString()), parser.get_error(0)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0
