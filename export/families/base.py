"""What a model family provides to the export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from promprune.errors import ConfigError, UnsupportedModelError
from promprune.package.image import AnyresLayout, CropLayout, GridLayout
from promprune.package.manifest import VISION_ENCODER
from promprune.runtime.images.encoded import TokenGrid

__all__ = ["Family", "Grids", "ImageTokens", "SampleInput", "VisionModule", "VisionReference", "single_grid"]

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
class VisionModule:
    """The torch module of one vision graph, without the selection, and its inputs.

    Attributes:
        module: takes ``inputs`` in their order; returns ``image_features [B, N, D]`` in the model's dtype and
            ``saliency [B, N]`` (fp32, at least 0, larger is more salient).
        inputs: by name. B is the dynamic dimension ``batch_size`` if an input has one of that name, else 1.
        num_tokens: N.
        token_mask: whether the selection takes ``token_mask [B, N]`` (bool, false for padding) as a further input of
            the graph; padding is then kept only if an image has fewer than T other tokens.
        name: name of the graph in the manifest.
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
class VisionReference:
    """The results of transformers' own preprocessing and model for one image.

    Attributes:
        graph: name of the vision graph that takes this image.
        feeds: all inputs of that graph, by name, including ``token_mask`` if it takes one.
        features: ``[B, N, D]``.
        saliency: ``[B, N]``, fp32, from transformers' own attention weights; None if the family cannot get it from
            transformers. The graph's saliency is then compared with the exported module only.
    """

    feeds: Mapping[str, Tensor]
    features: Tensor
    saliency: Tensor | None = None
    graph: str = VISION_ENCODER


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """The places of the visual tokens of one image.

    Attributes:
        indices: int64 ``[crops, N]``, index of each token among all tokens of the image; -1 for padding. One crop
            unless the family divides images into several.
        grids: the grids over which the tokens are numbered.
        view: the part of the image that the model sees, RGB.
    """

    indices: Tensor
    grids: tuple[TokenGrid, ...]
    view: Image


def single_grid(rows: int, columns: int, view: Image) -> ImageTokens:
    """Return the tokens of an image that is seen as one grid of patches, in raster order."""
    grid = TokenGrid(rows=rows, columns=columns, left=0, top=0, width=view.width, height=view.height)
    return ImageTokens(indices=torch.arange(rows * columns)[None], grids=(grid,), view=view)


class Family(ABC):
    """A transformers model and its processor, seen as the parts that are exported.

    A subclass is one row of the table of families. Its methods describe the vision graphs, and run transformers' own
    code on one image, which the exported package is verified against. The parts of the language model have the same
    names in most families; a subclass overrides those that differ.

    Args:
        model: an instance of ``model_class``; its weights may be on the meta device, fake or on disk.
        processor: its processor, or the parts of one: tokenizer, image processor, chat template.
        grids: sizes of images, for families with a choice of sizes; empty for the family's default.

    Attributes:
        model_type: as in ``config.json``.
        model_class: name of the class in ``transformers`` that loads it.
        towers: ``model_type`` of the vision towers that it is exported with; empty if it has one of its own.
        position_axes: leading axes of ``position_ids``, before ``[B, S]``: empty, or ``(3,)`` if every token has
            three rotary positions: time, height and width.
        grids: the sizes of images that are exported; empty if the family has no choice of sizes.
        vision_modules: one or more; the first one is named ``vision_encoder``.
        layout: how an image enters the model; the runtime has a class for each kind.

    Raises:
        ConfigError: sizes were chosen, and this family has no choice of sizes.
        UnsupportedModelError: the model, or a size, is not exported.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    position_axes: ClassVar[tuple[int, ...]] = ()
    towers: ClassVar[Collection[str]] = ()

    def __init__(self, model: Any, processor: Any, grids: Grids = ()) -> None:
        self.model = model
        self.config = model.config
        self.processor = processor
        self.grids = self.choose_grids(grids)
        self.vision_modules = self.build_vision_modules()
        self.layout = self.build_layout()

    @abstractmethod
    def build_vision_modules(self) -> tuple[VisionModule, ...]:
        """Return the vision graphs as torch modules.

        Raises:
            UnsupportedModelError: the vision tower is not exported.
        """

    @abstractmethod
    def build_layout(self) -> CropLayout | AnyresLayout | GridLayout:
        """Return the record that tells the runtime how an image enters the model.

        Raises:
            UnsupportedModelError: the image processor makes images of a size that the vision tower does not take.
        """

    @property
    @abstractmethod
    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width), in pixels, of the images that a package is verified with, used in turn.

        Together they should exercise every case of the layout.
        """

    @abstractmethod
    def reference(self, image: Image) -> VisionReference:
        """Preprocess and encode one RGB image with transformers' own code, not with the exported modules."""

    @abstractmethod
    def image_tokens(self, image: Image, reference: VisionReference) -> ImageTokens:
        """Return the places of the tokens of an image, and the part of it that the model sees."""

    def kept_features(self, reference: VisionReference, token_indices: Tensor) -> Tensor:
        """Return what replaces an image's placeholders if only some tokens are kept: ``[placeholders, D]``.

        Args:
            reference: the reference of the image.
            token_indices: int64 ``[T]``, as in ``promprune.runtime.TokenSelection``.
        """
        return reference.features[0, token_indices]

    def position_ids(self, input_ids: Tensor, reference: VisionReference) -> Tensor | None:
        """Return the positions of a prompt with one image that has all its placeholders: ``[*position_axes, 1, S]``.

        None if the model numbers the tokens that it receives, so that kept tokens have consecutive positions.
        """
        return None

    @classmethod
    def refuse_tower(cls, kind: str) -> None:
        """Refuse a vision tower that this family is not exported with.

        Raises:
            UnsupportedModelError: it is another one.
        """
        if kind not in cls.towers:
            raise UnsupportedModelError(
                f"this model has a {kind!r} vision tower", expected=" or ".join(map(repr, cls.towers))
            )

    def choose_grids(self, grids: Grids) -> Grids:
        """Return the sizes of images to export, given the requested ones.

        Raises:
            ConfigError: sizes were requested, and this family has no choice of sizes.
            UnsupportedModelError: the model takes no images of such a size.
        """
        if grids:
            raise ConfigError(
                f"received --image-grid for a model of the family {self.model_type!r}",
                expected="no grid: the images of this family have a fixed size, or their size is chosen per image",
                fix="omit --image-grid",
            )
        return ()

    def resize(self, image: Image) -> Image:
        """Return an image in a size that :meth:`reference` takes: any size, unless the family has a choice of sizes."""
        return image

    @property
    def embed_tokens(self) -> nn.Module:
        """``input_ids [B, S]`` (int64) -> ``inputs_embeds [B, S, D]``."""
        module: nn.Module = self.language_model.embed_tokens
        return module

    @property
    def language_model(self) -> Any:
        """A transformers decoder stack that takes ``inputs_embeds`` and ``past_key_values``."""
        return self.model.model.language_model

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states ``[B, S, D]`` -> logits ``[B, S, vocabulary]``."""
        module: nn.Module = self.model.lm_head
        return module

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.config.text_config

    @property
    def image_token_id(self) -> int:
        """The placeholder in ``input_ids`` that a visual token replaces."""
        return int(self.config.image_token_id)

    @property
    def image_token(self) -> str:
        """The text of that placeholder in a prompt."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @property
    def arrays(self) -> Mapping[str, Tensor]:
        """Parameters that the runtime reads from the package as fp32 arrays: file name -> parameter."""
        return {}
