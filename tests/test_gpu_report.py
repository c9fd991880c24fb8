"""The GPU report, rehearsed at tiny shapes on the CPU: what a machine with a GPU would bring back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from scripts.gpu import fill_docs, report
from scripts.gpu.carried import LIMIT_BYTES, carried_bytes
from scripts.gpu.goals import goals
from scripts.gpu.measure import count_flops, device_ms
from scripts.gpu.models import llava_config, random_model
from scripts.gpu.page import section
from scripts.gpu.parts import PART_BYTES, join, split
from scripts.gpu.plan import RUNS, limits_s, plan_lines
from scripts.gpu.record import Record, read_record
from scripts.gpu.shares import bound_ms, ceilings_of
from scripts.gpu.sizes import FULL, prompt_lengths
from scripts.gpu.stages.gpu_tests import junit_rows

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/gpu/report.py"
KILLS, FEWER_KILLS = 20, 6


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of a complete first run, and its output."""
    out = tmp_path_factory.mktemp("rehearsal")
    process = start(out, "--budget", "3600")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return json.loads((out / "report.json").read_bytes()), printed


def rows(found: dict[str, Any], stage: str, **labels: Any) -> list[dict[str, Any]]:
    return [row for row in found["stages"][stage]["rows"] if labels.items() <= row.items()]


def test_every_stage_of_the_first_run_is_done(rehearsal: tuple[dict[str, Any], str]) -> None:
    found, printed = rehearsal
    assert {name: record["status"] for name, record in found["stages"].items()} == {
        stage.name: "done" for stage in RUNS["pytorch"]
    }
    assert found["kind"] == "rehearsal"
    assert printed.splitlines()[-1].startswith("a rehearsal at tiny shapes")


def test_nothing_fails_but_what_needs_cuda(rehearsal: tuple[dict[str, Any], str]) -> None:
    found, _ = rehearsal
    errors = {
        row["error"] for record in found["stages"].values() for row in record["rows"] if row.get("error") is not None
    }
    assert errors == {"RuntimeError: no CUDA device to capture a graph on"}


def test_every_contender_keeps_what_the_reference_keeps(rehearsal: tuple[dict[str, Any], str]) -> None:
    found, _ = rehearsal
    checks = [row for row in rows(found, "selection") if "check" in row and "error" not in row]
    assert {(row["check"], row["mode"]) for row in checks} == {
        ("authors", "eager"),
        ("batched, Triton", "eager"),
        ("batched, loop", "eager"),
        ("batched, Triton", "compiled"),
        ("batched, loop", "compiled"),
    }
    for row in checks:
        assert row["identical_sets"] == row["identical_saliency_counts"] == row["images"] == 4
        assert row["largest_entropy_error"] < 1e-5


@pytest.mark.parametrize(("stage", "kept"), [("llava", 2), ("llava_next", 5 * 2)])
def test_first_tokens_are_of_the_right_prompts(stage: str, kept: int, rehearsal: tuple[dict[str, Any], str]) -> None:
    """Of the tiny LLaVA's 16 visual tokens per crop, 12 % are 2; the prompt has 5 others."""
    found, _ = rehearsal
    (ours,) = rows(found, stage, time="first token", contender="ours", mode="eager")
    (full,) = rows(found, stage, time="first token", contender="all tokens", mode="eager")
    assert (ours["prompt_tokens"], full["prompt_tokens"]) == (5 + kept, 5 + kept * 8)
    assert ours["flops"] < full["flops"]
    (same,) = rows(found, stage, check="first token at ratio 1.0 equal to all tokens")
    assert same["equal"] is True


def test_the_tests_marked_gpu_are_there(rehearsal: tuple[dict[str, Any], str]) -> None:
    found, _ = rehearsal
    outcomes = {row["test"]: row["outcome"] for row in rows(found, "gpu_tests")}
    wanted = "passed" if torch.cuda.is_available() else "skipped"
    assert outcomes["tests.test_pruning::test_on_the_device[config0]"] == wanted


def check_files(out: Path) -> int:
    """Check what a killed run left, and return how many of its stages had finished."""
    files = {path.stem: json.loads(path.read_bytes()) for path in out.glob("*.json")}
    whole = files.pop("report", {"stages": {}})
    for name, record in whole["stages"].items():
        assert record["status"] == "done"
        assert record["rows"]
        assert files[name] == record
    return len(whole["stages"])


