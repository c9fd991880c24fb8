"""What a model family provides to the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image, Resampling
from torch import Tensor, nn

from promprune.errors import ConfigError
from promprune.package.image import AnyresLayout, CropLayout, GridLayout, ImageRecord
from promprune.package.manifest import VISION_ENCODER
from promprune.runtime.images.patches import closest_shape

__all__ = ["AdaptedModel", "Family", "Grids", "SampleInput", "VisionGraph", "VisionReference", "grids_of"]

# Sizes of images, as (rows, columns) of visual tokens.
Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class SampleInput:
    """One input of a graph.

    Attributes:
        sample: a tensor of its dtype and rank; every dynamic dimension at least 2.
        dims: axis -> name of its dynamic dimension.
    """

    sample: Tensor
    dims: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VisionGraph:
    """One vision graph of a package; the selection is put behind it.

    Attributes:
        module: takes ``inputs`` in their order; returns ``image_features [B, N, D]`` in the model's dtype and
            ``saliency [B, N]`` (fp32, at least 0, larger is more salient).
        inputs: by name. B is the dynamic dimension ``batch_size`` where one is named so, else 1.
        num_tokens: N.
        token_mask: whether the selection takes ``token_mask [B, N]`` (bool, false for padding) as a further input of
            the graph; then padding is chosen only where there are fewer than T other tokens.
        name: of the graph in the manifest.
    """

    module: nn.Module
    inputs: Mapping[str, SampleInput]
    num_tokens: int
    token_mask: bool = False
    name: str = VISION_ENCODER

    @property
    def is_batched(self) -> bool:
        """Whether B is dynamic."""
        return any("batch_size" in value.dims.values() for value in self.inputs.values())


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A loaded model, taken apart at the places where the exported graphs begin and end.

    Attributes:
        vision_graphs: one or more, the first one named ``vision_encoder``.
        embed_tokens: ``input_ids [B, S]`` (int64) -> ``inputs_embeds [B, S, D]``.
        language_model: a Hugging Face decoder stack that takes ``inputs_embeds`` and ``past_key_values``.
        lm_head: hidden states ``[B, S, D]`` -> logits ``[B, S, vocabulary]``.
        text_config: configuration of the language model.
        layout: what the manifest says of the way of an image into the model; the runtime has a layout for it.
        sample_sizes: (height, width) in pixels of the images that a package is verified on, in turns; between them
            they should take every way through the layout.
        image_token_id: the placeholder in ``input_ids`` that a visual token replaces.
        arrays: what else the runtime's layout reads from the package: file name -> fp32 tensor.
        position_axes: what the language model's ``position_ids`` have in front of ``[B, S]``: nothing, or ``(3,)``
            where a token has one rotary position each for time, height and width.
    """

    vision_graphs: tuple[VisionGraph, ...]
    embed_tokens: nn.Module
    language_model: nn.Module
    lm_head: nn.Module
    text_config: Any
    layout: CropLayout | AnyresLayout | GridLayout
    sample_sizes: tuple[tuple[int, int], ...]
    image_token_id: int
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    position_axes: tuple[int, ...] = ()

    def sized(self, image: Image) -> Image:
        """Return an image in the size that it is to have for ``Family.reference``: that of the grid closest to it.

        As it is, where the model's own preprocessing takes images of any size.
        """
        if not isinstance(self.layout, GridLayout):
            return image
        height, width = self.sample_sizes[closest_shape(image.height, image.width, self.sample_sizes)]
        return image.resize((width, height), resample=Resampling.BICUBIC)


@dataclass(frozen=True, kw_only=True)
class VisionReference:
    """What the source model itself, with its own preprocessing, makes of one image.

    Attributes:
        graph: name of the one of the model's vision graphs that takes this image.
        feeds: all inputs of that graph, by name, ``token_mask`` included where it takes one.
        features: ``[B, N, D]``, as transformers computes them.
        saliency: ``[B, N]``, fp32, from transformers' own attention weights; ``None`` where the family gives none, and
            the graph's saliency can only be compared with the module that was exported.
    """

    feeds: Mapping[str, Tensor]
    features: Tensor
    saliency: Tensor | None = None
    graph: str = VISION_ENCODER


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in ``config.json``.
        model_class: name of the class in ``transformers`` that loads it.
        adapt: ``(model, processor, grids)``: takes a loaded model apart, for images of these sizes where the family
            has ``default_grids`` (else there are none); raises ``UnsupportedModelError``, with the reason, on
            whatever is not exported.
        reference: ``(model, processor, image, adapted)``, ``adapted`` being what ``adapt`` made of this model: one
            RGB image on transformers' own path. The exported graph is verified against it.
        kept_features: ``(model, reference, token_indices)``: ``[placeholders, D]``, what takes the place of an
            image's placeholders when only some tokens are kept. The indices are those of
            ``promprune.runtime.TokenSelection``.
        default_grids: ``(processor)``: the sizes of images where the user chooses none; ``None`` where the model
            takes one size, or chooses itself.
        position_ids: ``(model, adapted, input_ids, reference)``: ``[*position_axes, 1, S]``, as transformers places
            the tokens of one prompt whose image has all its placeholders; ``None`` where it simply counts.
    """

    model_type: str
    model_class: str
    adapt: Callable[[Any, Any, Grids], AdaptedModel]
    reference: Callable[[Any, Any, Any, AdaptedModel], VisionReference]
    kept_features: Callable[[Any, VisionReference, Tensor], Tensor]
    default_grids: Callable[[Any], Grids] | None = None
    position_ids: Callable[[Any, AdaptedModel, Tensor, VisionReference], Tensor] | None = None

    def adapted(self, model: Any, processor: Any, grids: Grids = ()) -> AdaptedModel:
        """Take a loaded model apart, for images of some sizes if any were chosen.

        Raises:
            ConfigError: sizes were chosen, and this family takes none.
            UnsupportedModelError: the model, or a size, is not exported.
        """
        if self.default_grids is not None:
            return self.adapt(model, processor, grids or self.default_grids(processor))
        if grids:
            raise ConfigError(
                f"received --image-grid for a model of the family {self.model_type!r}",
                expected="none: its images have one size, or choose theirs",
                fix="leave it out",
            )
        return self.adapt(model, processor, ())


def grids_of(image: ImageRecord) -> Grids:
    """Return the grids that a package was exported for; none where its family takes none."""
    layout = image.layout
    return tuple((grid.rows, grid.columns) for grid in layout.grids) if isinstance(layout, GridLayout) else ()
