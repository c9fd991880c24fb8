"""Checks of the language model: embeddings, logits and answers against transformers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from promprune.errors import PrompruneError
from promprune.export.checkpoint.prompts import prompt_text
from promprune.export.families import Family, VisionReference
from promprune.export.verify.checks import Limits, check
from promprune.export.verify.samples import Sample
from promprune.export.verify.subject import Array, Runnable, Subject, run_graph
from promprune.export.verify.tensors import relative_error
from promprune.package.manifest import DECODER, EMBED_TOKENS, CheckRecord, GraphRecord
from promprune.runtime import Result, VisionLanguagePipeline

__all__ = [
    "check_answers",
    "check_language",
    "filled_prompt",
    "kept_position_ids",
    "log_probabilities",
    "package_answers",
    "torch_answer",
]

MAX_NEW_TOKENS: Final = 16
OUT_OF_CORE_TOKENS: Final = 24  # length of a text if the verification is out of core
PAST: Final = "past_key_values"
PRESENT: Final = "present"


def check_language(subject: Subject, samples: Sequence[Sample], limits: Limits) -> Iterator[CheckRecord]:
    """Compare token embeddings, and logits of prefill and of decode steps, on two batch rows padded on the left."""
    family = subject.family
    input_ids, attention_mask = _padded_ids(
        family.processor.tokenizer,
        [sample.question for sample in [*samples, *samples][:2]],
        most=OUT_OF_CORE_TOKENS if subject.out_of_core else None,
    )
    embeds = run_graph(subject.open(EMBED_TOKENS), {"input_ids": input_ids.numpy()})["inputs_embeds"]
    reference = family.embed_tokens(input_ids)
    error = relative_error(embeds, reference.numpy())
    yield check("token embeddings, relative error", error, "<=", limits.relative_error)

    split = input_ids.shape[1] - (1 if subject.out_of_core else 3)  # the last positions are decoded one by one
    strides = _strides(family, input_ids.shape[1])
    decoder = _Decoder(subject.open(DECODER), subject.package.manifest.graphs[DECODER], strides)
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
    yield check("prefill logits, relative error", errors[0], "<=", limits.relative_error)
    yield check("decode logits, relative error", max(errors[1:]), "<=", limits.relative_error)


def package_answers(subject: Subject, samples: Sequence[Sample]) -> list[Result | PrompruneError]:
    """Answer with the runtime; an error if it refuses what the graphs gave."""
    answers: list[Result | PrompruneError] = []
    with VisionLanguagePipeline.from_package(subject.package.folder, provider="cpu", accuracy_level=0) as pipeline:
        for sample in samples:
            try:
                answers.append(pipeline.generate([sample.image], sample.question, max_new_tokens=MAX_NEW_TOKENS))
            except PrompruneError as error:
                answers.append(error)
    return answers


def check_answers(
    subject: Subject,
    samples: Sequence[Sample],
    references: Sequence[VisionReference],
    answers: Sequence[Result | PrompruneError],
    limits: Limits,
) -> Iterator[CheckRecord]:
    """Compare the runtime's greedy answers with those of transformers' ``generate`` on the same kept tokens."""
    same, ties, refusal = 0, 0, ""
    family = subject.family
    for sample, reference, answer in zip(samples, references, answers, strict=True):
        if isinstance(answer, PrompruneError):
            refusal = f"; {answer}"
            continue
        indices = torch.as_tensor(np.array(answer.selection[0].token_indices))
        kept = family.kept_features(reference, indices)
        positions = kept_position_ids(family, sample.question, reference, indices)
        wanted, got = torch_answer(family, sample.question, kept, positions), list(answer.token_ids)
        same += wanted == got
        if wanted != got:
            likely = log_probabilities(family, filled_prompt(family, sample.question, kept), positions, wanted)
            ties += _part_at_a_tie(likely, wanted, got, limits.relative_error)
    detail = f"{same} of {len(samples)}" + (f", and {ties} up to a tie within the limit of the logits" if ties else "")
    equal = (same + ties) / len(samples)
    yield check("greedy answers equal to torch's", equal, ">=", limits.equal_answers, detail + refusal)


def _part_at_a_tie(likely: Tensor, wanted: Sequence[int], got: Sequence[int], relative_error: float) -> bool:
    """Whether answers first differ in two tokens whose logits, off by ``relative_error``, may change places.

    Args:
        likely: the model's log-probabilities of each token of ``wanted``, ``[tokens, vocabulary]``.
        wanted, got: the token ids of both answers.
        relative_error: largest allowed error of a logit, divided by the logits' standard deviation.
    """
    parting = next((index for index, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None)
    if parting is None:
        return False
    row = likely[parting]
    return bool(row[wanted[parting]] - row[got[parting]] <= 2 * relative_error * row.std())


def torch_answer(family: Family, question: str, kept: Tensor, position_ids: Tensor | None = None) -> list[int]:
    """Return the token ids of transformers' greedy answer, with ``kept [placeholders, D]`` for the placeholders."""
    embeds = filled_prompt(family, question, kept)
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    placed = {} if position_ids is None else {"position_ids": position_ids}
    with _plainly_greedy(family.model, family.processor.tokenizer.pad_token_id or 0):
        generated = family.model.generate(inputs_embeds=embeds, attention_mask=mask, **placed)
    return list(generated[0].tolist())