def killed_at(moment_s: float, out: Path, *arguments: str) -> int:
    """Kill a rehearsal after so many seconds, check its files, and return how many of its stages had finished."""
    out.mkdir()
    process = start(out, *arguments)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when its stage has ended too
    return check_files(out)


def kill_all(moments_s: list[float], folder: Path, *arguments: str) -> list[int]:
    """Kill one rehearsal at each moment, two rehearsals at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: killed_at(job[1], folder / str(job[0]), *arguments), enumerate(moments_s)))


def test_a_run_killed_at_any_moment_leaves_valid_json(tmp_path: Path) -> None:
    moments = random.Random(13)
    finished = kill_all([moments.uniform(0, 5) for _ in range(FEWER_KILLS)], tmp_path, "--stages", "roofline")
    assert set(finished) <= {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_whole_run_killed_at_any_moment_leaves_valid_json(
    rehearsal: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    """At moments of twice the time that one rehearsal took, since two run at a time."""
    moments, found = random.Random(13), rehearsal[0]
    finished = kill_all([moments.uniform(0, 2 * found["seconds"]) for _ in range(KILLS)], tmp_path)
    assert len(set(finished)) > 2


def python_of_the_machine() -> str:
    """A Python 3.12, or a reason to skip."""
    name = os.environ.get("PROMPRUNE_PYTHON", "python3.12")
    try:
        found = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{name} does not run; set PROMPRUNE_PYTHON to a Python 3.12")
    if not found.startswith("Python 3.12."):
        pytest.skip(f"{name} is {found.strip()}, and the GPU machine has Python 3.12")
    return name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_rehearsal_passes_with_the_versions_of_the_machine(tmp_path: Path) -> None:
    """Downloads 0.8 GB."""
    environment = {**os.environ, "PROMPRUNE_PYTHON": python_of_the_machine()}
    subprocess.run([ROOT / "scripts/gpu/rehearsal_env.sh", tmp_path / "env"], env=environment, check=True)
    command = [tmp_path / "env/bin/python", SCRIPT, "--rehearse", "--budget", "3600", "--out", tmp_path]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "report.json").read_bytes())
    versions = found["machine"]["versions"]
    assert (versions["torch"], versions["transformers"]) == ("2.11.0", "5.17.0")
    assert {record["status"] for record in found["stages"].values()} == {"done"}


def options_of(out: Path) -> Any:
    return report._options(["--rehearse", "--out", str(out)])


def test_a_stage_that_takes_too_long_is_killed_and_said(tmp_path: Path) -> None:
    found = report.run_in_process("roofline", 0.1, options_of(tmp_path))
    assert (found["status"], found["error"][:6]) == ("timed out", "killed")
    assert json.loads((tmp_path / "roofline.json").read_bytes()) == found


def test_a_stage_that_crashes_is_recorded(tmp_path: Path) -> None:
    found = report.run_in_process("no such stage", 60, options_of(tmp_path))
    assert found["status"] == "crashed"
    assert found["error"] == "exit status 1: KeyError: 'no such stage'"


def test_a_stage_without_time_left_is_skipped(tmp_path: Path) -> None:
    assert report.run_in_process("roofline", 0, options_of(tmp_path))["status"] == "skipped"


def test_a_process_of_a_stage_ends_with_the_report(tmp_path: Path) -> None:
    process = start(tmp_path, "--stages", "selection")
    path = tmp_path / "selection.json"
    while not path.is_file():
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.2)
    before = path.read_bytes()
    time.sleep(1)
    assert path.read_bytes() == before


def test_a_row_that_fails_costs_no_other(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("CUDA error:\n  out of memory")

    record = Record(tmp_path / "stage.json", "stage")
    record.attempt(fails, time="first")
    record.attempt(lambda: {"median_ms": 2.0}, time="second")
    found = read_record(tmp_path / "stage.json", "stage")
    assert found["status"] == "running"
    assert found["rows"] == [
        {"time": "first", "error": "RuntimeError: CUDA error: out of memory"},
        {"time": "second", "median_ms": 2.0},
    ]


def test_the_plan_fits_one_run() -> None:
    lines = plan_lines(RUNS["pytorch"], report.DEFAULT_BUDGET_S)
    seconds = [int(line.split(" s ")[0].split()[-1]) for line in lines]
    assert sum(seconds[:-1]) == seconds[-1] <= report.DEFAULT_BUDGET_S <= 9 * 60
    assert limits_s(RUNS["pytorch"], 150) == [120, 30, 0, 0, 0, 0]


def test_the_real_models_have_their_sizes() -> None:
    """LLaVA-1.5-7B has 7.06 billion parameters; prompts have 60 tokens of text."""
    sizes = replace(FULL, device="meta")
    model = random_model(LlavaForConditionalGeneration, llava_config(sizes), sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(7.06e9, rel=0.01)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert prompt_lengths(sizes) == [60 + 69, 60 + 5 * 69, 60 + 576, 60 + 5 * 576]


def test_few_files_come_back() -> None:
    """At most 8: one per stage, and the report."""
    assert all(len(stages) + 1 <= 8 for stages in RUNS.values())


def test_what_is_carried_is_small_enough() -> None:
    assert carried_bytes([ROOT / "scripts/gpu/wheels"]) < LIMIT_BYTES


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The folders of an archive of two files, cut every 5,000 bytes."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("a.whl", "b.whl"):
        (wheels / name).write_bytes(random.Random(name).randbytes(7000))
    return split("set", wheels, tmp_path / "parts", part_bytes=5000)


def test_parts_come_together_again(parts: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    joined = []
    for folder in reversed(parts):  # in any order
        for file in folder.iterdir():
            (store / file.name).write_bytes(file.read_bytes())
        joined.append(join("set", store, tmp_path / "joined"))
    assert joined == [False] * (len(parts) - 1) + [True]
    for name in ("a.whl", "b.whl"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "wheels" / name).read_bytes()


def test_a_damaged_part_is_not_unpacked(parts: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for file in (file for folder in parts for file in folder.iterdir()):
        (store / file.name).write_bytes(file.read_bytes())
    (store / "set.01.part").write_bytes(b"other")
    assert not join("set", store, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_part_fits_beside_the_checkout() -> None:
    assert carried_bytes([ROOT / "scripts/gpu/wheels"]) + PART_BYTES < LIMIT_BYTES


@pytest.mark.slow
def test_the_second_run_compares_packages(tmp_path: Path) -> None:
    """With the CPU in the place of CUDA, so that both answers are equal."""
    process = start(tmp_path, "--run", "onnxruntime", "--stages", "onnxruntime")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    found = json.loads((tmp_path / "report.json").read_bytes())
    compared = rows(found, "onnxruntime", what="against the CPU")
    assert [row["package"] for row in compared] == ["12 %, loop", "12 %, unrolled", "all tokens"]
    assert {(row["equal_answers"], row["equal_kept_sets"], row["images"]) for row in compared} == {(8, 8, 8)}


class FakeDevice:
    """A stream whose clock only moves in `run`, by 1, 2, 3... ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.synchronized = 0
        self.durations: Iterator[int] = count(1)

    def run(self) -> None:
        self.now += next(self.durations)

    def synchronize(self) -> None:
        self.synchronized += 1


