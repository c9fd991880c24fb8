"""The language model of a package: from token ids and image features to logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from promprune.errors import ConfigError
from promprune.runtime.engine.cache import Cache
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.engine.prompt import TokenIds
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.images.positions import ImagePositions, PromptPositions, prompt_positions
from promprune.runtime.sessions import RowCopy, Session, Value

__all__ = ["LanguageModel", "PromptTokens", "SplicedPrompts"]

Logits = npt.NDArray[np.float32]


class PromptTokens(NamedTuple):
    """The tokens of one prompt, and the images in it.

    Attributes:
        token_ids: int64 [length], one placeholder per visual token.
        is_image: bool [length]; true for placeholders.
        images: the images, in the order of their placeholders.
    """

    token_ids: TokenIds
    is_image: npt.NDArray[np.bool_]
    images: Sequence[EncodedImage]


class SplicedPrompts(NamedTuple):
    """Inputs of a prefill, shorter prompts padded on the left.

    Attributes:
        embeds: [batch, longest, hidden].
        mask: int64 [batch, longest]; 0 for padding.
        positions: rotary positions, if the model has several per token.
    """

    embeds: Value
    mask: npt.NDArray[np.int64]
    positions: PromptPositions | None


class LanguageModel:
    """``embed_tokens`` and the decoder. Thread-safe.

    Attributes:
        embed: the loaded graph ``embed_tokens``.
        decoder: the decoder.
    """

    def __init__(self, embed: Session, decoder: Decoder) -> None:
        self.embed = embed
        self.decoder = decoder

    @property
    def max_batch(self) -> int | None:
        """Most rows in one run of its graphs; None if there is no limit."""
        sizes = [
            session.limits[str(record.shape[0])]
            for session in (self.embed, self.decoder.session)
            for record in session.inputs.values()
            if str(record.shape[0]) in session.limits
        ]
        return min(sizes, default=None)

    def splice(self, prompts: Sequence[PromptTokens], begin: int = 0) -> SplicedPrompts:
        """Embed the tokens of some prompts from position ``begin`` on, with image features at the placeholders.

        Raises:
            BackendError: the backend fails.
            ConfigError: an image has no positions, and the model needs them.
        """
        longest = max(len(prompt.token_ids) for prompt in prompts) - begin
        mask = np.zeros((len(prompts), longest), np.int64)
        copies: list[RowCopy] = []
        for row, prompt in enumerate(prompts):
            new = prompt.token_ids[begin:]
            start = (row + 1) * longest - len(new)
            copies.append(RowCopy(self._embed(new[None]), 0, len(new), start))
            copies += copy_features(prompt.images, np.flatnonzero(prompt.is_image) - begin, start)
            mask[row, longest - len(new) :] = 1
        shape = (len(prompts), longest, self.decoder.hidden_size)
        embeds = self.decoder.session.copy_rows(shape, self.decoder.embeds_dtype.name, copies)
        return SplicedPrompts(embeds, mask, self._positions(prompts, begin))

    def decode(self, token_ids: Sequence[int], cache: Cache) -> tuple[Logits, Cache]:
        """Run the decoder on one token per row.

        Args:
            token_ids: the token of each row.
            cache: the KV cache of the rows.

        Returns:
            The logits after each token, float32 [batch, vocabulary], and the cache that includes the tokens.

        Raises:
            BackendError: the backend fails.
        """
        return self.decoder.forward(self._embed(np.array(token_ids, np.int64)[:, None]), cache)

    def close(self) -> None:
        """Free the graphs; using them afterwards raises a BackendError."""
        self.embed.close()
        self.decoder.session.close()

    def _embed(self, ids: TokenIds) -> Value:
        """Return the embeddings of [batch, sequence] token ids: [batch, sequence, hidden], on the device."""
        return self.embed.run_keeping({"input_ids": ids}, keep=["inputs_embeds"])["inputs_embeds"]

    def _positions(self, prompts: Sequence[PromptTokens], begin: int) -> PromptPositions | None:
        if self.decoder.position_axes == 1:
            return None
        images = [[_positions_of(image) for image in prompt.images] for prompt in prompts]
        return prompt_positions([prompt.is_image for prompt in prompts], images, begin=begin)


def copy_features(images: Sequence[EncodedImage], places: npt.NDArray[np.int64], begin: int) -> Iterator[RowCopy]:
    """Yield the copies of image features to their placeholders, one per run of adjacent placeholders.

    Args:
        images: the images of one prompt.
        places: positions of all their placeholders; negative for those that need no prefill.
        begin: row of position 0.
    """
    done = 0
    for image in images:
        own = places[done : done + len(image.image_features)]
        done += len(own)
        source = image.image_features if image.on_device is None else image.on_device
        for run in np.split(np.arange(len(own)), np.flatnonzero(np.diff(own) != 1) + 1):
            new = run[own[run] >= 0]
            if len(new):
                yield RowCopy(source, int(new[0]), len(new), begin + int(own[new[0]]))


def _positions_of(image: EncodedImage) -> ImagePositions:
    if image.positions is None:
        raise ConfigError(
            "received an encoded image without rotary positions",
            expected="an image with positions: this model has three per token",
            fix="encode it with this package",
        )
    return image.positions
