"""Tables of a report: for the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final, NamedTuple

from promprune.markdown import markdown_table
from promprune.runtime.bench.report import STAGES, Case, Ceilings, Contender, Report, StageWork, gains
from promprune.runtime.bench.statistics import Interval, least_rounds

__all__ = ["GAINS", "Grid", "grids", "machine_lines", "to_csv", "to_markdown"]

GAINS: Final = "Gains"  # beginning of that table's title
_BUSY: Final = 0.25  # share of the CPUs used by others above which times are unreliable
_STAGE_TITLES: Final = {"first_token": "first token", "decode": "decode, per token"}


class Grid(NamedTuple):
    """A table: a title, a line that explains it, and rows; the first column is text."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def grids(report: Report) -> list[Grid]:
    """Return all tables of a report."""
    made = [_stages(report), _gains(report), _work(report), _memory(report)]
    if len(report.cases) > len(report.contenders):
        made.insert(1, _loads(report))
    return [_without_empty_columns(grid) for grid in made if grid.rows]


def _without_empty_columns(grid: Grid) -> Grid:
    used = [column for column in range(len(grid.header)) if column == 0 or any(row[column] for row in grid.rows)]
    rows = [tuple(row[column] for column in used) for row in grid.rows]
    return grid._replace(header=tuple(grid.header[column] for column in used), rows=rows)


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    parts = [f"# Benchmark of {report.created}", *(f"- {line}" for line in machine_lines(report))]
    for grid in grids(report):
        parts += ["", f"## {grid.title}", "", grid.note, ""] if grid.note else ["", f"## {grid.title}", ""]
        parts.append(markdown_table(grid.header, grid.rows))
    return "\n".join(parts) + "\n"


