"""The vision graphs: encoder, projector and selection."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from torch import nn
from torch.export import Dim

from promprune.export.families.base import VisionModule
from promprune.export.graphs.passes.layers import Repetition, alike, with_layers
from promprune.export.graphs.passes.selection import IMAGE_FEATURES, SALIENCY, DropSaliency, FuseSelector
from promprune.export.graphs.trace import graph_from_module
from promprune.package.manifest import TokenCounts

__all__ = ["encoder_graph", "vision_graph"]


def vision_graph(
    vision: VisionModule, tokens: TokenCounts, selector: Callable[[], onnx.ModelProto], *, opset: int
) -> ir.Model:
    """Export a vision graph, with the selection inside unless every token is kept.

    Args:
        vision: the torch module and its inputs.
        tokens: N and T.
        selector: builds the selection of T of N tokens.
        opset: operator set of the default domain.

    Returns:
        The graph. Inputs: those of ``vision``, and ``token_mask`` if the selector takes it. Outputs:
        ``image_features [B, T, D]`` and, with a selection, the other outputs of the selector.
    """
    encoder = encoder_graph(vision, opset=opset)
    step = FuseSelector(ir.from_proto(selector()), tokens) if tokens.is_pruned else DropSaliency(tokens)
    return step(encoder).model


def encoder_graph(vision: VisionModule, *, opset: int) -> ir.Model:
    """Export a vision encoder and projector: its inputs -> ``image_features [B, N, D]``, ``saliency [B, N]``."""
    module, repetition = _shallow(vision.module)
    names = {name for value in vision.inputs.values() for name in value.dims.values()}
    dims = {name: Dim(name, min=1) for name in names}
    batch = {0: "batch_size"} if vision.is_batched else {}
    return graph_from_module(
        module,
        tuple(value.sample for value in vision.inputs.values()),
        inputs={name: value.dims for name, value in vision.inputs.items()},
        outputs={IMAGE_FEATURES: batch, SALIENCY: batch},
        opset=opset,
        dynamic_shapes=tuple(
            {axis: dims[name] for axis, name in value.dims.items()} for value in vision.inputs.values()
        ),
        repetition=repetition,
    )


def _shallow(encoder: nn.Module) -> tuple[nn.Module, Repetition | None]:
    """Return the encoder to trace, and the layers to repeat: all but two and the last, if its ``layers`` are alike.

    If the features come from several layers, all are traced.
    """
    layers, several = getattr(encoder, "layers", None), len(getattr(encoder, "feature_layers", ())) > 1
    if not isinstance(layers, nn.ModuleList) or several or len(layers) < 4 or not alike(layers):
        return encoder, None
    first, second, *rest, last = layers
    return with_layers(encoder, [first, second, last]), Repetition(path="layers", template=1, layers=rest)
