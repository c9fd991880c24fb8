"""The stages of both runs, in the order of their worth, and how long each may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["RUNS", "Stage", "limits_s", "plan_lines", "stage_named"]


@dataclass(frozen=True)
class Stage:
    """One stage, run in a process of its own.

    Attributes:
        name: of the stage and of its JSON file.
        module: in ``scripts.gpu.stages``; its ``run(sizes, record, **options)`` is called.
        limit_s: seconds after which the process is killed.
        measures: what it measures, for the printed plan.
        options: further arguments of ``run``.
    """

    name: str
    module: str
    limit_s: int
    measures: str
    options: Mapping[str, str] = field(default_factory=dict)


RUNS: Mapping[str, tuple[Stage, ...]] = {
    "pytorch": (
        Stage("selection", "selection", 120, "authors' method, batched method, Triton kernel; eager, graph, compiled"),
        Stage("neighbours", "neighbours", 90, "ViT-L/14-336 forward and 7B prefill; eager, graph, compiled"),
        Stage("llava_next", "first_token", 110, "first token of LLaVA-NeXT-7B", {"family": "llava_next"}),
        Stage("llava", "first_token", 80, "first token of LLaVA-1.5-7B", {"family": "llava"}),
        Stage("roofline", "roofline", 40, "copy bandwidth and matrix products: the ceilings"),
        Stage("gpu_tests", "gpu_tests", 70, "pytest -m gpu"),
    ),
    "onnxruntime": (
        Stage("onnxruntime", "onnxruntime_cuda", 150, "exported packages on CUDA against the CPU"),
        Stage("tensorrt_rtx", "tensorrt_rtx", 60, "whether TensorRT for RTX builds and runs on this GPU"),
    ),
}


def stage_named(name: str) -> Stage:
    """Return a stage of either run.

    Raises:
        KeyError: no stage has that name.
    """
    return {stage.name: stage for stages in RUNS.values() for stage in stages}[name]


def limits_s(stages: tuple[Stage, ...], budget_s: float) -> list[float]:
    """Return each stage's limit if every earlier one takes all of its own: 0 for those that do not fit at all."""
    limits, left = [], budget_s
    for stage in stages:
        limits.append(max(0.0, min(stage.limit_s, left)))
        left -= limits[-1]
    return limits


def plan_lines(stages: tuple[Stage, ...], budget_s: float) -> list[str]:
    """Return the plan as lines of text: seconds of each stage, and the sum."""
    limits = limits_s(stages, budget_s)
    lines = [f"{stage.name:<14}{limit:>5.0f} s  {stage.measures}" for stage, limit in zip(stages, limits, strict=True)]
    return [*lines, f"{'at most':<14}{sum(limits):>5.0f} s  of a budget of {budget_s:.0f} s"]
