"""The scenes and questions: reproducible from their seed, in disjoint splits, and with right answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from promprune.embedded.scenes import (
    CALIBRATION_SEEDS,
    COLOURS,
    DIGITS,
    MAX_OBJECTS,
    PATTERNS,
    QUESTION_TYPES,
    SHAPES,
    SIZES,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Question,
    Scene,
    SceneObject,
    questions,
    render_scene,
)
from promprune.errors import ConfigError

SCENES = [render_scene(seed) for seed in TEST_SEEDS[500:540]]


def test_a_seed_is_a_scene() -> None:
    for seed in (0, TEST_SEEDS[7]):
        first, second = render_scene(seed), render_scene(seed)
        assert first.objects == second.objects
        assert first.corners == second.corners
        assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
        assert questions(first) == questions(second)
    assert render_scene(1).objects != render_scene(2).objects


def test_a_seed_is_the_same_scene_at_any_resolution() -> None:
    small, large = render_scene(3, image_size=224), render_scene(3, image_size=336)
    assert small.image.size == (224, 224)
    assert large.image.size == (336, 336)
    assert small.image.mode == "RGB"
    assert small.objects == large.objects
    assert small.corners == large.corners
    assert questions(small) == questions(large)


def test_splits_are_disjoint() -> None:
    splits = (TRAIN_SEEDS, CALIBRATION_SEEDS, TEST_SEEDS)
    ordered = sorted(splits, key=lambda split: split.start)
    assert all(earlier.stop <= later.start for earlier, later in pairwise(ordered))


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_objects_are_inside_and_apart(scene: Scene) -> None:
    assert 1 <= len(scene.objects) <= MAX_OBJECTS
    for index, item in enumerate(scene.objects):
        assert item.radius <= min(item.x, item.y, 1 - item.x, 1 - item.y)
        for other in scene.objects[:index]:
            assert math.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


def test_objects_have_their_colour_in_the_image() -> None:
    for item, pixel in ((o, _pixel(s, o)) for s in SCENES for o in s.objects if o.kind in ("circle", "square")):
        assert np.abs(pixel - np.array(COLOURS[item.colour])).max() < 40, item


def test_object_counts_can_be_limited() -> None:
    assert all(len(render_scene(seed, max_objects=3).objects) <= 3 for seed in range(20))
    assert all(len(render_scene(seed, min_objects=5, max_objects=6).objects) in (5, 6) for seed in range(20))


@pytest.mark.parametrize(
    "arguments",
    [{"seed": -1}, {"image_size": 8}, {"max_objects": 0}, {"max_objects": 17}, {"min_objects": 9, "max_objects": 3}],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        render_scene(**{"seed": 0} | arguments)


def test_every_type_of_question_is_asked() -> None:
    asked = Counter(question.type for scene in SCENES for question in questions(scene, per_type=2))
    assert set(asked) == set(QUESTION_TYPES)
    assert min(asked.values()) >= len(SCENES) // 2
    assert max(asked.values()) <= 2 * len(SCENES)


def test_another_seed_asks_other_questions() -> None:
    assert questions(SCENES[0], seed=0) != questions(SCENES[0], seed=1)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: str(scene.seed))
def test_answers_are_right(scene: Scene) -> None:
    """Independent code finds each answer from the words of the question alone."""
    for question in questions(scene, per_type=4):
        assert _answer(scene, question) == question.answer, question


def _pixel(scene: Scene, item: SceneObject) -> np.ndarray:
    side = scene.image.width
    return np.asarray(scene.image, dtype=int)[int(item.y * side), int(item.x * side)]


def _matching(scene: Scene, words: set[str]) -> list[SceneObject]:
    """The objects that every attribute word among `words` is true of."""
    known = words & {*COLOURS, *SIZES, *SHAPES, *DIGITS, "shape", "digit"}
    return [o for o in scene.objects if known <= {o.colour, o.size, o.kind, o.group}]


def _answer(scene: Scene, question: Question) -> str:
    text = question.text.lower().rstrip("?")
    if "background" in text:
        corner = ("top left", "top right", "bottom left", "bottom right").index(text.split("at the ")[1])
        return getattr(scene.corners[corner], "pattern" if "pattern" in text else "colour")
    words = {re.sub(r"(?<=cross)es$|s$", "", w) if w != "cross" else w for w in text.split()}
    found = _matching(scene, words)
    if text.startswith("how many"):
        return str(len(found))
    if text.startswith("is there"):
        return "yes" if found else "no"
    assert len(found) == 1, question
    return next(
        value
        for start, value in {
            "what colour": found[0].colour,
            "what size": found[0].size,
            "where": found[0].place,
            "what is": found[0].kind,
        }.items()
        if text.startswith(start)
    )


def test_patterns_differ_in_the_image() -> None:
    """A plain background varies by noise only; the others by their second tone."""
    spread: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    for seed in range(200):
        scene = render_scene(seed, max_objects=1)
        patch = np.asarray(scene.image, dtype=float)[2:40, 2:40].mean(-1)
        if all(item.x > 0.35 or item.y > 0.35 for item in scene.objects):
            spread[scene.corners[0].pattern].append(patch.std())
    assert np.median(spread["plain"]) < 6
    assert min(np.median(spread[pattern]) for pattern in PATTERNS[1:]) > 9
