"""The vision graph: encoder and projector, and the selection behind them."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch.export import Dim

from promprune.export.families.base import AdaptedModel
from promprune.export.graphs import append_graph, graph_from_module

__all__ = ["fuse_selector", "vision_graph"]

IMAGE_FEATURES = "image_features"
SALIENCY = "saliency"


def vision_graph(model: AdaptedModel, *, opset: int) -> ir.Model:
    """Export ``pixel_values [batch, 3, H, W]`` (fp32) -> ``image_features [batch, N, D]``, ``saliency [batch, N]``."""
    sample = torch.zeros(2, 3, model.geometry.height, model.geometry.width)
    return graph_from_module(
        model.vision,
        (sample,),
        inputs={"pixel_values": {0: "batch"}},
        outputs={IMAGE_FEATURES: {0: "batch"}, SALIENCY: {0: "batch"}},
        opset=opset,
        dynamic_shapes=({0: Dim("batch", min=1)},),
    )


def fuse_selector(vision: ir.Model, selector: ir.Model) -> ir.Model:
    """Put the selection behind the vision encoder; the kept features take the name ``image_features``.

    Returns:
        ``pixel_values`` -> ``image_features [batch, T, D]`` and the selector's report.
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
