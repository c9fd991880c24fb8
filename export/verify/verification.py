"""Verification: is the package the model it was made from?

Checked in this order, as far as each can be: names, dtypes and shapes; values against torch; the selection against
the method in float64; answers, token for token. Every comparison of values is relative to the spread of the
reference, because the features of a real tower have a standard deviation of several units.

Where the source or the package does not fit into memory, both are run a part at a time, layer for layer and with all
weights, on fewer inputs; what was not checked then is recorded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from promprune.embedded import scenes
from promprune.errors import PrompruneError
from promprune.export.checkpoint.loading import Checkpoint
from promprune.export.checkpoint.out_of_core import PiecewiseSession, available_memory
from promprune.export.checkpoint.prompts import prompt_text
from promprune.export.families import Family, VisionModule, VisionReference, grids_of
from promprune.export.verify.config import DEFAULT_CHECK_IMAGES
from promprune.method.config import SelectionConfig
from promprune.method.reference import select_tokens
from promprune.package.agree import differences
from promprune.package.manifest import (
    DECODER,
    EMBED_TOKENS,
    CheckRecord,
    GraphRecord,
    Manifest,
    SelectionRecord,
    TokenCounts,
    VerificationRecord,
)
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import inference_session, tensor_record

__all__ = ["LIMITS", "Limits", "Sample", "check_samples", "verify_package"]

Array = NDArray[Any]
MAX_NEW_TOKENS: Final = 16
MAX_SATURATED: Final = 0.9  # share of the check images
BATCH_SIZE: Final = 8
MIN_TAU_SHARE: Final = 40  # an entropy that is off by tau / 40 moves at most 0.6 % of the budget
CHOSEN_FROM: Final = ("encoder/image_features", "encoder/saliency")  # what a selection in a graph chooses from


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a package may be from torch in fp32.

    Attributes:
        relative_error: largest |difference| over the standard deviation of the reference.
        identical_sets: least share of check images on which the kept set is that of the float64 method. Two kept
            sets can differ by rounding where two tokens are all but tied.
        overlap: least mean share of the kept tokens that the float64 method keeps as well.
        equal_answers: least share of greedy answers that are equal to torch's, token for token.
    """

    relative_error: float
    identical_sets: float
    overlap: float
    equal_answers: float


# fp32: features and logits differ by some 1e-6 to 1e-5, a peaked saliency by up to 6e-5 on 200 images; a graph that is
# wired wrongly, by 1e-2 and more. fp16, on random models: up to 4.0e-2 in packages (a saliency behind 27 layers; else
# 1.3e-2), 8.8e-2 in transformers' own models in fp16. bf16, compared in fp32 on the same weights: up to 1.6e-2, as the
# graph's constants, such as the scale of the attention, are rounded to 8 bits; transformers' own models in bf16 are off
# by 1.9e-2 to 3.2e-1 (scripts/benchmarks/measure_precision.py).
LIMITS: Final = {
    "fp32": Limits(relative_error=3e-4, identical_sets=0.75, overlap=0.98, equal_answers=0.98),
    "fp16": Limits(relative_error=5e-2, identical_sets=0.75, overlap=0.98, equal_answers=0.75),
    "bf16": Limits(relative_error=3e-2, identical_sets=0.75, overlap=0.98, equal_answers=0.75),
}

