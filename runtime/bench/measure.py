"""Running a benchmark: from packages and baselines to a report.

Contenders take turns: in every round each contender runs once under every load, in an order that changes from round to
round, so that disturbances on the machine affect all of them equally. A time ends when its result is on the host.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from promprune.package.manifest import Manifest, read_manifest, sha256_of_file
from promprune.package.sources import embedded_model_folder, source_of_package
from promprune.progress import Progress
from promprune.runtime.bench.cold_start import ColdStartRequest, ProcessStart, start_process, summary_of
from promprune.runtime.bench.config import BenchConfig
from promprune.runtime.bench.contenders import (
    Facts,
    Measurable,
    PackageContender,
    Question,
    Sample,
    device_of,
    open_packages,
    source_name,
)
from promprune.runtime.bench.machine import OtherLoad, describe_machine, load_average
from promprune.runtime.bench.plugins import plugin
from promprune.runtime.bench.report import (
    REPORT_VERSION,
    STAGES,
    Case,
    Ceilings,
    ColdStart,
    Contender,
    Distribution,
    GraphWork,
    Report,
    RunRecord,
    StageWork,
)
from promprune.runtime.sessions.config import RuntimeConfig, usable_cpus

__all__ = ["run_benchmark"]

_PAUSE_S: Final = 0.05  # between calls, so that the worker threads of the other library stop spinning
_SCENE_SIZE: Final = 512


class _Load(NamedTuple):
    """One contender under one load."""

    contender: Measurable
    batch: int
    concurrency: int


@dataclass
class _Measured:
    """Measurements of one load: samples in the order of the rounds, and the seconds of each round."""

    samples: list[Sample] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)


def run_benchmark(config: BenchConfig, progress: Progress) -> Report:
    """Measure, and return the report.

    Raises:
        PrompruneError: a package or baseline cannot be loaded or run, they are not of the same model, or an image
            cannot be read.
    """
    created, load_before = datetime.now(UTC), load_average()
    progress.announce(4 + (config.cold_starts > 0))
    config = replace(config, runtime=_fix_settings(config.runtime))
    manifests = {name: read_manifest(folder) for name, folder in config.packages.items()}
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(_image(config.image))
        question = Question(image=image, prompt=config.prompt, new_tokens=config.new_tokens)
        pytorch = _pytorch_settings(config, manifests)
        cold_starts = _cold_starts(config, question, pytorch, progress)
        with progress.step("load"):
            contenders = _open(config, pytorch, manifests, stack)
        probe = _open_probe(config, contenders, manifests, stack)
        loads = _loads(config, contenders)
        measured, others = _rounds(config, question, contenders, loads, probe, progress)
        ceilings = None if probe is None else probe.result()
        records = _records(contenders, question, ceilings, cold_starts, loads, measured, progress)
    return Report(
        report_version=REPORT_VERSION,
        created=created.isoformat(timespec="seconds"),
        machine=describe_machine(load_before=load_before, load_after=load_average(), other_cpu_fraction=others),
        settings=_settings(config),
        ceilings=ceilings,
        contenders=records,
        cases=tuple(_case(load, measured[load], config) for load in loads),
    )


def _fix_settings(runtime: RuntimeConfig) -> RuntimeConfig:
    """Return settings under which every call encodes its image again, with an explicit number of threads."""
    return replace(runtime, image_cache_size=0, num_threads=runtime.num_threads or usable_cpus())


@contextlib.contextmanager
def _image(given: Path | None) -> Iterator[Path]:
    """Yield the image file: the given one, or a rendered scene."""
    if given is not None:
        yield given
        return
    from promprune.embedded.scenes import render_scene

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "scene.png"
        render_scene(0, image_size=_SCENE_SIZE).image.save(path)
        yield path


def _pytorch_settings(config: BenchConfig, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """Return the settings of each baseline by name: the packages' model, on the device of the first package."""
    if not config.baselines:
        return {}
    pytorch = plugin("pytorch")

    package, first = next(iter(config.packages.values())), next(iter(manifests.values()))
    model = config.model or source_of_package(package, first.source.model) or str(embedded_model_folder())
    pytorch.check_weights(model, manifests)
    unpruned = pytorch.PytorchSettings(
        model=model,
        dtype=first.dtype,
        device=pytorch.torch_device(device_of(package, config.runtime)),
        threads=config.runtime.num_threads or 1,
        source=source_name(first),
    )
    found = {"Hugging Face": unpruned} if "hf" in config.baselines else {}
    if "authors" in config.baselines:
        for manifest in manifests.values():
            tokens, selection = manifest.tokens_of(), manifest.selection.config
            if tokens.is_pruned:
                found[f"authors, {tokens.keep_tokens} tokens"] = replace(
                    unpruned, keep_tokens=tokens.keep_tokens, selection=selection
                )
    return found


