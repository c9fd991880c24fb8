"""What the selection stands between: a ViT-L/14-336 forward, and the prefill of a 7B language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionModel, LlamaModel

from scripts.gpu.measure import Run, count_flops, free_memory, graphed, timing
from scripts.gpu.models import decoder_layers, llava_config, random_model
from scripts.gpu.record import Record
from scripts.gpu.sizes import Sizes, prompt_lengths


def run(sizes: Sizes, record: Record) -> None:
    """Record rows of ``time``: ``vision``, by batch, and ``prefill``, by prompt length in tokens."""
    config = llava_config(sizes)
    _time_model(record, sizes, "vision", CLIPVisionModel, config.vision_config)
    free_memory(sizes.device)
    _time_model(record, sizes, "prefill", LlamaModel, config.text_config)


def _time_model(record: Record, sizes: Sizes, name: str, model_class: Any, config: Any) -> None:
    model = random_model(model_class, config, sizes)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    calls = _vision_calls(model, sizes) if name == "vision" else _prefill_calls(model, sizes)
    for labels, call in calls:
        work = {"flops": count_flops(call), "traffic_bytes": weights, "unit": "bf16"}
        record.attempt(lambda call=call: timing(call, sizes), time=name, mode="eager", **labels, **work)
        record.attempt(lambda call=call: timing(graphed(call), sizes), time=name, mode="graph", **labels, **work)
    for layer in decoder_layers(model):
        layer.compile(backend=sizes.compile_backend)
    for labels, call in calls:
        record.attempt(lambda call=call: timing(call, sizes), time=name, mode="compiled", **labels)
        record.attempt(lambda call=call: timing(graphed(call), sizes), time=name, mode="compiled, graph", **labels)


def _vision_calls(model: Any, sizes: Sizes) -> list[tuple[dict[str, int], Run]]:
    side = model.config.image_size
    calls = []
    for batch in sizes.batches:
        pixels = torch.randn(batch, 3, side, side, device=sizes.device, dtype=model.dtype)
        calls.append(({"batch": batch}, lambda pixels=pixels: model(pixels)))
    return calls


def _prefill_calls(model: Any, sizes: Sizes) -> list[tuple[dict[str, int], Run]]:
    calls = []
    for tokens in prompt_lengths(sizes):
        embeds = torch.randn(1, tokens, model.config.hidden_size, device=sizes.device, dtype=model.dtype)
        calls.append(({"prompt_tokens": tokens}, lambda embeds=embeds: model(inputs_embeds=embeds, use_cache=False)))
    return calls