# Memory of a verification that is not out of core, in bytes for each parameter of the model: the reference in fp32, the
# weights as the package has them, and the copy that ONNX Runtime makes of them.
BYTES_PER_PARAMETER: Final = 12
OUT_OF_CORE_IMAGES: Final = 2
OUT_OF_CORE_TOKENS: Final = 24  # of a text
FP16_MAX: Final = 65504.0
FP16_WARNING: Final = 0.25  # share of FP16_MAX above which features are warned of


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with one question."""

    image: Image.Image
    question: str


def check_samples(count: int, *, sizes: Sequence[tuple[int, int]]) -> list[Sample]:
    """Render the images that a package is verified on: scenes of shapes and digits, never trained on.

    Args:
        count: of the images.
        sizes: (height, width) of the images in pixels, in turns; scenes are square, others are stretched.
    """
    samples = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        scene = scenes.render_scene(scenes.TEST_SEEDS[index], image_size=max(height, width))
        question = scenes.questions(scene, per_type=1, seed=index)[index % 2].text
        image = scene.image if height == width else scene.image.resize((width, height))
        samples.append(Sample(image=image, question=question))
    return samples


def verify_package(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, *, num_images: int = DEFAULT_CHECK_IMAGES
) -> VerificationRecord:
    """Compare a package with its source on ``num_images`` rendered images.

    Args:
        folder: the package, finished or still being made.
        manifest: its manifest, whose digests were compared or have just been made.
        checkpoint: the model it was made from, fp32.
        num_images: images to compare on; at least one of each of the model's sample sizes or, out of core, one for
            each of its vision graphs.

    Returns:
        Every check with what was measured; ``passed`` when all passed that are not advisory.
    """
    out_of_core = manifest.dtype == "bf16" or _bytes_needed(checkpoint) > available_memory()
    subject = Subject.of(folder, manifest, checkpoint, out_of_core=out_of_core)
    family, limits = subject.family, LIMITS[manifest.dtype]
    count = min(num_images, OUT_OF_CORE_IMAGES) if out_of_core else num_images
    least = len(family.vision_modules if out_of_core else family.sample_sizes)
    samples = check_samples(max(count, least), sizes=family.sample_sizes)
    with torch.inference_mode():
        references = [family.reference(sample.image) for sample in samples]
        checks = [*check_structure(subject), *check_vision(subject, references, limits)]
        if manifest.has_language_model:
            checks += check_language(subject, samples, limits)
            if not out_of_core:
                checks += check_answers(subject, samples, references, limits)
    return VerificationRecord(
        passed=all(check.passed or check.advisory for check in checks),
        checks=tuple(checks),
        not_verified=tuple(_not_verified(manifest, len(samples))) if out_of_core else (),
        warnings=tuple(_warnings(manifest, references)),
    )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A package and its source, ready to be run.

    Attributes:
        folder, manifest: the package.
        family: its source: the transformers model in fp32.
        out_of_core: whether both are run a part at a time.
    """

    folder: Path
    manifest: Manifest
    family: Family
    out_of_core: bool

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, checkpoint: Checkpoint, *, out_of_core: bool) -> Subject:
        """Load the source, or prepare it to be loaded a part at a time."""
        # What a bf16 package computes in fp32 is to be what torch computes in fp32, on the same weights.
        rounded_to = torch.bfloat16 if manifest.dtype == "bf16" else torch.float32
        source = checkpoint.out_of_core_model(rounded_to=rounded_to) if out_of_core else checkpoint.model
        return cls(
            folder=folder,
            manifest=manifest,
            family=checkpoint.family(source, checkpoint.processor, grids_of(manifest.image)),
            out_of_core=out_of_core,
        )

    def open(self, graph: str, outputs: Sequence[str] = ()) -> Runnable:
        """Open a graph of the package; ``outputs`` are inner values to return besides its own outputs."""
        path = self.folder / self.manifest.graphs[graph].file
        return PiecewiseSession(path, outputs) if self.out_of_core else _session(path, outputs)


