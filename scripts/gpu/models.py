"""Models of the real shapes with random weights, made on the device: their speed is that of trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig

from scripts.gpu.sizes import Sizes

__all__ = ["decoder_layers", "llava_config", "patch_features", "random_model"]


def llava_config(sizes: Sizes) -> LlavaConfig:
    """Return the configuration of LLaVA-1.5-7B, whose parts LLaVA-NeXT-7B shares; or a tiny one."""
    if sizes.language_model == "tiny":
        from tests.support.tiny_models import llava_config as tiny_config

        return tiny_config()
    from tests.support.random_llava import config_of

    config: LlavaConfig = config_of(sizes.language_model)
    return config


def random_model(model_class: Any, config: Any, sizes: Sizes) -> Any:
    """Return a model of random weights of ``sizes.dtype``, made on the device itself, ready for inference."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, sizes.dtype))
    try:
        with torch.device(sizes.device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the layers of a CLIP vision model or of a Llama model."""
    layers: nn.ModuleList = model.layers if hasattr(model, "layers") else model.encoder.layers
    return layers


def patch_features(encoder: Any, pixel_values: Tensor) -> Tensor:
    """Return what an encoder of ``promprune.export.families.clip`` gives besides the saliency, which is not computed.

    Args:
        encoder: with the layers up to the one that the features are read from, and the projector.
        pixel_values: ``[B, 3, H, W]``.

    Returns:
        ``[B, N, D]``.
    """
    hidden_states = encoder.pre_layernorm(encoder.embeddings(pixel_values))
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, attention_mask=None)
    features: Tensor = encoder.projector(hidden_states[:, 1:])
    return features