def _cold_starts(
    config: BenchConfig, question: Question, pytorch: Mapping[str, Any], progress: Progress
) -> dict[str, ColdStart]:
    """Measure cold starts in new processes, before this process loads anything; the first of each is a warm-up."""
    if config.cold_starts == 0:
        return {}
    asked: dict[str, Any] = {"image": str(question.image), "prompt": question.prompt}
    options = asdict(config.runtime)
    requests = {
        **{name: ColdStartRequest(**asked, package=str(f), options=options) for name, f in config.packages.items()},
        **{name: ColdStartRequest(**asked, pytorch=asdict(settings)) for name, settings in pytorch.items()},
    }
    order, shuffle = list(requests), random.Random(0)
    starts: dict[str, list[ProcessStart]] = defaultdict(list)
    turns = 1 + config.cold_starts
    with progress.step("cold starts", items=turns * len(requests)) as step:
        for turn in range(turns):
            shuffle.shuffle(order)
            for name in order:
                start = start_process(requests[name])
                if turn > 0:
                    starts[name].append(start)
                step.advance()
    return {name: summary_of(found) for name, found in starts.items()}


def _open(
    config: BenchConfig,
    pytorch: Mapping[str, Any],
    manifests: Mapping[str, Manifest],
    stack: contextlib.ExitStack,
) -> list[Measurable]:
    contenders: list[Measurable] = [*open_packages(config.packages, config.runtime)]
    if pytorch:
        module = plugin("pytorch")
        shared = module.PytorchModel(next(iter(pytorch.values())))
        contenders += [module.PytorchContender(name, shared, settings) for name, settings in pytorch.items()]
    if config.openvino is not None:
        from promprune.runtime.bench.openvino import OpenVinoContender, OpenVinoModel

        first = next(iter(manifests.values()))
        peer = OpenVinoModel(config.openvino, first.dtype, config.runtime.num_threads or 1)
        num_tokens = first.tokens_of().num_tokens
        removed = {round(100 * (1 - manifest.tokens_of().ratio)) for manifest in manifests.values()}
        contenders += [
            OpenVinoContender(f"OpenVINO, {percent} % removed", peer, num_tokens, percent)
            for percent in sorted(removed)
        ]
    for contender in contenders:
        stack.callback(contender.close)
    return contenders


def _open_probe(
    config: BenchConfig,
    contenders: Sequence[Measurable],
    manifests: Mapping[str, Manifest],
    stack: contextlib.ExitStack,
) -> Any:
    """Return the probe that measures the ceilings of the packages' device; None if that is impossible."""
    device = next(contender.pipeline.device for contender in contenders if isinstance(contender, PackageContender))
    dtypes = dict.fromkeys(manifest.dtype for manifest in manifests.values())
    probe = plugin("ceilings").open_ceiling_probe(dtypes, device=device, threads=config.runtime.num_threads or 1)
    if probe is not None:
        stack.callback(probe.close)
    return probe


def _loads(config: BenchConfig, contenders: Sequence[Measurable]) -> list[_Load]:
    """Return the loads of every contender: every batch size, and every number of calls, but not both combined."""
    loads = [(batch, 1) for batch in config.batches] + [(1, calls) for calls in config.concurrencies if calls > 1]
    return [
        _Load(contender, batch, calls)
        for batch, calls in dict.fromkeys(loads)
        for contender in contenders
        if (calls == 1 or contender.concurrent) and (batch == 1 or contender.batched)
    ]