def test_times_on_a_device_are_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device.now

        def elapsed_time(self, end: Event) -> float:
            assert device.synchronized == 2
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    assert device_ms(device.run, "cuda", 3) == [1, 2, 3]


def test_flops_are_counted() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7


def measured(**figures: float) -> dict[str, Any]:
    selection = [
        {"time": "batched, Triton", "mode": "eager", "batch": 5, "median_ms": 3.0},
        {"time": "batched, Triton", "mode": "graph", "batch": 5, "median_ms": figures["ours"]},
        {"time": "batched, Triton", "mode": "graph", "batch": 1, "median_ms": 0.1},
        {"time": "authors", "mode": "eager", "batch": 5, "median_ms": figures["authors"]},
    ]
    first = [
        {"time": "first token", "contender": "all tokens", "mode": "eager", "median_ms": figures["whole"]},
        {"time": "first token", "contender": "ours", "mode": "eager", "median_ms": figures["pruned"]},
    ]
    return {"kind": "measurement", "stages": {"selection": {"rows": selection}, "llava_next": {"rows": first}}}


def test_goals_are_judged_by_the_largest_batch() -> None:
    found = list(goals(measured(ours=0.8, authors=20.0, whole=100.0, pruned=40.0)))
    assert [(figure, reached) for _, figure, _, reached in found] == [
        (0.8, True),
        (pytest.approx(25), True),
        (pytest.approx(0.6), False),
    ]