class Runnable(Protocol):
    """What is used of an ``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[Any]:
        """Describe the inputs: ``name``, ``type`` and ``shape``."""

    def get_outputs(self) -> Sequence[Any]:
        """Describe the outputs likewise."""

    def run(self, names: None, feeds: dict[str, Array]) -> Sequence[Any]:
        """Return all outputs, in order."""


def _bytes_needed(checkpoint: Checkpoint) -> int:
    return BYTES_PER_PARAMETER * sum(int(parameter.numel()) for parameter in checkpoint.meta_model.parameters())


def _not_verified(manifest: Manifest, num_images: int) -> Iterator[str]:
    yield f"more than {num_images} images"
    if manifest.has_language_model:
        yield "answers, token for token"
    if manifest.dtype == "bf16":
        yield "rounding to bf16 between operators: ONNX Runtime computed in fp32, on the weights as they are"


def _warnings(manifest: Manifest, references: Sequence[VisionReference]) -> Iterator[str]:
    largest = max(float(reference.features.abs().max()) for reference in references)
    if manifest.dtype == "fp16" and largest > FP16_WARNING * FP16_MAX:
        yield f"image features reach {largest:.0f}; fp16 ends at {FP16_MAX:.0f}, bf16 does not"


def check_structure(subject: Subject) -> Iterator[CheckRecord]:
    """Names, dtypes and shapes of every graph, as ONNX Runtime sees them, against the manifest."""
    different = []
    for name, record in subject.manifest.graphs.items():
        session, path = subject.open(name), subject.folder / record.file
        inputs, outputs = (
            [tensor_record(node, path) for node in nodes] for nodes in (session.get_inputs(), session.get_outputs())
        )
        different += [f"{name}: {difference}" for difference in differences(inputs, outputs, record, exact=True)]
    yield _check("names, dtypes and shapes that differ", len(different), "==", 0, "; ".join(different))


def check_vision(subject: Subject, references: Sequence[VisionReference], limits: Limits) -> Iterator[CheckRecord]:
    """Features against torch, and the selection against the float64 method on the graph's own features."""
    graphs = subject.family.vision_modules
    given = {
        vision.name: [reference for reference in references if reference.graph == vision.name] for vision in graphs
    }
    if unseen := [name for name, some in given.items() if not some]:
        yield _check("vision graphs without an image", len(unseen), "==", 0, ", ".join(unseen))
    runs = [run for vision in graphs for run in _run_vision(subject, vision, given[vision.name])]
    error = max(relative_error(run.all_features, run.features) for run in runs)
    yield _check("image features, relative error", error, "<=", limits.relative_error)
    if pruned := [run for run in runs if run.is_pruned]:
        error = max(relative_error(run.outputs["encoder/saliency"], run.saliency) for run in pruned)
        detail = "" if all(run.is_independent for run in pruned) else "against the exported module, not transformers"
        yield _check("saliency, relative error", error, "<=", limits.relative_error, detail)
        yield from check_selection(subject.manifest, pruned, limits)


@dataclass(frozen=True, kw_only=True)
class VisionRun:
    """What a vision graph returned for some images, and torch.

    Attributes:
        graph: its name.
        outputs: of the graph, by name, ``[B, ...]``; with a selection, also ``encoder/image_features [B, N, D]`` and
            ``encoder/saliency [B, N]``, what was chosen from.
        features: the same from transformers.
        saliency: likewise, or from the exported module where the family's reference has none.
        is_independent: whether it is transformers'.
        token_mask: bool ``[B, N]``, false for padding.
    """

    graph: str
    outputs: dict[str, Array]
    features: Array
    saliency: Array
    is_independent: bool
    token_mask: Array

    @property
    def is_pruned(self) -> bool:
        """Whether the graph chooses tokens, rather than keeping all."""
        return "token_indices" in self.outputs

    @property
    def all_features(self) -> Array:
        """What the graph made of all tokens, ``[B, N, D]``."""
        return self.outputs["encoder/image_features" if self.is_pruned else "image_features"]


def _run_vision(subject: Subject, vision: VisionModule, references: Sequence[VisionReference]) -> Iterator[VisionRun]:
    """Run a vision graph in ONNX Runtime and in torch, on a few images at a time where it takes several."""
    counts = subject.manifest.tokens_of(vision.name)
    session = subject.open(vision.name, CHOSEN_FROM if counts.is_pruned else ())
    if subject.out_of_core and vision.is_batched:
        references = [row for reference in references for row in _rows(reference)]
    size = BATCH_SIZE if vision.is_batched and not subject.out_of_core else 1
    for begin in range(0, len(references), size):
        group = references[begin : begin + size]
        feeds = {name: torch.cat([reference.feeds[name] for reference in group]) for name in group[0].feeds}
        taken = {value.name for value in session.get_inputs()}
        values = _run(session, {name: value.numpy() for name, value in feeds.items() if name in taken})
        features = torch.cat([reference.features for reference in group])
        saliency = [reference.saliency for reference in group if reference.saliency is not None]
        if not saliency:
            saliency = [vision.module(*(feeds[name] for name in vision.inputs))[1]]
        mask = feeds.get("token_mask", torch.ones(features.shape[:2], dtype=torch.bool))
        yield VisionRun(
            graph=vision.name,
            outputs=dict(zip([value.name for value in session.get_outputs()], values, strict=True)),
            features=features.numpy(),
            saliency=torch.cat(saliency).numpy(),
            is_independent=group[0].saliency is not None,
            token_mask=mask.numpy(),
        )