def _rounds(
    config: BenchConfig,
    question: Question,
    contenders: Sequence[Measurable],
    loads: Sequence[_Load],
    probe: Any,
    progress: Progress,
) -> tuple[dict[_Load, _Measured], tuple[float, ...]]:
    """Run the warm-up and the rounds; return the samples, and the CPU share of other processes in each round."""
    order, shuffle = list(loads), random.Random(0)
    with progress.step("warm-up", items=config.warmup * len(loads)) as step:
        for _ in range(config.warmup):
            if probe is not None:
                probe.run()
            for load in order:
                _call(load, question)
                step.advance()
    for contender in contenders:
        contender.separate_selection(question.image)
    measured: dict[_Load, _Measured] = defaultdict(_Measured)
    others, other_load = [], OtherLoad()
    with progress.step("rounds", items=config.rounds * len(loads)) as step:
        for _ in range(config.rounds):
            shuffle.shuffle(order)
            if probe is not None:
                probe.run()
            for load in order:
                time.sleep(_PAUSE_S)
                samples, wall = _call(load, question)
                measured[load].samples += samples
                measured[load].walls.append(wall)
                step.advance()
            others.append(other_load.since_last())
    return measured, tuple(share for share in others if share is not None)


def _call(load: _Load, question: Question) -> tuple[list[Sample], float]:
    """Run one load once; return its samples and the seconds it took."""
    start = time.perf_counter()
    if load.concurrency == 1:
        sample = load.contender.run(question, load.batch)
        wall = time.perf_counter() - start
        apart = load.contender.selection_apart_ms(load.batch)
        return [sample if apart is None else sample.with_selection(apart)], wall
    with ThreadPoolExecutor(load.concurrency) as pool:
        jobs = [pool.submit(load.contender.run, question, load.batch) for _ in range(load.concurrency)]
        return [job.result() for job in jobs], time.perf_counter() - start


def _records(
    contenders: Sequence[Measurable],
    question: Question,
    ceilings: Ceilings | None,
    cold_starts: Mapping[str, ColdStart],
    loads: Sequence[_Load],
    measured: Mapping[_Load, _Measured],
    progress: Progress,
) -> tuple[Contender, ...]:
    records = []
    with progress.step("count the work", items=len(contenders)) as step:
        for contender in contenders:
            facts = contender.facts(question)
            first = next(load for load in loads if load.contender is contender)
            work = {name: _stage_work(counted, facts, ceilings) for name, counted in (facts.work or {}).items()}
            records.append(facts.record(work, measured[first].samples[-1].token_ids, cold_starts.get(contender.name)))
            step.advance()
    return tuple(records)


def _stage_work(work: GraphWork, facts: Facts, ceilings: Ceilings | None) -> StageWork:
    bound_ms = None
    if ceilings is not None and facts.device == ceilings.device:
        computing = work.flops / ceilings.product_flops_per_s[facts.dtype]
        bound_ms = round(max(computing, work.traffic_bytes / ceilings.memory_bytes_per_s) * 1000, 4)
    return StageWork(flops=work.flops, traffic_bytes=work.traffic_bytes, bound_ms=bound_ms, uncounted=work.uncounted)


def _case(load: _Load, measured: _Measured, config: BenchConfig) -> Case:
    samples = [sample.stages_ms for sample in measured.samples]
    stages = {
        name: Distribution.of([sample[name] for sample in samples])
        for name in STAGES
        if all(name in sample for sample in samples)
    }
    answered = load.batch * load.concurrency / statistics.median(measured.walls)
    return Case(
        contender=load.contender.name,
        batch=load.batch,
        concurrency=load.concurrency,
        stages=stages,
        prompts_per_s=round(answered, 4),
        tokens_per_s=round(answered * config.new_tokens, 4),
    )


def _settings(config: BenchConfig) -> RunRecord:
    return RunRecord(
        command=config.command,
        image="rendered scene 0" if config.image is None else config.image.name,
        image_sha256=None if config.image is None else sha256_of_file(config.image),
        prompt=config.prompt,
        new_tokens=config.new_tokens,
        rounds=config.rounds,
        warmup=config.warmup,
        backend=config.runtime.backend,
        provider=config.runtime.provider,
        threads=config.runtime.num_threads or usable_cpus(),
    )