def test_the_bound_is_the_longer_of_work_and_traffic() -> None:
    ceilings = ceilings_of(
        [
            {"ceiling": "copy", "bytes_per_s": 2e12},
            {"ceiling": "bf16", "flops_per_s": 5e14},
            {"ceiling": "fp32", "error": "out of memory"},
        ]
    )
    assert bound_ms({"flops": 1e12, "traffic_bytes": 2e9, "unit": "bf16"}, ceilings) == pytest.approx(2)
    assert bound_ms({"flops": 1e11, "traffic_bytes": 2e9, "unit": "bf16"}, ceilings) == pytest.approx(1)
    assert bound_ms({"flops": 1e11, "unit": "fp32"}, ceilings) is None


PAGE = "before\n<!-- gpu report -->\nold\n<!-- end of gpu report -->\nafter\n"


def test_the_page_gets_its_section(rehearsal: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    found, _ = rehearsal
    path, page = tmp_path / "report.json", tmp_path / "benchmarks.md"
    path.write_text(json.dumps(found))
    page.write_text((ROOT / "docs/benchmarks.md").read_text())
    fill_docs.main([str(path), "--page", str(page), "--rehearsal"])
    once = page.read_text()
    before, after = (ROOT / "docs/benchmarks.md").read_text().split("<!-- gpu report -->")
    assert once.startswith(before)
    assert once.endswith(after.partition("<!-- end of gpu report -->")[2])
    (ours,) = rows(found, "selection", time="batched, Triton", batch=2, mode="eager")
    assert f"| batched, Triton, B = 2 | {ours['median_ms']:.3g} |" in once
    for title in (
        "The selection",
        "First token of LLaVA-1.5-7B",
        "First token of LLaVA-NeXT-7B",
        "Ceilings",
        "3 skipped",
    ):
        assert title in once
    kept = json.loads((tmp_path / f"reports/gpu-{found['created'][:10]}.json").read_bytes())
    assert kept == found
    fill_docs.main([str(path), "--page", str(page), "--rehearsal"])
    assert page.read_text() == once


def test_a_section_of_a_run_that_was_cut_off_says_what_is_missing() -> None:
    failed = {"status": "crashed", "error": "exit status -9: Killed", "rows": []}
    content = section(
        {"kind": "measurement", "created": "2026-01-02T03:04", "machine": {}, "stages": {"selection": failed}}
    )
    assert content.startswith("2026-01-02, no GPU")
    assert content.endswith("Not measured:\n\n- selection: crashed, exit status -9: Killed")


def test_a_rehearsal_is_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"kind": "rehearsal", "stages": {}}))
    with pytest.raises(SystemExit, match="received a rehearsal"):
        fill_docs.main([str(path)])


@pytest.mark.parametrize("page", ["no markers", PAGE + PAGE, "<!-- end of gpu report --><!-- gpu report -->"])
def test_a_page_needs_its_markers(page: str) -> None:
    with pytest.raises(SystemExit, match="received a page without"):
        fill_docs.filled(page, "new")


def test_what_is_between_the_markers_is_replaced() -> None:
    assert fill_docs.filled(PAGE, "new") == PAGE.replace("\nold\n", "\n\nnew\n\n")


def test_goals_of_a_run_that_was_cut_off_are_not_measured() -> None:
    assert [reached for *_, reached in goals({"kind": "measurement", "stages": {}})] == [None] * 3


def test_outcomes_are_read_from_junit() -> None:
    xml = (
        '<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
        '<testcase classname="tests.a" name="two"><skipped message="no CUDA device"/></testcase>'
        '<testcase classname="tests.b" name="three"><failure message="assert 1 ==&#10; 2">long</failure></testcase>'
        "</testsuite></testsuites>"
    )
    assert junit_rows(xml) == [
        {"test": "tests.a::one", "outcome": "passed"},
        {"test": "tests.a::two", "outcome": "skipped", "message": "no CUDA device"},
        {"test": "tests.b::three", "outcome": "failure", "message": "assert 1 == 2"},
    ]
