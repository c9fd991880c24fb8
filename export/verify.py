"""Verification: is the package the model it was made from?

Checked in this order, as far as each can be: names, dtypes and shapes; values against torch; the selection against
the method in float64; answers, token for token. Every comparison of values is relative to the spread of the
reference, because the features of a real tower have a standard deviation of several units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from promprune import scenes
from promprune.config import DEFAULT_CHECK_IMAGES, SelectionConfig
from promprune.errors import PrompruneError
from promprune.export.checkpoint import Checkpoint
from promprune.export.families import AdaptedModel
from promprune.package import (
    DECODER,
    EMBED_TOKENS,
    VISION_ENCODER,
    CheckRecord,
    GraphRecord,
    Manifest,
    VerificationRecord,
    read_manifest,
)
from promprune.runtime import VisionLanguagePipeline
from promprune.selection import select_tokens

__all__ = ["LIMITS", "Limits", "Sample", "check_samples", "verify_package"]

Array = NDArray[Any]
MAX_NEW_TOKENS: Final = 16
BATCH_SIZE: Final = 8


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
# wired wrongly, by 1e-2 and more. fp16: rounding of 2**-11 a layer.
LIMITS: Final = {
    "fp32": Limits(relative_error=3e-4, identical_sets=0.75, overlap=0.98, equal_answers=0.98),
    "fp16": Limits(relative_error=5e-2, identical_sets=0.75, overlap=0.98, equal_answers=0.75),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with one question."""

    image: Image.Image
    question: str


def check_samples(count: int, *, image_size: int) -> list[Sample]:
    """Render the images that a package is verified on: scenes of shapes and digits, never trained on."""
    rendered = [scenes.render_scene(scenes.TEST_SEEDS[index], image_size=image_size) for index in range(count)]
    return [
        Sample(image=scene.image, question=scenes.questions(scene, per_type=1, seed=index)[index % 2].text)
        for index, scene in enumerate(rendered)
    ]


def verify_package(
    folder: Path, checkpoint: Checkpoint, *, num_images: int = DEFAULT_CHECK_IMAGES
) -> VerificationRecord:
    """Compare a package with its source on ``num_images`` rendered images.

    Args:
        folder: the package, finished or still being made.
        checkpoint: the model it was made from, fp32.
        num_images: images to compare on; at least 1.

    Returns:
        Every check with what was measured; ``passed`` when all passed.
    """
    manifest = read_manifest(folder, check_weights=True)
    limits = LIMITS[manifest.dtype]
    model = checkpoint.family.adapt(checkpoint.model)
    samples = check_samples(num_images, image_size=manifest.image.height)
    with torch.inference_mode():
        pixel_values = pixel_values_of(checkpoint, samples)
        features = in_batches(partial(checkpoint.family.reference_features, checkpoint.model), pixel_values)
        saliency = in_batches(lambda batch: model.vision(batch)[1], pixel_values)
        checks = [
            *check_structure(folder, manifest),
            *check_vision(folder, manifest, pixel_values.numpy(), features.numpy(), saliency.numpy(), limits),
        ]
        if manifest.has_language_model:
            checks += check_language(folder, manifest, checkpoint, model, samples, limits)
            checks += check_answers(folder, checkpoint, model, samples, features, limits)
    return VerificationRecord(passed=all(check.passed for check in checks), checks=tuple(checks))


def check_structure(folder: Path, manifest: Manifest) -> Iterator[CheckRecord]:
    """Names, dtypes and shapes of every graph, as ONNX Runtime sees them, against the manifest."""
    different = []
    for name, record in manifest.graphs.items():
        session = _session(folder / record.file)
        different += [f"{name}: {difference}" for difference in _differences(record, session)]
    yield _check("names, dtypes and shapes that differ", len(different), "==", 0, "; ".join(different))


def check_vision(
    folder: Path, manifest: Manifest, pixel_values: Array, features: Array, saliency: Array, limits: Limits
) -> Iterator[CheckRecord]:
    """Features against torch, and the selection against the float64 method on the graph's own features."""
    path = folder / manifest.graphs[VISION_ENCODER].file
    if manifest.selection.keep_tokens == manifest.selection.num_tokens:
        outputs = _run_in_batches(_session(path), pixel_values)
        error = relative_error(outputs["image_features"], features)
        yield _check("image features, relative error", error, "<=", limits.relative_error)
        return
    with _probe(path) as probe:
        outputs = _run_in_batches(_session(probe), pixel_values)
    inner, scores = outputs["encoder/image_features"], outputs["encoder/saliency"]
    yield _check("image features, relative error", relative_error(inner, features), "<=", limits.relative_error)
    yield _check("saliency, relative error", relative_error(scores, saliency), "<=", limits.relative_error)
    yield from check_selection(manifest, outputs, limits)


