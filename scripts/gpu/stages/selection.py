"""The selection by itself: the authors' method, our batched path with its PyTorch loop, and with its Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from promprune import PrunedTokens, Selection, prune_tokens, select_tokens
from promprune.export.baselines.authors_method import AuthorsSelection, authors_select
from promprune.method import batched
from scripts.gpu.measure import Run, count_flops, graphed, timing
from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes
from tests.support.feature_sets import feature_set

Select = Callable[[Tensor, Tensor, int], Any]


@contextmanager
def without_triton() -> Iterator[None]:
    """Let ``prune_tokens`` take its PyTorch loop on CUDA too."""
    with mock.patch.object(batched, "_has_triton", return_value=False):
        yield


@dataclass(frozen=True)
class Contender:
    """A way to select, and the context in which it is called."""

    select: Select
    context: Callable[[], AbstractContextManager[None]] = nullcontext


AUTHORS, LOOP, TRITON = "authors", "batched, loop", "batched, Triton"
CONTENDERS = {
    AUTHORS: Contender(lambda x, a, keep: authors_select(x, a, keep, first_token_seeds=True)),
    TRITON: Contender(prune_tokens),
    LOOP: Contender(prune_tokens, without_triton),
}


class Inputs:
    """Features ``[B, N, D]`` and saliency ``[B, N]`` on the device, in buffers that a CUDA graph can refer to."""

    def __init__(self, batch: int, sizes: Sizes) -> None:
        self._sizes = sizes
        self.features = torch.empty(
            batch, sizes.num_tokens, sizes.hidden_size, device=sizes.device, dtype=getattr(torch, sizes.dtype)
        )
        self.saliency = torch.empty(batch, sizes.num_tokens, device=sizes.device)
        self.load(0)

    def load(self, first: int) -> None:
        """Copy feature sets ``first``, ``first + 1``, ... into the buffers."""
        sets = [
            feature_set(first + row, self._sizes.num_tokens, self._sizes.hidden_size)[1:]
            for row in range(len(self.features))
        ]
        self.features.copy_(torch.from_numpy(np.stack([x for x, _ in sets])))
        self.saliency.copy_(torch.from_numpy(np.stack([a for _, a in sets])))

    def call(self, contender: Contender, keep_tokens: int) -> Run:
        """Return a call of a contender on these buffers."""
        return lambda: contender.select(self.features, self.saliency, keep_tokens)


def run(sizes: Sizes, record: Record) -> None:
    """Record rows of ``check`` (against float64), then of ``time``; compiled variants, which take longest, last."""
    checks = Inputs(sizes.batches[-1], sizes)
    references = References(checks, sizes)
    for name, contender in CONTENDERS.items():
        call = checks.call(contender, sizes.keep_tokens)
        _check(record, references, name, "eager", contender, lambda call=call: call)
        if name != AUTHORS:
            _check(record, references, name, "graph", contender, lambda call=call: graphed(call))
    work = _work(sizes)
    for batch in reversed(sizes.batches):
        inputs = Inputs(batch, sizes)
        for name, contender in CONTENDERS.items():
            labels = {"time": name, "batch": batch, **work(batch)}
            call = inputs.call(contender, sizes.keep_tokens)
            _time(record, sizes, contender, lambda call=call: call, mode="eager", **labels)
            if name != AUTHORS:  # which waits for the device, so that no graph can hold it
                _time(record, sizes, contender, lambda call=call: graphed(call), mode="graph", **labels)
        _greedy_stage(record, sizes, inputs)
    _compiled(record, sizes, references)


class References:
    """What the float64 method keeps, of feature sets in groups as large as the buffers."""

    def __init__(self, inputs: Inputs, sizes: Sizes) -> None:
        self.inputs, self.keep_tokens = inputs, sizes.keep_tokens
        self.groups: dict[int, list[Selection]] = {}
        for first in range(0, sizes.feature_sets, len(inputs.features)):
            inputs.load(first)
            pairs = zip(inputs.features.double().cpu(), inputs.saliency.double().cpu(), strict=True)
            self.groups[first] = [select_tokens(x, a, sizes.keep_tokens) for x, a in pairs]

    def compare(self, run: Run) -> dict[str, Any]:
        """Run on every group and say how far its kept sets agree."""
        same = counts = common = images = 0
        errors = []
        for first, wanted in self.groups.items():
            self.inputs.load(first)
            indices, found, entropies = _outcome(run())
            for row, want in enumerate(wanted):
                kept = set(indices[row])
                images += 1
                same += kept == set(want.token_indices.tolist())
                common += len(kept & set(want.token_indices.tolist()))
                counts += found[row] == want.saliency_count
                errors.append(abs(entropies[row] - want.spectral_entropy))
        return {
            "images": images,
            "identical_sets": same,
            "identical_saliency_counts": counts,
            "common_tokens_fraction": common / (images * self.keep_tokens),
            "largest_entropy_error": max(errors),
        }


def _outcome(result: PrunedTokens | AuthorsSelection) -> tuple[list[list[int]], list[int], list[float]]:
    """Return kept indices, T_sal and entropy of every image."""
    if isinstance(result, AuthorsSelection):
        return result.indices.tolist(), result.counts, result.entropy.tolist()
    return result.token_indices.tolist(), result.saliency_count.tolist(), result.spectral_entropy.tolist()


def _check(
    record: Record, references: References, name: str, mode: str, contender: Contender, prepare: Callable[[], Run]
) -> None:
    def compare() -> dict[str, Any]:
        with contender.context():
            return references.compare(prepare())

    record.attempt(compare, check=name, mode=mode)


def _time(record: Record, sizes: Sizes, contender: Contender, prepare: Callable[[], Run], **labels: Any) -> None:
    def measure() -> dict[str, Any]:
        with contender.context():
            return timing(prepare(), sizes)

    record.attempt(measure, **labels)


def _work(sizes: Sizes) -> Callable[[int], dict[str, Any]]:
    """Return the work of a batch: FLOPs of the matrix products, bytes of features in, kept features out."""
    inputs = Inputs(1, sizes)
    with without_triton():
        flops = count_flops(inputs.call(CONTENDERS[LOOP], sizes.keep_tokens))
    token_bytes = sizes.hidden_size * inputs.features.element_size()
    traffic = (sizes.num_tokens + sizes.keep_tokens) * token_bytes + sizes.num_tokens * 4
    return lambda batch: {"flops": batch * flops, "traffic_bytes": batch * traffic, "unit": "fp32"}


def _greedy_stage(record: Record, sizes: Sizes, inputs: Inputs) -> None:
    """Time the greedy stage by itself, from a kernel of cosine similarities, all T tokens chosen by it."""
    unit = torch.nn.functional.normalize(inputs.features.float(), dim=-1)
    kernel, batch = unit @ unit.mT, len(unit)
    loss = torch.zeros(batch, sizes.num_tokens, device=sizes.device)
    count = torch.zeros(batch, dtype=torch.int64, device=sizes.device)

    def greedy() -> Tensor:
        return batched.coverage_picks(kernel, loss, count, sizes.keep_tokens)

    for name in (TRITON, LOOP):
        _time(record, sizes, CONTENDERS[name], lambda: greedy, time=f"greedy stage, {name}", mode="eager", batch=batch)


def _compiled(record: Record, sizes: Sizes, references: References) -> None:
    """Check and time both forms under ``torch.compile``, by itself and captured as a CUDA graph."""
    for name in (TRITON, LOOP):
        contender = CONTENDERS[name]
        compiled = Contender(torch.compile(contender.select, backend=sizes.compile_backend), contender.context)
        call = references.inputs.call(compiled, sizes.keep_tokens)
        _check(record, references, name, "compiled", compiled, lambda call=call: call)
        for batch in reversed(sizes.batches):
            call = Inputs(batch, sizes).call(compiled, sizes.keep_tokens)
            _time(record, sizes, compiled, lambda call=call: call, time=name, mode="compiled", batch=batch)
            replay = lambda call=call: graphed(call)  # noqa: E731 - as short as the line above
            _time(record, sizes, compiled, replay, time=name, mode="compiled, graph", batch=batch)
