"""Batches of scenes: pixels, a label for every patch, and questions packed behind one image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

from promprune.embedded.scenes import (
    BACKGROUND_COLOURS,
    COLOURS,
    DIGITS,
    MAX_OBJECTS,
    PATTERNS,
    QUESTION_TYPES,
    SHAPES,
    SIZES,
    TRAIN_SEEDS,
    Question,
    Scene,
    questions,
    render_scene,
)

from .architecture import BOS_ID, EOS_ID, PAD_ID, PATCH_SIZE, prompt_tail

IGNORE = -100
KINDS = (*SHAPES, *DIGITS)
# What a patch can say, in words of the language model; class 0 of each group is "none of them".
PATCH_GROUPS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "row": ("top", "bottom"),
    "column": ("left", "right"),
    "pattern": PATTERNS,
    "ground": tuple(BACKGROUND_COLOURS),
}
# Questions per scene: as many of each type, and later more of what is still hard.
EVENLY = dict.fromkeys(QUESTION_TYPES, 3)
MOSTLY_COUNTING = EVENLY | {"count": 8, "size": 2, "background": 1}


@dataclass
class Batch:
    """Tensors of B images with P patches each.

    Attributes:
        pixels: [B, side, side, 3] uint8.
        patches: [B, P, groups] int64, a class of each of `PATCH_GROUPS` for every patch.
        centres: [B, P] int64, 1 where an object has its centre.
        pairs: [B, kinds * colours] float32, 1 where such an object is there; for the CLS token.
        counts: [B] int64, number of objects.
        tokens, labels: [B, Q, W] int64, the questions with their answers, padded on the right.
        types: the question type of every row, per image.
    """

    pixels: torch.Tensor
    patches: torch.Tensor
    centres: torch.Tensor
    pairs: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    types: list[list[str]]


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Classes [P, groups] and centres [P] of a scene's patches, in raster order.

    A patch belongs to the object whose disc its centre is in, and takes that object's words, its place included.
    Other patches say what the background is, and in which quarter of the image they are.
    """
    grid = scene.image.width // PATCH_SIZE
    middle = (np.arange(grid) + 0.5) / grid
    x, y = np.tile(middle, grid), np.repeat(middle, grid)
    corner = (x > scene.split[0]) + 2 * (y > scene.split[1])
    ground = np.array([(PATTERNS.index(c.pattern), list(BACKGROUND_COLOURS).index(c.colour)) for c in scene.corners])
    classes = np.zeros((grid * grid, len(PATCH_GROUPS)), dtype=np.int64)
    classes[:, 3], classes[:, 4] = 1 + (y > 0.5), 1 + (x > 0.5)
    classes[:, 5:] = 1 + ground[corner]
    centres = np.zeros(grid * grid, dtype=np.int64)
    nearest = np.full(grid * grid, np.inf)
    for item in scene.objects:
        distance = np.hypot(x - item.x, y - item.y) - item.radius
        mine = (distance < min(0.012, 0.2 / grid)) & (distance < nearest)
        centre = int(item.y * grid) * grid + int(item.x * grid)
        mine[centre] = True
        nearest[mine] = distance[mine]
        centres[centre] = 1
        row = next((i for i, word in enumerate(PATCH_GROUPS["row"], 1) if word in item.place), 0)
        column = next((i for i, word in enumerate(PATCH_GROUPS["column"], 1) if word in item.place), 0)
        words = (KINDS.index(item.kind), list(COLOURS).index(item.colour), list(SIZES).index(item.size))
        classes[mine] = [*(1 + w for w in words), row, column, 0, 0]
    return classes, centres