def _rows(reference: VisionReference) -> Iterator[VisionReference]:
    """Yield the rows of a batch, such as the crops of an image, one by one."""
    for row in range(len(reference.features)):
        taken = slice(row, row + 1)
        yield replace(
            reference,
            feeds={name: value[taken] for name, value in reference.feeds.items()},
            features=reference.features[taken],
            saliency=None if reference.saliency is None else reference.saliency[taken],
        )


def check_selection(manifest: Manifest, runs: Sequence[VisionRun], limits: Limits) -> Iterator[CheckRecord]:
    """Is it T distinct tokens, those features, and the choice of the method in exact arithmetic?"""
    config = manifest.selection.config
    rows = [
        SelectedRow.of(run, index, config, manifest.tokens_of(run.graph))
        for run in runs
        for index in range(len(run.features))
    ]
    yield _check("images without T distinct tokens in range", sum(not row.is_valid for row in rows), "==", 0)
    yield _check("kept features changed by", max(row.changed_by for row in rows), "==", 0)
    identical = sum(row.kept == row.wanted for row in rows) / len(rows)
    overlap = sum(len(row.kept & row.wanted) for row in rows) / sum(len(row.wanted) for row in rows)
    detail = f"{len(rows)} images"
    yield _check("kept sets equal to the float64 method's", identical, ">=", limits.identical_sets, detail)
    yield _check("kept tokens in common with it", overlap, ">=", limits.overlap, detail)
    yield _check("saliency count differs from it by", max(row.count_difference for row in rows), "<=", 1)
    entropy_difference = max(row.entropy_difference for row in rows)
    yield _check("spectral entropy differs from it by", entropy_difference, "<=", config.tau / MIN_TAU_SHARE)
    if config.policy == "promprune":
        yield check_budget(manifest.selection, rows)


def check_budget(record: SelectionRecord, rows: Sequence[SelectedRow]) -> CheckRecord:
    """Is the budget split at all, or do mu and tau give all of it to one stage, whatever the image?"""
    ends = {"coverage": 0, "saliency": 0}
    for row in rows:
        ends["coverage"] += row.saliency_count == 0
        ends["saliency"] += row.saliency_count == row.keep_tokens
    stage, most = max(ends.items(), key=lambda item: item[1])
    constants = f"mu = {record.config.mu:g} and tau = {record.config.tau:g} ({record.parameters_from})"
    detail = f"{constants} give all to {stage} in {most} of {len(rows)}"
    check = _check("images with the whole budget in one stage", most / len(rows), "<=", MAX_SATURATED, detail)
    return msgspec.structs.replace(check, advisory=True)


@dataclass(frozen=True, kw_only=True)
class SelectedRow:
    """The selection of one row of a vision graph's batch, against the method in float64.

    Attributes:
        keep_tokens: T, as the manifest says.
        is_valid: T distinct tokens in range.
        changed_by: largest difference between a kept feature and the encoder's own.
        kept, wanted: indices of the kept tokens, and those of the method.
        saliency_count: T_sal, of the graph.
        count_difference, entropy_difference: of the saliency count, and of the spectral entropy.
    """

    keep_tokens: int
    is_valid: bool
    changed_by: float
    kept: frozenset[int]
    wanted: frozenset[int]
    saliency_count: int
    count_difference: int
    entropy_difference: float

    @classmethod
    def of(cls, run: VisionRun, row: int, config: SelectionConfig, counts: TokenCounts) -> SelectedRow:
        """Compare row ``row`` of a run."""
        outputs = {name: value[row] for name, value in run.outputs.items()}
        indices, inner = outputs["token_indices"], outputs["encoder/image_features"]
        mask = torch.as_tensor(run.token_mask[row])
        want = select_tokens(_float64(inner), _float64(outputs["encoder/saliency"]), counts.keep_tokens, config, mask)
        difference = outputs["image_features"].astype(np.float64) - inner[indices.clip(0, len(inner) - 1)]
        count = int(outputs["saliency_count"][0])
        return cls(
            keep_tokens=counts.keep_tokens,
            is_valid=_is_valid(indices, counts),
            changed_by=float(np.abs(difference).max()),
            kept=frozenset(indices.tolist()),
            wanted=frozenset(want.token_indices.tolist()),
            saliency_count=count,
            count_difference=abs(count - want.saliency_count),
            entropy_difference=abs(float(outputs["spectral_entropy"][0]) - want.spectral_entropy),
        )