def filled_prompt(family: Family, question: str, kept: Tensor) -> Tensor:
    """Embed one question about one image, with ``kept [placeholders, D]`` for the placeholders: ``[1, S, D]``."""
    input_ids = prompt_ids(family, question, len(kept))
    embeds: Tensor = family.embed_tokens(input_ids).clone()
    embeds[input_ids == family.image_token_id] = kept.to(embeds.dtype)
    return embeds


def log_probabilities(family: Family, prompt: Tensor, positions: Tensor | None, answer: list[int]) -> Tensor:
    """Return the model's log-probabilities of each token of an answer, given a prompt ``[1, S, D]``."""
    before = torch.tensor([answer[:-1]], dtype=torch.int64)
    embeds = torch.cat([prompt, family.embed_tokens(before).to(prompt.dtype)], dim=1)
    placed = {}
    if positions is not None:
        following = positions.max() + 1 + torch.arange(before.shape[1])
        placed["position_ids"] = torch.cat([positions, following.expand(*positions.shape[:-1], -1)], dim=-1)
    hidden = family.language_model(inputs_embeds=embeds, use_cache=False, **placed).last_hidden_state
    logits = family.lm_head(hidden[0, prompt.shape[1] - 1 :])
    return functional.log_softmax(logits.float(), dim=-1)


@contextlib.contextmanager
def _plainly_greedy(model: Any, pad_token_id: int) -> Iterator[None]:
    """Make ``generate`` always choose the most likely token, as the runtime does by default.

    A model's own ``generation_config`` may differ, such as ``repetition_penalty`` 1.05 in Qwen2.5-VL, and its values
    are used for everything that a config passed to ``generate`` does not set.
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
    """Return the positions of a prompt with all placeholders, without those not kept; None if the model counts."""
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


class _Decoder:
    """The decoder graph and its KV cache, which is passed from step to step."""

    def __init__(self, session: Runnable, record: GraphRecord, strides: Tensor) -> None:
        self.session = session
        self.strides = strides
        self.past = [value for value in record.inputs if value.name.startswith(PAST)]
        self.cache: dict[str, Array] = {}

    def step(self, inputs_embeds: Array, attention_mask: Array) -> Array:
        if not self.cache:
            for value in self.past:
                shape = (len(inputs_embeds), int(value.shape[1]), 0, int(value.shape[3]))
                self.cache[value.name] = np.zeros(shape, dtype=value.dtype)
        position_ids = _position_ids(torch.as_tensor(attention_mask), self.strides).numpy()
        position_ids = position_ids[..., -inputs_embeds.shape[1] :]
        feeds = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = run_graph(self.session, {**feeds, **self.cache})
        self.cache = {value.name: outputs[value.name.replace(PAST, PRESENT)] for value in self.past}
        return outputs["logits"]


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
    """Return the distance between neighbouring tokens on each axis of ``position_ids``: int64 ``[*axes]``.

    The axes differ, so that swapping two of them is detected; the distances are as large as the context allows,
    because the rotary frequencies of the last axes are low.
    """
    axes = math.prod(family.position_axes)
    widest = max(axes, family.text_config.max_position_embeddings // length)
    return torch.from_numpy(np.geomspace(1, widest, axes).round().astype(np.int64)).view(family.position_axes)


def _position_ids(attention_mask: Tensor, strides: Tensor) -> Tensor:
    """Return the positions of texts with padding on the left: ``[*axes, B, S]``."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions * strides[..., None, None]
