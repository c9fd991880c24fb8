"""Measuring a benchmark: ceilings, load by other processes, rounds; with invented times if possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from promprune.errors import BackendError, ConfigError
from promprune.export import ExportResult
from promprune.export.baselines.pytorch import torch_device
from promprune.export.roofline.ceilings import CeilingProbe, open_ceiling_probe
from promprune.export.roofline.work import GraphWork
from promprune.package.manifest import read_manifest
from promprune.runtime.bench import machine, measure
from promprune.runtime.bench.cold_start import ColdStartRequest, ProcessStart
from promprune.runtime.bench.config import BenchConfig
from promprune.runtime.bench.contenders import Facts, Question, Sample
from promprune.runtime.bench.report import Ceilings
from promprune.runtime.sessions.config import RuntimeConfig
from tests.support.progress import RecordedProgress


class Contender:
    concurrent = batched = True

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, question: Question, batch: int) -> Sample:
        raise AssertionError((question, batch))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that take no time."""
    monkeypatch.setattr("promprune.export.roofline.ceilings._PRODUCT_SIDE", {"CPU": 64, "CUDA": 64})
    monkeypatch.setattr("promprune.export.roofline.ceilings._MEMORY_BYTES", {"CPU": 2**20, "CUDA": 2**20})


@pytest.mark.usefixtures("small")
def test_every_dtype_has_a_ceiling_and_the_memory_two() -> None:
    probe = CeilingProbe(["fp32", "fp16"], device="CPU", threads=1)
    for _ in range(3):
        probe.run()
    found = probe.result()
    assert found.device == "CPU"
    assert found.product_flops_per_s.keys() == {"fp32", "fp16"}
    assert min(*found.product_flops_per_s.values(), found.copy_bytes_per_s, found.read_bytes_per_s) > 0
    probe.close()


@pytest.mark.usefixtures("small")
def test_the_rates_are_work_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of 2, 1 and 4 s for all; 2^20 bytes, and 64^3 multiply-adds."""
    probe = CeilingProbe(["fp32"], device="CPU", threads=1)
    now, steps = [0.0], iter([2.0, 2, 2, 1, 1, 1, 4, 4, 4])

    def clock() -> float:
        return now[0]

    for session in probe._sessions.values():
        monkeypatch.setattr(session, "on_run", lambda _: now.__setitem__(0, now[0] + next(steps)))
    monkeypatch.setattr("promprune.export.roofline.ceilings.time.perf_counter", clock)
    for _ in range(3):
        probe.run()
    found = probe.result()
    assert found.copy_bytes_per_s == 2 * 2**20
    assert found.read_bytes_per_s == 2**20
    assert found.product_flops_per_s == {"fp32": 2 * 64**3}


@pytest.mark.usefixtures("small")
def test_the_read_ceiling_sums_all_elements() -> None:
    probe = CeilingProbe([], device="CPU", threads=1)
    rows = np.arange(2 * 8192, dtype=np.float32).reshape(2, 8192) / 8192
    summed = probe._sessions["read"].run({"x": rows})["y"]
    np.testing.assert_allclose(summed, rows.sum(axis=1, keepdims=True, dtype=np.float64), rtol=1e-5)
    probe.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_onnx_runtime_cannot_use_has_no_ceilings() -> None:
    assert open_ceiling_probe(["fp32"], device="CUDA", threads=1) is None


def facts(**changes: Any) -> Facts:
    known: dict[str, Any] = {
        "name": "c", "kind": "package", "path": "p", "model": "m", "dtype": "fp16", "device": "CPU",
        "num_tokens": 4, "keep_tokens": 4, "policy": "all", "prompt_tokens": 5,
    }  # fmt: skip
    return Facts(**{**known, **changes})


def test_a_bound_is_of_the_contenders_own_dtype_and_device() -> None:
    """1e9 FLOP at 1e12 and at 2e12 per second; 3e6 bytes at 4e9 per second."""
    ceilings = Ceilings(
        device="CPU", product_flops_per_s={"fp32": 1e12, "fp16": 2e12}, product="p", copy_bytes_per_s=2e9,
        read_bytes_per_s=4e9, memory="m",
    )  # fmt: skip
    computing = GraphWork(flops=10**9, traffic_bytes=0)
    assert measure._stage_work(computing, facts(), ceilings).bound_ms == 0.5
    assert measure._stage_work(computing, facts(dtype="fp32"), ceilings).bound_ms == 1
    assert measure._stage_work(GraphWork(flops=0, traffic_bytes=3 * 10**6), facts(), ceilings).bound_ms == 0.75
    assert measure._stage_work(computing, facts(device="CUDA"), ceilings).bound_ms is None
    assert measure._stage_work(computing, facts(), None).bound_ms is None


def test_stolen_time_is_used_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = tmp_path / "stat"
    monkeypatch.setattr(machine, "_CPU_TIMES", times)
    times.write_text("cpu  100 10 20 1000 50 3 2 400 7 0\ncpu0 ...\n")
    ticks = machine.os.sysconf("SC_CLK_TCK")
    assert machine._busy_seconds() == (100 + 10 + 20 + 3 + 2 + 400) / ticks
    times.write_text("intr 1\n")
    assert machine._busy_seconds() is None


def test_processes_are_started_in_turns_and_the_first_of_each_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(request: ColdStartRequest) -> ProcessStart:
        started.append(str(request.package))
        return ProcessStart(1000.0 if started.count(started[-1]) == 1 else 10.0, 7, None)

    monkeypatch.setattr(measure, "start_process", start)
    config, progress = BenchConfig(packages={name: Path(name) for name in "abc"}), RecordedProgress()
    question = Question(image=Path("i"), prompt="p", new_tokens=1)
    found = measure._cold_starts(config, question, {}, progress)
    turns = [started[i : i + 3] for i in range(0, len(started), 3)]
    assert len(turns) == 1 + config.cold_starts == 4
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert {(name, cold.first_token_ms, cold.n) for name, cold in found.items()} == {(n, 10.0, 3) for n in "abc"}
    assert progress.items == progress.done == 12


def test_a_load_that_is_named_twice_is_measured_once() -> None:
    config = BenchConfig(packages={"a": Path()}, batches=(2, 1, 2), concurrencies=(1, 3, 3))
    loads = measure._loads(config, [Contender("a")])  # type: ignore[list-item]
    assert [(load.batch, load.concurrency) for load in loads] == [(2, 1), (1, 1), (1, 3)]


def test_a_peer_is_not_measured_with_batches_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"received batches = \(4, 2\) and a peer.*; expected 1 among the batches"):
        BenchConfig(packages={"a": Path()}, openvino=tmp_path, batches=(4, 2))
    BenchConfig(packages={"a": Path()}, openvino=tmp_path, batches=(4, 1))


def test_the_baselines_run_where_the_packages_do(
    tiny_export: ExportResult, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch with CUDA and ONNX Runtime on the CPU, and the other way round."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    packages = {"tiny": tiny_export.output}
    config = BenchConfig(
        packages=packages, baselines=("hf",), model=str(tiny_llava), runtime=RuntimeConfig(num_threads=1)
    )
    manifests = {"tiny": read_manifest(tiny_export.output)}
    monkeypatch.setattr(measure, "device_of", lambda *_: "CPU")
    assert measure._pytorch_settings(config, manifests)["Hugging Face"].device == "cpu"
    monkeypatch.setattr(measure, "device_of", lambda *_: "CUDA")
    assert measure._pytorch_settings(config, manifests)["Hugging Face"].device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"the packages run on CUDA, which PyTorch .* cannot use for the baselines"):
        torch_device("CUDA")