class Packer:
    """Turns questions into rows of token ids, all behind the same image."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = [BOS_ID, *tokenizer.encode("USER: ", add_special_tokens=False).ids]
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def row(self, question: Question) -> tuple[list[int], list[int]]:
        """Tokens that follow the image, and labels: the token each position should predict, or IGNORE."""
        prompt = self.ids(prompt_tail(question.text))
        answer = [*self.ids(f" {question.answer}"), EOS_ID]
        return prompt + answer[:-1], [IGNORE] * (len(prompt) - 1) + answer

    def pack(self, asked: list[list[Question]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels [B, Q, W] of every image's questions."""
        rows = [[self.row(question) for question in image] for image in asked]
        width = max((len(tokens) for image in rows for tokens, _ in image), default=0)
        tokens = torch.full((len(rows), max(map(len, rows)), width), PAD_ID, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE)
        for i, image in enumerate(rows):
            for j, (row_tokens, row_labels) in enumerate(image):
                tokens[i, j, : len(row_tokens)] = torch.tensor(row_tokens)
                labels[i, j, : len(row_labels)] = torch.tensor(row_labels)
        return tokens, labels


class SceneBatches(IterableDataset[Batch]):
    """An endless stream of training batches; step k always holds the same seeds.

    A quarter of the scenes has 1 to `max_objects` objects, the others `min_objects` to `max_objects`.
    """

    def __init__(
        self,
        packer: Packer,
        *,
        image_size: int,
        batch_size: int,
        first_seed: int,
        limits: dict[str, int],
        min_objects: int = 1,
        max_objects: int = MAX_OBJECTS,
    ) -> None:
        self.packer = packer
        self.image_size = image_size
        self.batch_size = batch_size
        self.first_seed = first_seed
        self.limits = limits
        self.min_objects = min_objects
        self.max_objects = max_objects

    def same_scenes(self, other: SceneBatches) -> bool:
        """Whether the two ask the same of their scenes; where they begin does not count."""
        return (self.limits, self.min_objects, self.max_objects) == (
            other.limits,
            other.min_objects,
            other.max_objects,
        )

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        for start in range(self.first_seed, TRAIN_SEEDS.stop - self.batch_size, self.batch_size):
            seeds = range(start, start + self.batch_size)
            yield make_batch([self._scene(seed) for seed in seeds], self.packer, self.limits)

    def _scene(self, seed: int) -> Scene:
        fewest = 1 if seed % 4 == 0 else self.min_objects
        return render_scene(seed, image_size=self.image_size, min_objects=fewest, max_objects=self.max_objects)


def make_batch(scenes: list[Scene], packer: Packer, limits: dict[str, int]) -> Batch:
    """Label and pack the scenes, with at most so many questions of each type; an empty dict leaves them out."""
    labelled = [patch_labels(scene) for scene in scenes]
    asked = [choose_questions(scene, limits) for scene in scenes]
    tokens, labels = packer.pack(asked)
    pairs = torch.zeros(len(scenes), len(KINDS) * len(COLOURS))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            pairs[row, KINDS.index(item.kind) * len(COLOURS) + list(COLOURS).index(item.colour)] = 1
    return Batch(
        pixels=torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])),
        patches=torch.from_numpy(np.stack([classes for classes, _ in labelled])),
        centres=torch.from_numpy(np.stack([centres for _, centres in labelled])),
        pairs=pairs,
        counts=torch.tensor([len(scene.objects) for scene in scenes]),
        tokens=tokens,
        labels=labels,
        types=[[question.type for question in ask] for ask in asked],
    )


def choose_questions(scene: Scene, limits: dict[str, int]) -> list[Question]:
    """Questions about a scene, at most so many of each type."""
    asked = questions(scene, per_type=max(limits.values())) if limits else []
    left = dict(limits)
    chosen = []
    for question in asked:
        left[question.type] -= 1
        if left[question.type] >= 0:
            chosen.append(question)
    return chosen


def stream(dataset: SceneBatches) -> Iterator[Batch]:
    """The data set's batches, rendered ahead in a process of their own."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))


def keep_patches(batch: Batch, keep: int, rng: random.Random) -> torch.Tensor:
    """Indices [B, keep] of image tokens to train with: a random subset in spatial order.

    Objects are favoured, their centres most, by a random amount: a kept set that lost an object would make the
    answers wrong, and what PromPrune keeps is not random either.
    """
    score = torch.rand(batch.centres.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    score += rng.uniform(0, 0.6) * (batch.patches[:, :, 0] > 0) + 2 * batch.centres
    return score.topk(keep, dim=1).indices.sort(dim=1).values