def check_selection(manifest: Manifest, outputs: dict[str, Array], limits: Limits) -> Iterator[CheckRecord]:
    """Is it T distinct tokens, those features, and the choice of the method in exact arithmetic?"""
    record = manifest.selection
    indices, inner = outputs["token_indices"], outputs["encoder/image_features"]
    valid = [_is_valid(row, record.keep_tokens, record.num_tokens) for row in indices]
    yield _check("images without T distinct tokens in range", valid.count(False), "==", 0)
    gathered = np.take_along_axis(inner, indices[:, :, None], axis=1)
    changed = float(np.abs(outputs["image_features"].astype(np.float64) - gathered).max())
    yield _check("kept features changed by", changed, "==", 0)
    config = SelectionConfig(
        mu=record.mu,
        tau=record.tau,
        saliency_ratio_min=record.saliency_ratio_min,
        saliency_ratio_max=record.saliency_ratio_max,
        order=record.order,
        policy=record.policy,
    )
    exact = [
        select_tokens(_float64(row), _float64(scores), record.keep_tokens, config)
        for row, scores in zip(inner, outputs["encoder/saliency"], strict=True)
    ]
    kept = [(set(row.tolist()), set(want.token_indices.tolist())) for row, want in zip(indices, exact, strict=True)]
    identical = sum(ours == want for ours, want in kept) / len(kept)
    overlap = sum(len(ours & want) for ours, want in kept) / (len(kept) * record.keep_tokens)
    counts = outputs["saliency_count"][:, 0] - [want.saliency_count for want in exact]
    entropies = outputs["spectral_entropy"][:, 0] - [want.spectral_entropy for want in exact]
    detail = f"{len(kept)} images"
    yield _check("kept sets equal to the float64 method's", identical, ">=", limits.identical_sets, detail)
    yield _check("kept tokens in common with it", overlap, ">=", limits.overlap, detail)
    yield _check("saliency count differs from it by", int(np.abs(counts).max()), "<=", 1)
    yield _check("spectral entropy differs from it by", float(np.abs(entropies).max()), "<=", 1e-4)


def check_language(
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    model: AdaptedModel,
    samples: Sequence[Sample],
    limits: Limits,
) -> Iterator[CheckRecord]:
    """Token embeddings, logits after prefill, and logits of decoding with the KV cache; two left-padded rows."""
    input_ids, attention_mask = _padded_ids(checkpoint, [sample.question for sample in [*samples, *samples][:2]])
    embed = _session(folder / manifest.graphs[EMBED_TOKENS].file)
    embeds = _run(embed, {"input_ids": input_ids.numpy()})[0]
    reference = model.embed_tokens(input_ids)
    error = relative_error(embeds, reference.numpy())
    yield _check("token embeddings, relative error", error, "<=", limits.relative_error)

    split = input_ids.shape[1] - 3  # the last three positions are decoded one by one
    decoder = _Decoder(_session(folder / manifest.graphs[DECODER].file), manifest.graphs[DECODER])
    hidden = model.language_model(
        inputs_embeds=reference,
        attention_mask=attention_mask,
        position_ids=_position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden).numpy()
    errors = []
    for begin, end in [(0, split), *((i, i + 1) for i in range(split, input_ids.shape[1]))]:
        got = decoder.step(embeds[:, begin:end], attention_mask[:, :end].numpy())
        errors.append(relative_error(got[:, 0], logits[:, end - 1]))
    yield _check("prefill logits, relative error", errors[0], "<=", limits.relative_error)
    yield _check("decode logits, relative error", max(errors[1:]), "<=", limits.relative_error)


def check_answers(
    folder: Path,
    checkpoint: Checkpoint,
    model: AdaptedModel,
    samples: Sequence[Sample],
    features: Tensor,
    limits: Limits,
) -> Iterator[CheckRecord]:
    """Greedy answers of the runtime, against transformers' ``generate`` on the same kept tokens."""
    equal, refusal = 0, ""
    with VisionLanguagePipeline.from_package(folder, provider="cpu") as pipeline:
        for sample, row in zip(samples, features, strict=True):
            try:
                result = pipeline.generate([sample.image], sample.question, max_new_tokens=MAX_NEW_TOKENS)
            except PrompruneError as error:  # the runtime refuses what the graphs gave
                refusal = f"; {error}"
                continue
            kept = row[torch.as_tensor(np.array(result.selection[0].token_indices))]
            equal += torch_answer(checkpoint, model, sample.question, kept) == list(result.token_ids)
    detail = f"{equal} of {len(samples)}{refusal}"
    yield _check("greedy answers equal to torch's", equal / len(samples), ">=", limits.equal_answers, detail)


def torch_answer(checkpoint: Checkpoint, model: AdaptedModel, question: str, kept: Tensor) -> list[int]:
    """Answer with transformers, the image's placeholders filled with ``kept [T, D]``; returns the new token ids."""
    tokenizer = checkpoint.processor.tokenizer
    text = prompt_text(checkpoint, model, question)
    token = tokenizer.convert_ids_to_tokens(model.image_token_id)
    input_ids = tokenizer(text.replace(token, token * len(kept)), return_tensors="pt").input_ids
    embeds = model.embed_tokens(input_ids).clone()
    embeds[input_ids == model.image_token_id] = kept.to(embeds.dtype)
    generated = checkpoint.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return list(generated[0].tolist())


