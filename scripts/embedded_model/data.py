"""Training batches of scenes: pixels, a label for every patch, and several questions per image."""

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
# The classes of a patch, as words of the language model; class 0 of each group means "none of them".
PATCH_GROUPS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "row": ("top", "bottom"),
    "column": ("left", "right"),
    "pattern": PATTERNS,
    "ground": tuple(BACKGROUND_COLOURS),
}
# Questions per scene: at first equally many of each type, later more of the types that are still hard.
EVENLY = dict.fromkeys(QUESTION_TYPES, 3)
MOSTLY_COUNTING = EVENLY | {"count": 8, "size": 2, "background": 1}


@dataclass
class Batch:
    """Tensors of B images with P patches each.

    Attributes:
        pixels: [B, side, side, 3] uint8.
        patches: [B, P, groups] int64, for every patch one class of each of `PATCH_GROUPS`.
        centres: [B, P] int64, 1 if the patch contains the centre of an object.
        pairs: [B, kinds * colours] float32, 1 if the scene has such an object; for the CLS token.
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
    """Return classes [P, groups] and centres [P] of a scene's patches, in raster order.

    A patch whose centre is within the disc of an object has that object's classes, including its place. All other
    patches have the classes of the background, and of their quarter of the image.
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
    """Turns questions about one image into rows of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = [BOS_ID, *tokenizer.encode("USER: ", add_special_tokens=False).ids]
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def row(self, question: Question) -> tuple[list[int], list[int]]:
        """Return the tokens after the image, and labels: the token that each position should predict, or IGNORE."""
        prompt = self.ids(prompt_tail(question.text))
        answer = [*self.ids(f" {question.answer}"), EOS_ID]
        return prompt + answer[:-1], [IGNORE] * (len(prompt) - 1) + answer

    def pack(self, asked: list[list[Question]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and labels [B, Q, W] of every image's questions."""
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
        """Return whether the two data sets make the same kind of scenes, regardless of their first seed."""
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
    """Make a batch of scenes, with at most ``limits[type]`` questions of each type; none if ``limits`` is empty."""
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
    """Choose questions about a scene, at most ``limits[type]`` of each type."""
    asked = questions(scene, per_type=max(limits.values())) if limits else []
    left = dict(limits)
    chosen = []
    for question in asked:
        left[question.type] -= 1
        if left[question.type] >= 0:
            chosen.append(question)
    return chosen


def stream(dataset: SceneBatches) -> Iterator[Batch]:
    """Yield the data set's batches, which a separate process renders in advance."""
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))


def keep_patches(batch: Batch, keep: int, rng: random.Random) -> torch.Tensor:
    """Choose the image tokens to train with: indices [B, keep] of a random subset, in spatial order.

    Tokens of objects are preferred by a random amount, those of their centres most: without the tokens of an object
    the answers would be wrong, and PromPrune does not choose at random either.
    """
    score = torch.rand(batch.centres.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    score += rng.uniform(0, 0.6) * (batch.patches[:, :, 0] > 0) + 2 * batch.centres
    return score.topk(keep, dim=1).indices.sort(dim=1).values
