"""The vision graphs: encoder and projector, and the selection behind them."""

from __future__ import annotations

import onnx_ir as ir
from torch import nn
from torch.export import Dim

from promprune.export.families.base import VisionGraph
from promprune.export.graphs.passes.layers import Repetition, alike, with_layers
from promprune.export.graphs.trace import append_graph, graph_from_module

__all__ = ["drop_saliency", "fuse_selector", "vision_graph"]

IMAGE_FEATURES = "image_features"
SALIENCY = "saliency"


def vision_graph(vision: VisionGraph, *, opset: int) -> ir.Model:
    """Export a vision graph: its inputs -> ``image_features [B, N, D]``, ``saliency [B, N]``."""
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
    """Return the encoder to trace, and the layers to repeat: all but two and the last, where ``layers`` are alike."""
    layers = getattr(encoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) < 4 or not alike(layers):
        return encoder, None
    first, second, *rest, last = layers
    return with_layers(encoder, [first, second, last]), Repetition(path="layers", template=1, layers=rest)


def fuse_selector(vision: ir.Model, selector: ir.Model) -> ir.Model:
    """Put the selection behind the vision encoder; the kept features take the name ``image_features``.

    Returns:
        The vision graph's inputs, and the selector's ``token_mask`` if it has one -> ``image_features [B, T, D]`` and
        the selector's report.
    """
    for value in vision.graph.outputs:
        value.name = f"encoder/{value.name}"
    fused = append_graph(
        vision,
        selector,
        connect={IMAGE_FEATURES: f"encoder/{IMAGE_FEATURES}", SALIENCY: f"encoder/{SALIENCY}"},
        prefix="selector/",
    )
    for value in fused.graph.outputs:
        if value.name == "selected_features":
            value.name = IMAGE_FEATURES
    return fused


def drop_saliency(vision: ir.Model) -> ir.Model:
    """Keep ``image_features`` only: the unpruned baseline, in which nothing is scored."""
    for value in list(vision.graph.outputs):
        if value.name == SALIENCY:
            vision.graph.outputs.remove(value)
    ir.passes.common.RemoveUnusedNodesPass()(vision)
    return vision