def check_language(subject: Subject, samples: Sequence[Sample], limits: Limits) -> Iterator[CheckRecord]:
    """Token embeddings, logits after prefill, and logits of decoding with the KV cache; two left-padded rows."""
    family = subject.family
    input_ids, attention_mask = _padded_ids(
        family.processor.tokenizer,
        [sample.question for sample in [*samples, *samples][:2]],
        most=OUT_OF_CORE_TOKENS if subject.out_of_core else None,
    )
    embeds = _run(subject.open(EMBED_TOKENS), {"input_ids": input_ids.numpy()})[0]
    reference = family.embed_tokens(input_ids)
    error = relative_error(embeds, reference.numpy())
    yield _check("token embeddings, relative error", error, "<=", limits.relative_error)

    split = input_ids.shape[1] - (1 if subject.out_of_core else 3)  # the last positions are decoded one by one
    strides = _strides(family, input_ids.shape[1])
    decoder = _Decoder(subject.open(DECODER), subject.manifest.graphs[DECODER], strides)
    hidden = family.language_model(
        inputs_embeds=reference,
        attention_mask=attention_mask,
        position_ids=_position_ids(attention_mask, strides),
        use_cache=False,
    ).last_hidden_state
    logits = family.lm_head(hidden).numpy()
    errors = []
    for begin, end in [(0, split), *((i, i + 1) for i in range(split, input_ids.shape[1]))]:
        got = decoder.step(embeds[:, begin:end], attention_mask[:, :end].numpy())
        errors.append(relative_error(got[:, 0], logits[:, end - 1]))
    yield _check("prefill logits, relative error", errors[0], "<=", limits.relative_error)
    yield _check("decode logits, relative error", max(errors[1:]), "<=", limits.relative_error)


def check_answers(
    subject: Subject, samples: Sequence[Sample], references: Sequence[VisionReference], limits: Limits
) -> Iterator[CheckRecord]:
    """Greedy answers of the runtime, against transformers' ``generate`` on the same kept tokens."""
    equal, refusal = 0, ""
    family = subject.family
    with VisionLanguagePipeline.from_package(subject.folder, provider="cpu") as pipeline:
        for sample, reference in zip(samples, references, strict=True):
            try:
                result = pipeline.generate([sample.image], sample.question, max_new_tokens=MAX_NEW_TOKENS)
            except PrompruneError as error:  # the runtime refuses what the graphs gave
                refusal = f"; {error}"
                continue
            indices = torch.as_tensor(np.array(result.selection[0].token_indices))
            kept = family.kept_features(reference, indices)
            positions = kept_position_ids(family, sample.question, reference, indices)
            equal += torch_answer(family, sample.question, kept, positions) == list(result.token_ids)
    detail = f"{equal} of {len(samples)}{refusal}"
    yield _check("greedy answers equal to torch's", equal / len(samples), ">=", limits.equal_answers, detail)


def torch_answer(family: Family, question: str, kept: Tensor, position_ids: Tensor | None = None) -> list[int]:
    """Answer with transformers, the placeholders filled with ``kept [placeholders, D]``; returns the new token ids."""
    input_ids = prompt_ids(family, question, len(kept))
    embeds = family.embed_tokens(input_ids).clone()
    embeds[input_ids == family.image_token_id] = kept.to(embeds.dtype)
    placed = {} if position_ids is None else {"position_ids": position_ids}
    with _plainly_greedy(family.model, family.processor.tokenizer.pad_token_id or 0):
        generated = family.model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(input_ids), **placed)
    return list(generated[0].tolist())


