"""Pixels to first token in PyTorch, at the shapes of LLaVA-1.5-7B and LLaVA-NeXT-7B with random weights.

All tokens; ours at ratio 0.12; the authors' method in eager PyTorch at 0.12; and, as the plain alternative to pruning,
one smaller image that has about as many tokens as ours keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from promprune import SelectionConfig, prune_tokens, select_tokens
from promprune.export.baselines.authors_method import authors_select
from promprune.export.config import ExportConfig
from promprune.export.families.towers.table import vision_encoder
from scripts.gpu.measure import Run, count_flops, graphed, timing
from scripts.gpu.models import llava_config, patch_features, random_model
from scripts.gpu.record import Record
from scripts.gpu.sizes import CROPS, Sizes

RATIO = 0.12
ALL, OURS, AUTHORS, SMALLER = "all tokens", "ours", "authors", "smaller image"


def run(sizes: Sizes, record: Record, *, family: str) -> None:
    """Record rows of ``check``, then of ``first token`` and its parts, by contender and mode."""
    model = FirstToken(sizes, CROPS[family])
    record.fact("ratio", RATIO)
    record.fact("visual_tokens", {name: model.visual_tokens(name) for name in (ALL, OURS, AUTHORS, SMALLER)})
    _check(record, model)
    calls: dict[str, Run] = {ALL: model.all_tokens, OURS: model.ours, AUTHORS: model.authors, SMALLER: model.smaller}
    for name, call in calls.items():
        labels = {"contender": name, "prompt_tokens": sizes.text_tokens + model.visual_tokens(name)}
        _time_first_token(record, sizes, call, mode="eager", **labels)
        if name != AUTHORS:  # which waits for the device, so that no graph can hold it
            record.attempt(lambda call=call: _graph_timing(call, sizes), time="first token", mode="graph", **labels)
    for part, call in model.parts().items():
        record.attempt(lambda call=call: timing(call, sizes), time=part, mode="eager", contender=OURS)


class FirstToken:
    """A LLaVA taken apart, and one picture of ``crops`` crops on the device."""

    def __init__(self, sizes: Sizes, crops: int) -> None:
        config = llava_config(sizes)
        self.model = random_model(LlavaForConditionalGeneration, config, sizes)
        self.encoder = vision_encoder(self.model)
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        self.num_tokens, self.crops = (side // patch) ** 2, crops
        self.keep_tokens = ExportConfig(ratio=RATIO).token_counts(self.num_tokens).keep_tokens
        self.small_grid = min(round(math.sqrt(crops * self.keep_tokens)), side // patch)
        small = {**config.vision_config.to_dict(), "image_size": patch * self.small_grid}
        self.small_tower = random_model(CLIPVisionModel, type(config.vision_config)(**small), sizes)
        self.pixels, self.small_pixels = (
            torch.randn(count, 3, size, size, device=sizes.device, dtype=self.model.dtype)
            for count, size in ((crops, side), (1, patch * self.small_grid))
        )
        self.text = torch.randint(4, 256, (1, sizes.text_tokens), device=sizes.device)

    def visual_tokens(self, contender: str) -> int:
        """Return how many visual tokens enter the prompt."""
        if contender == SMALLER:
            return self.small_grid**2
        return self.crops * (self.num_tokens if contender == ALL else self.keep_tokens)

    def all_tokens(self) -> Tensor:
        """Answer with one token, ``[1, 1]``, from all visual tokens."""
        return self.answer(patch_features(self.encoder, self.pixels))

    def ours(self) -> Tensor:
        """Answer from the tokens that ``prune_tokens`` keeps of each crop."""
        return self.answer(prune_tokens(*self.encoder(self.pixels), self.keep_tokens).features)

    def authors(self) -> Tensor:
        """Answer from the tokens that the authors' method keeps, with the eager attention that it needs."""
        return self.answer(authors_select(*self._eager_features(), self.keep_tokens).features)

    def smaller(self) -> Tensor:
        """Answer from all tokens of one smaller image, by a tower of that size."""
        hidden = self.small_tower(self.small_pixels, output_hidden_states=True).hidden_states[-2]
        return self.answer(self.model.model.multi_modal_projector(hidden[:, 1:]))

    def answer(self, image_features: Tensor) -> Tensor:
        """Put features ``[crops, T, D]`` before the text, and return the most likely next token, ``[1, 1]``."""
        text = self.model.model.language_model.embed_tokens(self.text)
        embeds = torch.cat([image_features.flatten(0, 1)[None], text], dim=1)
        hidden = self.model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden[:, -1]).argmax(dim=-1, keepdim=True)

    def parts(self) -> dict[str, Run]:
        """Return the parts of ``ours``, each with the inputs that it has there."""
        with torch.inference_mode():
            features, saliency = self.encoder(self.pixels)
            kept = prune_tokens(features, saliency, self.keep_tokens).features
        return {
            "vision": lambda: self.encoder(self.pixels),
            "selection": lambda: prune_tokens(features, saliency, self.keep_tokens),
            "prefill": lambda: self.answer(kept),
        }

    def _eager_features(self) -> tuple[Tensor, Tensor]:
        """Return features and saliency as the authors' code gets them: every layer returns its attention weights."""
        tower = self.model.model.vision_tower
        tower.set_attn_implementation("eager")
        try:
            outputs = tower(self.pixels, output_hidden_states=True, output_attentions=True)
        finally:
            tower.set_attn_implementation("sdpa")
        features = self.model.model.multi_modal_projector(outputs.hidden_states[-2][:, 1:])
        return features, outputs.attentions[-2][:, :, 0, 1:].float().mean(dim=1)


@torch.inference_mode()
def _check(record: Record, model: FirstToken) -> None:
    """Compare kept sets with float64, our features with transformers', and the token of all tokens kept with all."""
    features, saliency = model.encoder(model.pixels)
    found = prune_tokens(features, saliency, model.keep_tokens)
    wanted = [
        select_tokens(x, a, model.keep_tokens)
        for x, a in zip(features.double().cpu(), saliency.double().cpu(), strict=True)
    ]
    kept = zip(found.token_indices.tolist(), wanted, strict=True)
    record.row(
        check="kept sets",
        images=len(wanted),
        identical_sets=sum(set(row) == set(want.token_indices.tolist()) for row, want in kept),
        identical_saliency_counts=sum(
            count == want.saliency_count for count, want in zip(found.saliency_count.tolist(), wanted, strict=True)
        ),
    )
    theirs, their_saliency = model._eager_features()
    record.row(check="features", relative_error=_relative(features, theirs))
    record.row(check="saliency", relative_error=_relative(saliency, their_saliency))
    everything = prune_tokens(features, saliency, model.num_tokens, config=SelectionConfig(order="spatial"))
    same = model.answer(everything.features).equal(model.all_tokens())
    record.row(check="first token at ratio 1.0 equal to all tokens", equal=same)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _time_first_token(record: Record, sizes: Sizes, call: Run, **labels: Any) -> None:
    """Time until the token is on the host, and count the FLOPs."""

    def measure() -> dict[str, Any]:
        flops = count_flops(call)
        return {**timing(lambda: call().item(), sizes), "flops": flops, "unit": "bf16"}

    record.attempt(measure, time="first token", **labels)


def _graph_timing(call: Run, sizes: Sizes) -> dict[str, Any]:
    """Time the replay of a CUDA graph of the whole call, and say whether it gives the same token."""
    with torch.inference_mode():
        wanted = call().item()
    replay = graphed(call)
    measured = timing(lambda: replay().item(), sizes)
    return {**measured, "same_token": replay().item() == wanted}
