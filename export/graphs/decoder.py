"""The language model as two graphs: the token embedding, and one decoder for prefill and decode steps."""

from __future__ import annotations

from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import Family
from promprune.export.graphs.passes.layers import Repetition, alike, with_layers
from promprune.export.graphs.trace import graph_from_module

__all__ = ["DecoderWithCache", "check_rotary_frequencies", "decoder_graph", "embed_tokens_graph"]

PAST: Final = "past_key_values"
PRESENT: Final = "present"

KeyValues = list[tuple[Tensor, Tensor]]


class DecoderWithCache(nn.Module):
    """The decoder with its KV cache as plain inputs and outputs, and the head on the last position only."""

    def __init__(self, language_model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: KeyValues
    ) -> tuple[Tensor, list[Tensor]]:
        """One step over S new positions after P cached ones.

        Args:
            inputs_embeds: ``[B, S, D]``, model dtype.
            attention_mask: ``[B, P + S]``, int64; 0 for padding.
            position_ids: ``[B, S]``, int64; ``[3, B, S]`` for a model with three rotary positions per token.
            past_key_values: per layer a key and a value, ``[B, KV heads, P, head dim]``, model dtype.

        Returns:
            ``logits [B, 1, vocabulary]`` of the last position, fp32, and per layer a key and a value of length P + S.
        """
        cache: Any = DynamicCache(past_key_values)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -1:]).float()
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return logits, present


def embed_tokens_graph(family: Family, *, opset: int) -> ir.Model:
    """Export ``input_ids [batch_size, sequence_length]`` -> ``inputs_embeds [batch_size, sequence_length, D]``."""
    return graph_from_module(
        family.embed_tokens,
        (torch.zeros(2, 3, dtype=torch.int64),),
        inputs={"input_ids": {0: "batch_size", 1: "sequence_length"}},
        outputs={"inputs_embeds": {0: "batch_size", 1: "sequence_length"}},
        opset=opset,
        dynamic_shapes=({0: Dim("batch", min=1), 1: Dim("sequence", min=1)},),
    )


def decoder_graph(family: Family, *, opset: int) -> ir.Model:
    """Export the decoder; see :meth:`DecoderWithCache.forward` for its inputs and outputs."""
    text = family.text_config
    stack, repetition = _shallow(family.language_model)
    layers = len(stack.layers)
    batch, length, past = 2, 3, 4
    dtype = next(family.language_model.parameters()).dtype
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    shape = (batch, heads, past, head_dim)
    args = (
        torch.zeros(batch, length, text.hidden_size, dtype=dtype),
        torch.ones(batch, past + length, dtype=torch.int64),
        torch.arange(past, past + length).repeat(*family.position_axes, batch, 1),
        # Separate tensors: torch.export would treat one tensor that is passed twice as one input.
        [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(layers)],
    )
    return graph_from_module(
        DecoderWithCache(stack, family.lm_head),
        args,
        inputs=_decoder_inputs(text.num_hidden_layers, len(family.position_axes)),
        outputs={"logits": {0: "batch_size"}, **_cache_dims(PRESENT, text.num_hidden_layers, "total_sequence_length")},
        opset=opset,
        dynamic_shapes=_decoder_dynamic_shapes(layers, len(family.position_axes)),
        repetition=repetition,
    )


def check_rotary_frequencies(text_config: Any) -> None:
    """Refuse rotary frequencies that depend on the length of the text: the graph and the KV cache have one set.

    Raises:
        UnsupportedModelError: the decoder cannot be one graph for every sequence length.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    if kind == "dynamic" or (kind == "longrope" and (original or 0) < text_config.max_position_embeddings):
        raise UnsupportedModelError(
            f"the language model has rope_type = {kind!r}: its rotary frequencies change with the length of the text",
            expected="constant frequencies, as with default, linear, llama3 or yarn",
        )


def _shallow(stack: Any) -> tuple[Any, Repetition | None]:
    """Return the stack to trace, and the layers to repeat: all but two, if they are alike."""
    first, *rest = stack.layers
    if len(rest) < 2 or not alike(rest):
        return stack, None
    repetition = Repetition(
        path="language_model.layers",
        template=1,
        layers=rest[1:],
        values={f"{name}.1.{part}": f"{name}.{{}}.{part}" for name in (PAST, PRESENT) for part in ("key", "value")},
    )
    return with_layers(stack, [first, rest[0]]), repetition


def _decoder_inputs(layers: int, axes: int) -> dict[str, dict[int, str]]:
    return {
        "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {axes: "batch_size", axes + 1: "sequence_length"},
        **_cache_dims(PAST, layers, "past_sequence_length"),
    }


def _decoder_dynamic_shapes(layers: int, axes: int) -> tuple[Any, ...]:
    batch, length, past = Dim("batch", min=1), Dim("sequence", min=1), Dim("past", min=0)
    total = Dim("total", min=4)
    cached = {0: batch, 2: past}
    return (
        {0: batch, 1: length},
        {0: batch, 1: total},
        {axes: batch, axes + 1: length},
        [(cached, cached) for _ in range(layers)],
    )


def _cache_dims(prefix: str, layers: int, length: str) -> dict[str, dict[int, str]]:
    names = (f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))
    return {name: {0: "batch_size", 2: length} for name in names}