@contextlib.contextmanager
def _plainly_greedy(model: Any, pad_token_id: int) -> Iterator[None]:
    """Let ``generate`` take the likeliest token each time, as the runtime does when it is asked for nothing else.

    A model's own ``generation_config`` may say otherwise, such as ``repetition_penalty`` 1.05 in Qwen2.5-VL, and fills
    in whatever another one given to ``generate`` leaves open.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=own.eos_token_id, pad_token_id=pad_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def kept_position_ids(
    family: Family, question: str, reference: VisionReference, token_indices: Tensor
) -> Tensor | None:
    """Place a prompt with all its placeholders, and leave out those that were not kept; None if the model counts."""
    input_ids = prompt_ids(family, question, reference.features.shape[1])
    positions = family.position_ids(input_ids, reference)
    if positions is None:
        return None
    stays = input_ids[0] != family.image_token_id
    stays[(~stays).nonzero()[token_indices, 0]] = True
    return positions[..., stays]


def prompt_ids(family: Family, question: str, num_placeholders: int) -> Tensor:
    """Tokenize one question about one image: ``[1, S]``."""
    text = prompt_text(family.processor, family.image_token_id, question)
    text = text.replace(family.image_token, family.image_token * num_placeholders)
    ids: Tensor = family.processor.tokenizer(text, return_tensors="pt").input_ids
    return ids


def relative_error(value: Array, reference: Array) -> float:
    """Largest |difference| over the standard deviation of the reference; infinite if anything is not finite."""
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64)).max()
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / max(float(reference.astype(np.float64).std()), 1e-12))


class _Decoder:
    """The decoder graph with its cache carried from step to step."""

    def __init__(self, session: Runnable, record: GraphRecord, strides: Tensor) -> None:
        self.session = session
        self.strides = strides
        self.past = [value for value in record.inputs if value.name.startswith("past_key_values.")]
        self.cache: dict[str, Array] = {}

    def step(self, inputs_embeds: Array, attention_mask: Array) -> Array:
        if not self.cache:
            for value in self.past:
                shape = (len(inputs_embeds), int(value.shape[1]), 0, int(value.shape[3]))
                self.cache[value.name] = np.zeros(shape, dtype=value.dtype)
        position_ids = _position_ids(torch.as_tensor(attention_mask), self.strides).numpy()
        position_ids = position_ids[..., -inputs_embeds.shape[1] :]
        feeds = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, *present = _run(self.session, {**feeds, **self.cache})
        self.cache = {value.name: array for value, array in zip(self.past, present, strict=True)}
        return logits


def _padded_ids(tokenizer: Any, questions: Sequence[str], *, most: int | None) -> tuple[Tensor, Tensor]:
    """Tokenize two texts of different lengths, of at most ``most`` tokens, padded on the left."""
    first, second = (tokenizer(text).input_ids for text in (questions[0], questions[1] + " " + questions[0]))
    if most is not None:
        first, second = first[: most * 2 // 3], second[:most]
    length = max(len(first), len(second))
    pad = tokenizer.pad_token_id or 0
    rows = [[pad] * (length - len(ids)) + ids for ids in (first, second)]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in (first, second)]
    return torch.tensor(rows), torch.tensor(mask)


def _strides(family: Family, length: int) -> Tensor:
    """How far apart neighbours are placed on each of the axes of ``position_ids``: int64, of their shape.

    On every axis otherwise, or two of them could be exchanged unnoticed; and as far as the context has room for, since
    the frequencies of the last ones are low.
    """
    axes = math.prod(family.position_axes)
    widest = max(axes, family.text_config.max_position_embeddings // length)
    return torch.from_numpy(np.geomspace(1, widest, axes).round().astype(np.int64)).view(family.position_axes)


def _position_ids(attention_mask: Tensor, strides: Tensor) -> Tensor:
    """Positions of a text with padding on the left: ``[*axes, B, S]``."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions * strides[..., None, None]


def _float64(array: Array) -> Tensor:
    return torch.as_tensor(array.astype(np.float64))


def _is_valid(indices: Array, counts: TokenCounts) -> bool:
    distinct = len(set(indices.tolist())) == counts.keep_tokens == len(indices)
    return distinct and bool((indices >= 0).all() and (indices < counts.num_tokens).all())


def _session(path: Path, outputs: Sequence[str] = ()) -> Runnable:
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    config = RuntimeConfig(provider="cpu")
    session: Runnable = inference_session(
        model.SerializeToString(), config, name=str(path), weights=path.parent
    ).session
    return session


def _run(session: Runnable, feeds: dict[str, Array]) -> list[Array]:
    return [np.asarray(value) for value in session.run(None, feeds)]


def _check(
    name: str, measured: float, comparison: Literal["<=", ">=", "=="], limit: float, detail: str = ""
) -> CheckRecord:
    passed = {"<=": measured <= limit, ">=": measured >= limit, "==": measured == limit}[comparison]
    finite = float(measured) if np.isfinite(measured) else 1e308  # JSON has no infinity
    return CheckRecord(
        name=name, measured=finite, comparison=comparison, limit=limit, passed=bool(passed), detail=detail
    )