def to_csv(report: Report) -> str:
    """Return one row per contender, load and stage; times in milliseconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    numbers = ("n", "median_ms", "p10_ms", "p90_ms", "p99_ms", "min_ms")
    facts = ("kind", "dtype", "device", "num_tokens", "keep_tokens", "prompt_tokens")
    writer.writerow(["contender", *facts, "batch", "concurrency", "stage", *numbers])
    for case in report.cases:
        contender = report.contender(case.contender)
        for stage, times in case.stages.items():
            row = [contender.name, *(getattr(contender, fact) for fact in facts), case.batch, case.concurrency, stage]
            writer.writerow([*row, *(getattr(times, number) for number in numbers)])
    return stream.getvalue()


def machine_lines(report: Report) -> list[str]:
    """Describe the machine, the settings, and the load of the machine by others."""
    machine, settings = report.machine, report.settings
    clock = f", {machine.cpu_mhz:.0f} MHz" if machine.cpu_mhz else ""
    governor = f", governor {machine.governor}" if machine.governor else ""
    memory = f"{machine.memory_bytes / 2**30:.0f} GiB"
    run = f"{settings.rounds} rounds after {settings.warmup} of warm-up, in turns; {settings.new_tokens} new tokens"
    asked = f"{settings.threads} threads, {settings.backend}, image: {settings.image}, prompt: {settings.prompt!r}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"{machine.cpu}, {machine.cpus} CPUs{clock}{governor}, {memory}, {machine.system}",
        *machine.gpus,
        versions,
        f"{run}, {asked}",
        _ceilings_line(report.ceilings),
        f"load average before and after: {machine.load_before}, {machine.load_after}",
    ]
    if machine.other_cpu_fraction:
        shares = sorted(machine.other_cpu_fraction)
        middle = shares[len(shares) // 2]
        note = "; measure again on an idle machine" if middle > _BUSY else ""
        lines.append(f"CPU used by others during a round: {_percent(middle)}, at most {_percent(shares[-1])}{note}")
    return [*lines, f"`{settings.command}`"]


def _ceilings_line(ceilings: Ceilings | None) -> str:
    if ceilings is None:
        return "no ceilings measured, so no bounds: ONNX Runtime cannot use the device that the packages run on"
    rates = ", ".join(f"{rate / 1e9:.1f} GFLOP/s in {dtype}" for dtype, rate in ceilings.product_flops_per_s.items())
    copy, read = (rate / 1e9 for rate in (ceilings.copy_bytes_per_s, ceilings.read_bytes_per_s))
    memory = f"{copy:.1f} GB/s copying and {read:.1f} GB/s reading ({ceilings.memory})"
    return f"ceilings measured on {ceilings.device}: {rates} ({ceilings.product}), {memory}"


def _stages(report: Report) -> Grid:
    alone = list(report.alone())
    measured = [stage for stage in STAGES if any(stage in case.stages for _, case in alone)]
    rows = [(_STAGE_TITLES.get(stage, stage), *(_cell(case, stage) for _, case in alone)) for stage in measured]
    tokens = [f"{contender.keep_tokens} of {contender.num_tokens}" for contender, _ in alone]
    devices = [f"{contender.device}, {contender.dtype}" for contender, _ in alone]
    rows[:0] = [("device", *devices), ("visual tokens", *tokens)]
    note = "Milliseconds: median (p10 ... p90). Preprocess to prefill add up to the first token, except for sampling."
    return Grid(f"Stages, {report.load_alone}", note, ("", *(contender.name for contender, _ in alone)), rows)


def _cell(case: Case, stage: str) -> str:
    times = case.stages.get(stage)
    return "" if times is None else f"{_ms(times.median_ms)} ({_ms(times.p10_ms)} ... {_ms(times.p90_ms)})"


def _loads(report: Report) -> Grid:
    rows = []
    for case in report.cases:
        times = case.stages["first_token"]
        load = (str(case.batch), str(case.concurrency))
        quantiles = (_ms(times.median_ms), _ms(times.p99_ms), str(times.n))
        rows.append((case.contender, *load, *quantiles, f"{case.prompts_per_s:.2f}", f"{case.tokens_per_s:.1f}"))
    header = ("", "batch", "calls at once", "first token, ms", "p99", "n", "prompts/s", "tokens/s")
    return Grid("Loads", "", header, rows)


def _gains(report: Report) -> Grid:
    rows = []
    for gain in gains(report):
        time = gain.time
        counted = ("", "") if gain.flops is None else (f"{gain.flops - 1:+.1%}", _percent(gain.reached))
        rows.append(
            (
                gain.contender,
                gain.baseline,
                _speed_up(time),
                f"{time.estimate - 1:+.1%}",
                *counted,
            )
        )
    note, faster = "Medians over rounds of the ratio within a round; FLOPs up to the first token.", "first token faster"
    if report.settings.rounds < least_rounds():
        note += f" Too few rounds for an interval ({report.settings.rounds} of {least_rounds()})."
    else:
        faster += " (95 % interval)"
    header = ("", "against", faster, "time", "FLOPs", "of what FLOPs allow")
    return Grid(f"{GAINS}, {report.load_alone}", note, header, rows)


def _speed_up(time: Interval) -> str:
    interval = "" if time.low is None or time.high is None else f" ({1 / time.high:.2f} ... {1 / time.low:.2f})"
    return f"{1 / time.estimate:.2f}x{interval}"


def _work(report: Report) -> Grid:
    rows = []
    for contender, case in report.alone():
        for stage, work in contender.work.items():
            counted = (f"{work.flops / 1e9:.3f}", f"{work.traffic_bytes / 1e6:.1f}")
            rows.append((contender.name, _STAGE_TITLES.get(stage, stage), *counted, *_against_bound(case, stage, work)))
    header = ("", "stage", "GFLOP", "MB moved", "bound, ms", "measured, ms", "of the ceiling")
    note = "From the graphs' shapes; the bound is at the measured ceilings."
    return Grid(f"Counted work of one image, measured: {report.load_alone}", note, header, rows)


def _against_bound(case: Case, stage: str, work: StageWork) -> tuple[str, str, str]:
    """Return the bound, the median, and bound / median if both are for one image."""
    times, bound = case.stages.get(stage), work.bound_ms
    median = None if times is None else times.median_ms
    one_image = (case.batch, case.concurrency) == (1, 1)
    share = bound / median if one_image and median and bound is not None else None
    return "" if bound is None else _ms(bound), "" if median is None else _ms(median), _percent(share)


def _memory(report: Report) -> Grid:
    rows = [_memory_row(contender) for contender in report.contenders]
    sizes = ("peak host, MB", "peak device, MB", "package, MB", "engines, MB", "KV cache, MB")
    return Grid("Memory and size", "", ("", "first token, new process, ms", *sizes), rows)


def _memory_row(contender: Contender) -> tuple[str, ...]:
    cold = contender.cold_start
    return (
        contender.name,
        "" if cold is None else _ms(cold.first_token_ms),
        _megabytes(cold.peak_host_bytes if cold else None),
        _megabytes(cold.peak_device_bytes if cold else None),
        _megabytes(contender.package_bytes),
        _megabytes(contender.engine_bytes),
        _megabytes(contender.kv_cache_bytes),
    )


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
