"""The report of a benchmark: the schema of its JSON, and the gains computed from it.

Every key of a quantity ends in its unit: ``_ms``, ``_s``, ``_bytes``, ``_flops``, ``_per_s``. The times of every round
are stored, so that any statistic can be computed later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from promprune.errors import PackageError
from promprune.package.contents import read_record
from promprune.package.record import Record
from promprune.runtime.bench.statistics import Interval, median_interval, paired_ratios, quantile

__all__ = [
    "FIRST_TOKEN_STAGES",
    "REPORT_VERSION",
    "STAGES",
    "Case",
    "Ceilings",
    "ColdStart",
    "Contender",
    "Distribution",
    "Gain",
    "GraphWork",
    "Machine",
    "Report",
    "RunRecord",
    "StageWork",
    "gains",
    "read_report",
]

REPORT_VERSION: Final = 2
# The stages that follow one another up to the first token.
FIRST_TOKEN_STAGES: Final = ("preprocess", "vision", "selection", "splice", "prefill")
STAGES: Final = (*FIRST_TOKEN_STAGES, "first_token", "decode", "total")

Count = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=0)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Kind = Literal["package", "hugging_face", "authors", "peer"]


class Machine(Record, frozen=True):
    """The machine, and its load during the benchmark."""

    cpu: str
    cpus: Count  # the number that this process may use
    memory_bytes: Size
    governor: str | None  # of the CPU's clock; None if the system does not tell
    cpu_mhz: float | None
    system: str
    gpus: tuple[str, ...]  # name, driver, clocks and memory from nvidia-smi
    versions: dict[str, str]
    load_before: float | None  # 1-minute load average
    load_after: float | None
    # For every round, the share of all CPUs that other processes used; empty if the system does not tell.
    other_cpu_fraction: tuple[float, ...]


class RunRecord(Record, frozen=True):
    """The settings of a benchmark."""

    command: str
    image: str
    image_sha256: str | None  # of the file; None for the rendered scene
    prompt: str
    new_tokens: Count
    rounds: Count
    warmup: Size
    backend: str
    provider: str
    threads: Count


class Ceilings(Record, frozen=True):
    """The highest rates of the device, measured in the same process with large products, a large copy and a sum."""

    device: str
    product_flops_per_s: dict[str, float]  # by dtype of the packages
    product: str  # size of the products
    copy_bytes_per_s: float  # bytes read plus bytes written
    read_bytes_per_s: float  # bytes read, with almost nothing written
    memory: str  # size of both arrays

    @property
    def memory_bytes_per_s(self) -> float:
        """The higher of both rates, an upper limit for the traffic of every stage."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class GraphWork:
    """The work of one run of a graph.

    Attributes:
        flops: two per multiply-add.
        traffic_bytes: bytes of all weights that are read, and of the graph's inputs and outputs.
        uncounted: operators outside the ONNX standard, whose work is unknown and not included in ``flops``.
    """

    flops: int
    traffic_bytes: int
    uncounted: tuple[str, ...] = ()


class StageWork(Record, frozen=True):
    """The work of a stage, counted from the shapes of its graph."""

    flops: Size  # 2 per multiply-add of matrix products, convolutions and attention; nothing else
    traffic_bytes: Size  # each weight once, and the graph's inputs and outputs: the minimum
    bound_ms: Milliseconds | None  # the longer of both at the measured ceilings; None without ceilings
    uncounted: tuple[str, ...]  # operators outside the ONNX standard, which are not counted


class ColdStart(Record, frozen=True):
    """New processes, each measured from its start to the first token; the first one is not counted."""

    first_token_ms: Milliseconds  # median; from starting the process
    peak_host_bytes: Size  # most resident memory, median
    peak_device_bytes: Size | None  # None without a GPU
    n: Count


class Contender(Record, frozen=True):
    """One contender of the benchmark."""

    name: str
    kind: Kind
    path: str
    model: str  # its source, and the beginning of its weights' digest if known
    dtype: str
    device: str
    num_tokens: Count  # N, visual tokens of the image before selection
    keep_tokens: Count  # T, after selection
    policy: str  # which tokens are kept: "all", "promprune", ...
    saliency_count: Size | None  # T_sal of this image; None without a selection
    prompt_tokens: Count  # including visual tokens
    token_ids: tuple[int, ...]  # the greedy answer; equal answers mean equal work
    package_bytes: Size | None
    engine_bytes: Size | None
    kv_cache_bytes: Size | None  # at the end of the answer
    work: dict[str, StageWork]  # by stage, for one image; empty if no graph was counted
    first_token_flops: Size | None
    cold_start: ColdStart | None


