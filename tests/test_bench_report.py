"""Statistics computed by hand, and what reports are used for: comparisons, tables, a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from promprune.errors import ConfigError, PackageError
from promprune.runtime.bench.compare import CompareConfig, MissingCase, compare_reports
from promprune.runtime.bench.page import figures, to_html
from promprune.runtime.bench.report import (
    Case,
    Ceilings,
    Contender,
    Distribution,
    Machine,
    Report,
    RunRecord,
    StageWork,
    gains,
    read_report,
)
from promprune.runtime.bench.statistics import least_rounds, median_interval, paired_ratios, quantile, ratio_of_medians
from promprune.runtime.bench.tables import machine_lines, to_csv, to_markdown
from promprune.runtime.commands import bench as command
from tests.support.command_line import run


def report_of(first_token_ms: dict[str, Sequence[float]]) -> Report:
    """A report of contenders "full" (100 of 100 tokens) and others (10 of 100), with a tenth of its FLOPs."""
    contenders, cases = [], []
    for name, times in first_token_ms.items():
        keep = 100 if name == "full" else 10
        contenders.append(
            Contender(
                name=name,
                kind="package",
                path=name,
                model="m",
                dtype="fp32",
                device="CPU",
                num_tokens=100,
                keep_tokens=keep,
                policy="promprune",
                saliency_count=None,
                prompt_tokens=keep + 5,
                token_ids=(1,),
                package_bytes=10,
                engine_bytes=None,
                kv_cache_bytes=4,
                work={"prefill": StageWork(flops=10, traffic_bytes=10, bound_ms=5, uncounted=())},
                first_token_flops=keep * 10,
                cold_start=None,
            )
        )
        stages = {"first_token": Distribution.of(times), "prefill": Distribution.of([t / 2 for t in times])}
        case = Case(contender=name, batch=1, concurrency=1, stages=stages, prompts_per_s=1, tokens_per_s=1)
        cases.append(case)
    machine = Machine(
        cpu="c", cpus=2, memory_bytes=1, governor=None, cpu_mhz=None, system="s", gpus=("<gpu>",), versions={},
        load_before=None, load_after=None, other_cpu_fraction=(0.1,),
    )  # fmt: skip
    settings = RunRecord(
        command="promprune-bench full", image="i", image_sha256=None, prompt="p", new_tokens=1,
        rounds=len(next(iter(first_token_ms.values()))), warmup=1, backend="b", provider="cpu", threads=2,
    )  # fmt: skip
    ceilings = Ceilings(
        device="CPU", product_flops_per_s={"fp32": 1e9}, product="p", copy_bytes_per_s=2e9, read_bytes_per_s=3e9,
        memory="m",
    )  # fmt: skip
    return Report(
        report_version=2,
        created="2026-01-01T00:00:00+00:00",
        machine=machine,
        settings=settings,
        ceilings=ceilings,
        contenders=tuple(contenders),
        cases=tuple(cases),
    )


def with_load(report: Report, batch: int, concurrency: int = 1) -> tuple[Case, ...]:
    """The cases of a report as if they were of another load."""
    return tuple(msgspec.structs.replace(case, batch=batch, concurrency=concurrency) for case in report.cases)


def save(folder: Path, name: str, report: Report) -> str:
    path = folder / name
    path.write_bytes(msgspec.json.encode(report))
    return str(path)


def test_quantiles_by_hand() -> None:
    values = [40.0, 10.0, 30.0, 20.0]  # in order: 10 20 30 40
    assert quantile(values, 0.5) == 25
    assert quantile(values, 0.1) == pytest.approx(13)  # 0.3 of the way from 10 to 20
    assert quantile(values, 0.99) == pytest.approx(39.7)
    times = Distribution.of(values)
    assert (times.n, times.median_ms, times.p10_ms, times.p90_ms, times.min_ms) == (4, 25, 13, 37, 10)
    assert times.samples_ms == (40, 10, 30, 20)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        before, after = random.lognormal(0, 0.1, 25), 1.2 * random.lognormal(0, 0.1, 25)
        interval = ratio_of_medians(after.tolist(), before.tolist(), confidence=0.9)
        covered += interval.low <= 1.2 <= interval.high
    assert 0.84 <= covered / 200 <= 0.99


@pytest.mark.parametrize("rounds", [6, 8, 10])
def test_of_few_rounds_the_interval_covers_the_truth_almost_as_often(rounds: int) -> None:
    """In more than 90 % of the cases, for a nominal 95 %."""
    random = np.random.default_rng(2)
    covered = np.zeros(2)
    for _ in range(600):
        before, after = random.lognormal(0, 0.1, (2, rounds)).tolist()
        for kind, interval in enumerate((median_interval(after), ratio_of_medians(after, before))):
            assert interval.low is not None
            assert interval.high is not None
            covered[kind] += interval.low <= 1 <= interval.high
    assert covered.min() / 600 > 0.9
    assert covered.max() / 600 <= 0.99


def test_below_six_rounds_there_is_no_interval() -> None:
    six = [1.0, 2, 3, 4, 5, 6]
    assert median_interval(six[:5]) == (3, None, None)
    assert ratio_of_medians(six, six[:5]) == (3.5 / 3, None, None)
    for interval in (median_interval(six), ratio_of_medians(six, six)):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.estimate < interval.high


def test_drift_cancels_within_rounds() -> None:
    drift = [1.0, 3.0, 2.0, 5.0, 4.0, 2.0]
    ratios = paired_ratios([0.5 * x for x in drift], drift)
    assert median_interval(ratios) == (0.5, 0.5, 0.5)


FOURFOLD = {"pruned": [25, 50, 75, 50, 25, 75], "full": [100, 200, 300, 200, 100, 300]}


def test_a_gain_is_measured_against_what_flops_allow() -> None:
    """Time falls to a quarter, FLOPs to a tenth: (1 - 0.25) / (1 - 0.1) of what they allow."""
    (gain,) = gains(report_of(FOURFOLD))
    assert (gain.contender, gain.baseline) == ("pruned", "full")
    assert (gain.time.estimate, gain.flops) == (0.25, 0.1)
    assert gain.reached == pytest.approx(0.75 / 0.9)


def test_concurrent_calls_of_a_round_count_as_one() -> None:
    stages = {"total": Distribution.of([1.0, 3.0, 5.0, 7.0])}
    case = Case(contender="c", batch=1, concurrency=2, stages=stages, prompts_per_s=1, tokens_per_s=1)
    assert case.per_round("total") == (2.0, 6.0)


def test_the_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report = report_of({"pruned": [1, 2, 3], "full": [4, 5, 6]})
    path = Path(save(tmp_path, "a.json", report))
    assert read_report(path) == report
    old = msgspec.json.decode(path.read_bytes()) | {"report_version": 1, "ceilings": {"of another": "schema"}}
    path.write_bytes(msgspec.json.encode(old))
    with pytest.raises(PackageError, match="report version 1; expected version 2"):
        read_report(path)
    path.write_text("{}")
    with pytest.raises(PackageError, match="not a valid benchmark report"):
        read_report(path)


BASE = {"full": [100.0, 101, 99, 100, 100, 102], "pruned": [40.0, 41, 39, 40, 40, 41]}
SLOWER = {"full": BASE["full"], "pruned": [t * 1.2 for t in BASE["pruned"]]}


@pytest.mark.parametrize(
    ("after", "options", "exit_code"),
    [
        (BASE, [], 0),
        (SLOWER, [], 1),
        (SLOWER, ["--threshold", "0.3"], 0),
        ({name: [t * 2 for t in times] for name, times in BASE.items()}, ["--relative-to", "full"], 0),
        ({name: [t * 2 for t in times] for name, times in BASE.items()}, [], 1),
        ({**BASE, "pruned": [30.0, 70, 30, 70, 43, 43]}, [], 0),  # slower in the median, but by accident
    ],
)
def test_compare_says_whether_something_became_slower(
    tmp_path: Path, after: dict[str, list[float]], options: list[str], exit_code: int
) -> None:
    files = [save(tmp_path, "a.json", report_of(BASE)), save(tmp_path, "b.json", report_of(after))]
    outcome = run(command.main, "compare", *files, "--json", *options)
    assert outcome.exit_code == exit_code
    found = json.loads(outcome.stdout)["differences"]
    assert any(entry["regression"] for entry in found) == bool(exit_code)
    assert {entry["contender"] for entry in found} == {"full", "pruned"} - set(options)


def test_compare_prints_a_table(tmp_path: Path) -> None:
    files = [save(tmp_path, "a.json", report_of(BASE)), save(tmp_path, "b.json", report_of(SLOWER))]
    outcome = run(command.main, "compare", *files)
    assert "1 of 2 cases are slower by more than 5.0%" in outcome.stderr
    assert "SLOWER" in outcome.stdout


def test_of_few_rounds_compare_says_so_and_finds_no_regression(tmp_path: Path) -> None:
    before, after = ({name: times[:5] for name, times in report.items()} for report in (BASE, SLOWER))
    files = [save(tmp_path, "a.json", report_of(before)), save(tmp_path, "b.json", report_of(after))]
    outcome = run(command.main, "compare", *files)
    assert outcome.exit_code == 0
    assert outcome.stdout.count("too few rounds for an interval (5 of 6)") == 2
    pruned = json.loads(run(command.main, "compare", *files, "--json").stdout)["differences"][1]
    assert pruned["ratio"] == {"estimate": pytest.approx(1.2), "low": None, "high": None}
    assert (pruned["rounds"], pruned["regression"]) == (5, False)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"prompt": "other"}, "differ in prompt: 'p' in A, 'other' in B; expected two measurements of the same work"),
        ({"image_sha256": "1" * 64}, "differ in image_sha256"),
        ({"new_tokens": 2}, "differ in new_tokens: 1 in A, 2 in B"),
        ({"threads": 1}, "differ in threads"),
        ({"provider": "cuda"}, "differ in provider"),
        ({"backend": "tensorrt"}, "differ in backend"),
    ],
)
def test_reports_of_other_settings_are_not_compared(tmp_path: Path, changes: dict[str, object], wanted: str) -> None:
    report = report_of(BASE)
    other = msgspec.structs.replace(report, settings=msgspec.structs.replace(report.settings, **changes))
    outcome = run(command.main, "compare", save(tmp_path, "a.json", report), save(tmp_path, "b.json", other))
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    assert wanted in outcome.error_lines[0]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model": "n"}, "differ in model of pruned: 'm' in A, 'n' in B"),
        ({"dtype": "fp16"}, "differ in dtype of pruned"),
        ({"keep_tokens": 20}, "differ in keep_tokens of pruned: 10 in A, 20 in B"),
        ({"device": "CUDA"}, "differ in device of pruned"),
    ],
)
def test_contenders_of_one_name_that_are_not_the_same_are_not_compared(changes: dict[str, object], wanted: str) -> None:
    report = report_of(BASE)
    full, pruned = report.contenders
    other = msgspec.structs.replace(report, contenders=(full, msgspec.structs.replace(pruned, **changes)))
    with pytest.raises(ConfigError, match=wanted):
        compare_reports(report, other, CompareConfig())


def test_another_name_of_the_image_and_the_automatic_provider_are_no_difference() -> None:
    report = report_of(BASE)
    settings = msgspec.structs.replace(report.settings, image="copy.png", provider="auto")
    other = msgspec.structs.replace(report, settings=settings)
    assert len(compare_reports(report, other, CompareConfig()).differences) == 2


def test_a_load_without_the_reference_is_missing_and_no_mistake() -> None:
    """PyTorch runs no concurrent calls, so there is no reference for that load."""
    report = report_of(BASE)
    two_at_once = msgspec.structs.replace(report.case("pruned", 1, 1), concurrency=2)
    both = msgspec.structs.replace(report, cases=(*report.cases, two_at_once))
    found = compare_reports(both, both, CompareConfig(relative_to="full"))
    assert [(d.contender, d.concurrency) for d in found.differences] == [("pruned", 1)]
    with pytest.raises(ConfigError, match="relative-to 'nobody', which a report lacks; expected one of full, pruned"):
        compare_reports(both, both, CompareConfig(relative_to="nobody"))


@pytest.mark.parametrize(("confidence", "rounds"), [(0.9, 5), (0.95, 6), (0.99, 8), (0.999, 11)])
def test_an_interval_needs_rounds_for_its_confidence(confidence: float, rounds: int) -> None:
    values = [float(value) for value in range(1, rounds + 1)]
    assert least_rounds(confidence) == rounds
    assert median_interval(values, confidence=confidence).low is not None
    assert median_interval(values[1:], confidence=confidence).low is None


def test_cases_that_one_report_lacks_are_named(tmp_path: Path) -> None:
    report = report_of(BASE)
    more = msgspec.structs.replace(report, cases=(*report.cases, *with_load(report, 4)[:1]))
    less = report_of({"full": BASE["full"]})
    found = compare_reports(more, less, CompareConfig())
    assert [entry.contender for entry in found.differences] == ["full"]
    wanted = [MissingCase("pruned", "one prompt at a time", "B"), MissingCase("full", "4 prompts together", "B")]
    assert found.missing == wanted
    files = [save(tmp_path, "a.json", less), save(tmp_path, "b.json", more)]
    outcome = run(command.main, "compare", *files)
    assert outcome.exit_code == 1
    assert "missing in A: pruned, one prompt at a time" in outcome.error_lines
    outcome = run(command.main, "compare", *files, "--allow-missing", "--json")
    assert outcome.exit_code == 0
    first = {"contender": "pruned", "load": "one prompt at a time", "report": "A"}
    assert first in json.loads(outcome.stdout)["missing"]


@pytest.mark.parametrize(
    ("options", "exit_code", "wanted"),
    [
        (["--stage", "lunch"], 1, "received stage 'lunch'; expected one of preprocess"),
        (["--threshold", "0"], 1, "received threshold = 0; expected above 0"),
        (["--threshold", "much"], 2, "received 'much'; expected a number"),
        (["--confidence", "1"], 1, "received confidence = 1; expected between 0 and 1"),
        (["--relative-to", "nobody"], 1, "received --relative-to 'nobody', which a report lacks; expected one of full"),
        (["--stage", "decode"], 1, "no case with the stage 'decode' in common"),
    ],
)
def test_compare_refuses_in_one_line(tmp_path: Path, options: list[str], exit_code: int, wanted: str) -> None:
    file = save(tmp_path, "a.json", report_of(BASE))
    outcome = run(command.main, "compare", file, file, *options)
    assert outcome.exit_code == exit_code
    assert len(outcome.error_lines) == 1
    assert wanted in outcome.error_lines[0]


def test_reports_without_a_common_case_are_refused() -> None:
    with pytest.raises(ConfigError, match="no case"):
        compare_reports(report_of({"full": [1]}), report_of({"pruned": [1]}), CompareConfig())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    report = report_of({"pruned": [25, 50, 75], "full": [100, 200, 300]})
    page = to_html(report)
    assert page.count("<svg") == len(figures(report)) == 3  # no cold starts, so no memory; no intervals either
    assert to_html(report_of(FOURFOLD)).count("<svg") == 3
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link|<img", page)
    assert "&lt;gpu&gt;" in page
    assert to_html(report) == page


def test_a_busy_machine_is_named() -> None:
    report = report_of({"pruned": [25, 50, 75], "full": [100, 200, 300]})
    assert "idle machine" not in to_html(report)
    busy = msgspec.structs.replace(report.machine, other_cpu_fraction=(0.1, 0.6, 0.7))
    assert "60.0%, at most 70.0%; measure again" in to_html(msgspec.structs.replace(report, machine=busy))


def test_csv_and_markdown_say_the_same() -> None:
    report = report_of(FOURFOLD)
    rows = [line.split(",") for line in to_csv(report).splitlines()]
    assert len(rows) == 1 + 2 * 2
    assert dict(zip(rows[0], rows[1], strict=True))["median_ms"] == "50.0"
    assert "| pruned | full | 4.00x (4.00 ... 4.00) | -75.0% | -90.0% | 83.3% |" in to_markdown(report)


def test_of_few_rounds_no_interval_is_printed() -> None:
    text = to_markdown(report_of({"pruned": [25, 50, 75], "full": [100, 200, 300]}))
    assert "| pruned | full | 4.00x | -75.0% | -90.0% | 83.3% |" in text
    assert "Too few rounds for an interval (3 of 6)." in text


def test_the_tables_are_of_one_prompt_at_a_time_wherever_that_was_measured() -> None:
    """Medians are 50 ms one by one, and with four together too; the bound of one image is 5 ms, the prefill half."""
    report = report_of({"pruned": [50.0] * 6})
    both = msgspec.structs.replace(report, cases=(*with_load(report, 4), *report.cases))
    text = to_markdown(both)
    assert [case.batch for _, case in both.alone()] == [1]
    assert "## Stages, one prompt at a time\n" in text
    assert "| pruned | prefill | 0.000 | 0.0 | 5.00 | 25.0 | 20.0% |" in text
    only_four = to_markdown(msgspec.structs.replace(report, cases=with_load(report, 4)))
    assert "## Stages, 4 prompts together\n" in only_four
    assert "## Counted work of one image, measured: 4 prompts together\n" in only_four
    assert "| pruned | prefill | 0.000 | 0.0 | 5.00 | 25.0 |\n" in only_four  # without a share of the ceiling


def test_the_device_of_every_contender_is_in_the_table() -> None:
    assert "| device | CPU, fp32 | CPU, fp32 |" in to_markdown(report_of(FOURFOLD))


def test_without_ceilings_there_are_no_bounds() -> None:
    report = report_of({"pruned": [50.0] * 6})
    (contender,) = report.contenders
    unbound = {name: msgspec.structs.replace(work, bound_ms=None) for name, work in contender.work.items()}
    contenders = (msgspec.structs.replace(contender, work=unbound),)
    without = msgspec.structs.replace(report, ceilings=None, contenders=contenders)
    assert "| pruned | prefill | 0.000 | 0.0 | 25.0 |\n" in to_markdown(without)
    assert any(line.startswith("no ceilings measured") for line in machine_lines(without))


def test_the_larger_rate_of_copying_and_reading_bounds_the_memory() -> None:
    ceilings = report_of({"full": [1.0]}).ceilings
    assert ceilings is not None
    assert ceilings.memory_bytes_per_s == 3e9
    assert msgspec.structs.replace(ceilings, copy_bytes_per_s=4e9).memory_bytes_per_s == 4e9
