"""Comparing a lowered decoder with the portable one, in all ways in which the runtime runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from promprune.package.lowered import SEQLENS, TOTAL_LENGTH
from promprune.package.manifest import CheckRecord
from promprune.runtime.sessions import Session

__all__ = ["LOGITS_LIMITS", "Run", "check_logits", "lowered_logits", "portable_logits", "sample_runs"]

Array = NDArray[Any]

# Largest difference of two logits divided by the largest logit, by the decoder's dtype.
LOGITS_LIMITS: Final[Mapping[str, float]] = {"float32": 1e-4, "float16": 1e-2}

_LENGTHS: Final = (23, 40, 7)  # lengths of the sample prompts, each in one row of the cache
_STEPS: Final = 6  # decode steps of all rows in one batch
_KEPT: Final = 11  # the first row is truncated to this length, before it is continued in chunks
_CHUNKS: Final = (9, 14, 1)
_CAPACITY: Final = 64


class Run(NamedTuple):
    """New positions of some adjacent rows.

    Attributes:
        name: the way of running that it is an example of.
        rows: rows of the cache.
        begins: for each row, the number of positions that are kept.
        new: number of new positions per row.
    """

    name: str
    rows: range
    begins: Sequence[int]
    new: int


def sample_runs() -> Iterator[Run]:
    """Yield runs that build on each other: prefill, decode with rows of different lengths, truncate, continue."""
    rows = range(len(_LENGTHS))
    for row, length in enumerate(_LENGTHS):
        yield Run("prefill", range(row, row + 1), [0], length)
    for step in range(_STEPS):
        yield Run("decode", rows, [length + step for length in _LENGTHS], 1)
    begin = _KEPT
    for count in _CHUNKS:
        yield Run("continue", range(1), [begin], count)
        begin += count


def portable_logits(session: Session, embeds: Array) -> dict[str, list[Array]]:
    """Run the portable decoder row by row, without any padding.

    Args:
        session: the decoder.
        embeds: [rows, positions, hidden], embeddings of the sample texts.

    Returns:
        The logits [vocabulary] of every row, by the name of the run.
    """
    past = [name for name in session.inputs if name.startswith("past_key_values.")]
    caches = [{name: _buffer(session, name, 1, 0) for name in past} for _ in _LENGTHS]
    logits: dict[str, list[Array]] = {}
    for run in sample_runs():
        for row, begin in zip(run.rows, run.begins, strict=True):
            kept = {name: cache[:, :, :begin] for name, cache in caches[row].items()}
            mask = {"attention_mask": np.ones((1, begin + run.new), np.int64)}
            outputs = session.run({**_feeds(session, embeds, row, [begin], run.new), **mask, **kept})
            caches[row] = {name: outputs[_present(name)] for name in past}
            logits.setdefault(run.name, []).append(outputs["logits"][0, -1])
    return logits


def lowered_logits(session: Session, embeds: Array) -> dict[str, list[Array]]:
    """Run the lowered decoder on the same inputs; unused positions of its buffers contain large numbers."""
    past = [name for name in session.inputs if name.startswith("past_key_values.")]
    buffers = {name: _buffer(session, name, len(_LENGTHS), _CAPACITY) for name in past}
    logits: dict[str, list[Array]] = {}
    for run in sample_runs():
        totals = np.array(run.begins) + run.new
        lengths = {SEQLENS: (totals - 1).astype(np.int32), TOTAL_LENGTH: totals.max(keepdims=True).astype(np.int32)}
        kept = {name: buffer[run.rows.start : run.rows.stop] for name, buffer in buffers.items()}
        run_on_kept = session.bind_buffers(kept, {_present(name): name for name in past})
        outputs = run_on_kept({**_feeds(session, embeds, run.rows.start, run.begins, run.new), **lengths})
        logits.setdefault(run.name, []).extend(outputs["logits"].numpy()[:, -1])
    return logits


def check_logits(
    reference: Mapping[str, list[Array]], found: Mapping[str, list[Array]], dtype: str
) -> tuple[CheckRecord, ...]:
    """Compare the logits of each kind of run."""
    return tuple(_check(name, reference[name], found[name], LOGITS_LIMITS[dtype]) for name in reference)


def _check(name: str, reference: list[Array], found: list[Array], limit: float) -> CheckRecord:
    wanted, got = (np.stack(logits).astype(np.float64) for logits in (reference, found))
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    return CheckRecord(
        name=f"lowered decoder: {name}",
        measured=error,
        comparison="<=",
        limit=limit,
        passed=bool(error <= limit),
        detail=f"largest difference of {len(wanted)} rows of logits, divided by the largest logit",
    )


def _feeds(session: Session, embeds: Array, row: int, begins: Sequence[int], count: int) -> dict[str, Array]:
    """Return the embeddings and positions of the next ``count`` positions of some rows, from ``row`` on."""
    places = np.array(begins)[:, None] + np.arange(count)
    positions = places if len(session.inputs["position_ids"].shape) == 2 else _spread(places)
    rows = np.arange(row, row + len(begins))[:, None]
    return {"inputs_embeds": np.ascontiguousarray(embeds[rows, places]), "position_ids": positions}


def _spread(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rotary positions that differ for time, height and width, as those of an image do; [3, rows, count]."""
    return np.stack([places, places // 2 + 1, places // 3 + 2])


def _buffer(session: Session, name: str, rows: int, capacity: int) -> Array:
    spec = session.inputs[name]
    return np.full((rows, int(spec.shape[1]), capacity, int(spec.shape[3])), 1e4, spec.dtype)


def _present(name: str) -> str:
    return f"present.{name.removeprefix('past_key_values.')}"