class Distribution(Record, frozen=True):
    """The times of one stage of one case: per call; for ``decode``, per token after the first."""

    n: Count
    median_ms: Milliseconds
    p10_ms: Milliseconds
    p90_ms: Milliseconds
    p99_ms: Milliseconds
    min_ms: Milliseconds
    samples_ms: tuple[float, ...]  # in the order of the rounds, and within a round of the concurrent calls

    @classmethod
    def of(cls, samples: Sequence[float]) -> Distribution:
        """Summarise times in milliseconds."""
        p10, median, p90, p99 = (round(quantile(samples, fraction), 4) for fraction in (0.1, 0.5, 0.9, 0.99))
        return cls(
            n=len(samples),
            median_ms=median,
            p10_ms=p10,
            p90_ms=p90,
            p99_ms=p99,
            min_ms=round(min(samples), 4),
            samples_ms=tuple(round(sample, 4) for sample in samples),
        )


class Case(Record, frozen=True):
    """One contender under one load."""

    contender: str
    batch: Count  # prompts answered together, each with its image
    concurrency: Count  # calls at the same time
    stages: dict[str, Distribution]
    prompts_per_s: float  # answered prompts, in the median round
    tokens_per_s: float  # generated tokens, in the median round

    @property
    def load(self) -> str:
        """The load in words: batch size, and number of concurrent calls."""
        together = "one prompt at a time" if self.batch == 1 else f"{self.batch} prompts together"
        return together if self.concurrency == 1 else f"{together}, {self.concurrency} calls at once"

    def per_round(self, stage: str) -> tuple[float, ...]:
        """Return one time per round, in milliseconds: the mean of its concurrent calls."""
        samples, k = self.stages[stage].samples_ms, self.concurrency
        return tuple(sum(samples[i : i + k]) / k for i in range(0, len(samples), k))


class Report(Record, frozen=True):
    """The content of ``report.json``."""

    report_version: int
    created: str  # UTC, ISO 8601
    machine: Machine
    settings: RunRecord
    ceilings: Ceilings | None  # None if they cannot be measured on the packages' device
    contenders: tuple[Contender, ...]
    cases: tuple[Case, ...]

    def contender(self, name: str) -> Contender:
        """Return a contender by its name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def case(self, name: str, batch: int, concurrency: int) -> Case | None:
        """Return a case; None if that load was not measured."""
        wanted = (name, batch, concurrency)
        return next((case for case in self.cases if (case.contender, case.batch, case.concurrency) == wanted), None)

    def alone(self) -> Iterator[tuple[Contender, Case]]:
        """Yield the contenders with their case of one prompt at a time, or else with their first case."""
        for contender in self.contenders:
            first = next(case for case in self.cases if case.contender == contender.name)
            yield contender, self.case(contender.name, 1, 1) or first

    @property
    def load_alone(self) -> str:
        """The load of :meth:`alone`, in words."""
        return " or ".join(dict.fromkeys(case.load for _, case in self.alone()))


class Gain(NamedTuple):
    """One contender compared with the unpruned contender of its toolchain.

    Attributes:
        contender, baseline: their names.
        time: time to first token divided by that of the baseline, median over rounds, with its 95 % interval if there
            are enough rounds.
        flops: counted FLOPs divided by those of the baseline; None if one of them was not counted.
    """

    contender: str
    baseline: str
    time: Interval
    flops: float | None

    @property
    def reached(self) -> float | None:
        """The reduction of time divided by the reduction of FLOPs; 1 is the ideal."""
        return None if self.flops is None or self.flops >= 1 else (1 - self.time.estimate) / (1 - self.flops)


def gains(report: Report) -> list[Gain]:
    """Compare every contender with the unpruned one of its toolchain, under the load of :meth:`Report.alone`."""
    alone = list(report.alone())
    full = {_toolchain(contender): (contender, case) for contender, case in alone if _keeps_all(contender)}
    found = []
    for contender, case in alone:
        if _keeps_all(contender) or _toolchain(contender) not in full:
            continue
        baseline, reference = full[_toolchain(contender)]
        ratios = paired_ratios(case.per_round("first_token"), reference.per_round("first_token"))
        time = median_interval(ratios)
        counted = contender.first_token_flops, baseline.first_token_flops
        flops = counted[0] / counted[1] if counted[0] and counted[1] else None
        found.append(Gain(contender.name, baseline.name, time, flops))
    return found


def read_report(path: Path) -> Report:
    """Read a report's JSON.

    Raises:
        PackageError: it is not a report, or has another version.
    """
    try:
        return read_record(
            path,
            Report,
            version=REPORT_VERSION,
            key="report_version",
            fix="run promprune-bench again",
            what="benchmark report",
        )
    except OSError as error:
        raise PackageError(
            f"{path} cannot be read ({error.strerror})", expected="a report.json of promprune-bench"
        ) from error


def _keeps_all(contender: Contender) -> bool:
    return contender.keep_tokens == contender.num_tokens


def _toolchain(contender: Contender) -> tuple[str, str, str]:
    """Return a key that a contender shares with its baseline; that of the authors' method is unpruned PyTorch."""
    tools = "pytorch" if contender.kind in ("hugging_face", "authors") else contender.kind
    return tools, contender.model, contender.dtype