def prompt_text(checkpoint: Checkpoint, model: AdaptedModel, question: str) -> str:
    """Render one question about one image; a model without a chat template gets the prompt of LLaVA-1.5."""
    processor = checkpoint.processor
    if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
        return f"USER: {processor.tokenizer.convert_ids_to_tokens(model.image_token_id)}\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def pixel_values_of(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Tensor:
    """Preprocess with the Hugging Face image processor; ``[B, 3, H, W]`` fp32."""
    images = [sample.image for sample in samples]
    values = checkpoint.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(values, dtype=torch.float32)


def relative_error(value: Array, reference: Array) -> float:
    """Largest |difference| over the standard deviation of the reference; infinite if anything is not finite."""
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64)).max()
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / max(float(reference.astype(np.float64).std()), 1e-12))


class _Decoder:
    """The decoder graph with its cache carried from step to step."""

    def __init__(self, session: ort.InferenceSession, record: GraphRecord) -> None:
        self.session = session
        self.past = [value for value in record.inputs if value.name.startswith("past_key_values.")]
        self.cache: dict[str, Array] = {}

    def step(self, inputs_embeds: Array, attention_mask: Array) -> Array:
        if not self.cache:
            for value in self.past:
                shape = (len(inputs_embeds), int(value.shape[1]), 0, int(value.shape[3]))
                self.cache[value.name] = np.zeros(shape, dtype=value.dtype)
        position_ids = _position_ids(torch.as_tensor(attention_mask))[:, -inputs_embeds.shape[1] :].numpy()
        feeds = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, *present = _run(self.session, {**feeds, **self.cache})
        self.cache = {value.name: array for value, array in zip(self.past, present, strict=True)}
        return logits


def _padded_ids(checkpoint: Checkpoint, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    tokenizer = checkpoint.processor.tokenizer
    first, second = (tokenizer(text).input_ids for text in (questions[0], questions[1] + " " + questions[0]))
    length = max(len(first), len(second))
    pad = tokenizer.pad_token_id or 0
    rows = [[pad] * (length - len(ids)) + ids for ids in (first, second)]
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in (first, second)]
    return torch.tensor(rows), torch.tensor(mask)


def _position_ids(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _float64(array: Array) -> Tensor:
    return torch.as_tensor(array.astype(np.float64))


def _is_valid(indices: Array, keep_tokens: int, num_tokens: int) -> bool:
    distinct = len(set(indices.tolist())) == keep_tokens == len(indices)
    return distinct and bool((indices >= 0).all() and (indices < num_tokens).all())


def in_batches(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Apply a function to a few rows at a time, so that many images need no more memory than a few."""
    return torch.cat([function(batch) for batch in values.split(BATCH_SIZE)])


def _run_in_batches(session: ort.InferenceSession, pixel_values: Array) -> dict[str, Array]:
    """Run a vision graph on a few images at a time; returns every output by name."""
    names = [output.name for output in session.get_outputs()]
    batches = [
        _run(session, {"pixel_values": pixel_values[begin : begin + BATCH_SIZE]})
        for begin in range(0, len(pixel_values), BATCH_SIZE)
    ]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*batches, strict=True), strict=True)}


@contextlib.contextmanager
def _probe(path: Path) -> Iterator[Path]:
    """Yield a copy of a graph, sharing its weights file, with the values named ``encoder/*`` as outputs."""
    model = onnx.load(path, load_external_data=False)
    for name in ("encoder/image_features", "encoder/saliency"):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    probe = path.with_name(f".probe-{path.name}")
    probe.write_bytes(model.SerializeToString())
    try:
        yield probe
    finally:
        probe.unlink()


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, feeds: dict[str, Array]) -> list[Array]:
    return [np.asarray(value) for value in session.run(None, feeds)]


def _differences(record: GraphRecord, session: ort.InferenceSession) -> Iterator[str]:
    for kind, wanted, found in (
        ("input", record.inputs, session.get_inputs()),
        ("output", record.outputs, session.get_outputs()),
    ):
        expected = [(value.name, value.dtype, list(value.shape)) for value in wanted]
        actual = [(value.name, _numpy_dtype(value.type), list(value.shape)) for value in found]
        yield from (
            f"{kind} {have} is not {want}" for want, have in zip(expected, actual, strict=False) if want != have
        )
        if len(expected) != len(actual):
            yield f"{len(actual)} {kind}s, not {len(expected)}"


def _numpy_dtype(onnx_type: str) -> str:
    names = {"float": "float32", "double": "float64", "float16": "float16"}
    inner = onnx_type.removeprefix("tensor(").removesuffix(")")
    return names.get(inner, inner)


def _check(
    name: str, measured: float, comparison: Literal["<=", ">=", "=="], limit: float, detail: str = ""
) -> CheckRecord:
    passed = {"<=": measured <= limit, ">=": measured >= limit, "==": measured == limit}[comparison]
    finite = float(measured) if np.isfinite(measured) else 1e308  # JSON has no infinity
    return CheckRecord(
        name=name, measured=finite, comparison=comparison, limit=limit, passed=bool(passed), detail=detail
    )
