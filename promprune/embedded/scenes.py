"""Synthetic scenes, and questions about them with exact answers: what the embedded model learns and is tested on.

A scene is a background of one, two or four textured regions under 1 to 16 coloured shapes and digits. It is a
function of an integer seed alone, so a data set is a range of seeds, and no image is ever stored::

    scene = render_scene(TEST_SEEDS[0])
    scene.image.save("scene.png")
    for question in questions(scene):
        print(question.text, "->", question.answer)

Objects are placed in units of the image side, so the same seed is the same scene at any resolution.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from promprune.errors import ConfigError

__all__ = [
    "BACKGROUND_COLOURS",
    "CALIBRATION_SEEDS",
    "COLOURS",
    "CORNERS",
    "DIGITS",
    "MAX_OBJECTS",
    "PATTERNS",
    "QUESTION_TYPES",
    "SHAPES",
    "SIZES",
    "TEST_SEEDS",
    "TRAIN_SEEDS",
    "Background",
    "Question",
    "Scene",
    "SceneObject",
    "questions",
    "render_scene",
]

TRAIN_SEEDS: Final = range(10_000_000)
CALIBRATION_SEEDS: Final = range(20_000_000, 20_010_000)
TEST_SEEDS: Final = range(30_000_000, 30_010_000)

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 85, 215),
    "purple": (130, 50, 175),
    "pink": (245, 120, 190),
}
BACKGROUND_COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "white": (232, 232, 232),
    "grey": (140, 140, 140),
    "black": (38, 38, 38),
    "brown": (112, 80, 54),
}
PATTERNS: Final = ("plain", "striped", "checked", "dotted")
SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS: Final = tuple("0123456789")
SIZES: Final = {"small": 0.056, "large": 0.098}  # radius in units of the image side
CORNERS: Final = ("top left", "top right", "bottom left", "bottom right")
QUESTION_TYPES: Final = ("colour", "shape", "digit", "size", "where", "count", "exists", "background")
MAX_OBJECTS: Final = 16

_SUPERSAMPLING = 2  # objects are drawn this much larger, then averaged down
_WHERE_MARGIN = 0.02  # no question asks for the place of an object this close to a line between two places


@dataclass(frozen=True)
class SceneObject:
    """One shape or digit.

    Attributes:
        kind: one of `SHAPES` or `DIGITS`.
        colour: one of `COLOURS`.
        size: one of `SIZES`.
        x, y: centre, in units of the image side, from the top left corner.
        radius: half the object's height, in units of the image side.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def group(self) -> str:
        """``"digit"`` or ``"shape"``."""
        return "digit" if self.kind in DIGITS else "shape"

    @property
    def place(self) -> str:
        """The ninth of the image that holds the centre: ``"top left"``, ``"left"``, ``"center"``, ..."""
        row = ("top", "", "bottom")[min(int(self.y * 3), 2)]
        column = ("left", "", "right")[min(int(self.x * 3), 2)]
        return f"{row} {column}".strip() or "center"


@dataclass(frozen=True)
class Background:
    """One region of the background: its pattern (`PATTERNS`) and colour (`BACKGROUND_COLOURS`)."""

    pattern: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A rendered scene and what is in it.

    Attributes:
        seed: what it was made from.
        image: RGB, square.
        objects: in drawing order; they do not overlap.
        corners: the background of each of `CORNERS`, in that order.
        split: where the background changes, (x, y) in units of the image side.
    """

    seed: int
    image: Image.Image
    objects: tuple[SceneObject, ...]
    corners: tuple[Background, Background, Background, Background]
    split: tuple[float, float]


@dataclass(frozen=True)
class Question:
    """A question about a scene, and the one right answer.

    Attributes:
        type: one of `QUESTION_TYPES`.
        text: the question as a user would type it.
        answer: one or two words, as the model is trained to give them.
    """

    type: str
    text: str
    answer: str


# ---------------------------------------------------------------------------------------------------- rendering


def render_scene(seed: int, *, image_size: int = 224, min_objects: int = 1, max_objects: int = MAX_OBJECTS) -> Scene:
    """The scene of a seed.

    Args:
        seed: not negative; see `TRAIN_SEEDS`, `CALIBRATION_SEEDS`, `TEST_SEEDS`.
        image_size: side of the image, in pixels.
        min_objects, max_objects: the number of objects is drawn uniformly between them; a crowded scene can end up
            with fewer, if no free space is left.

    Raises:
        ConfigError: an argument is out of range.
    """
    if seed < 0 or image_size < 32 or not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise ConfigError(
            f"seed={seed}, image_size={image_size}, objects {min_objects}..{max_objects}",
            expected=f"seed >= 0, image_size >= 32, 1 <= min_objects <= max_objects <= {MAX_OBJECTS}",
        )
    rng = random.Random(seed)
    objects = _place_objects(rng, rng.randint(min_objects, max_objects))
    corners = _choose_corners(rng)
    split = (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6))
    noise = np.random.default_rng(seed)
    canvas = Image.fromarray(_paint_background(noise, image_size, corners, split))
    canvas = canvas.resize((image_size * _SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for item in objects:
        _draw_object(draw, rng, item, image_size * _SUPERSAMPLING)
    image = _add_noise(noise, canvas.reduce(_SUPERSAMPLING))
    return Scene(seed, image, tuple(objects), corners, split)


def _place_objects(rng: random.Random, count: int) -> list[SceneObject]:
    """Up to `count` objects that do not overlap; crowded scenes have fewer large ones."""
    kinds = rng.sample(SHAPES, rng.randint(2, len(SHAPES))) + rng.sample(DIGITS, rng.randint(2, len(DIGITS)))
    colours = rng.sample(list(COLOURS), rng.randint(3, len(COLOURS)))
    large_share = 0.5 if count <= 8 else 0.3
    objects: list[SceneObject] = []
    for _ in range(count):
        size = "large" if rng.random() < large_share else "small"
        spot = _free_spot(rng, objects, SIZES[size]) or _free_spot(rng, objects, SIZES[size := "small"])
        if spot is not None:
            x, y, radius = spot
            objects.append(SceneObject(rng.choice(kinds), rng.choice(colours), size, x, y, radius))
    return objects


def _free_spot(
    rng: random.Random, objects: list[SceneObject], nominal_radius: float
) -> tuple[float, float, float] | None:
    """Centre and radius of a disc clear of the other objects, or None after 40 tries."""
    radius = nominal_radius * rng.uniform(0.92, 1.08)
    edge = radius + 0.01
    for _ in range(40):
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + 0.012 for other in objects):
            return x, y, radius
    return None


def _choose_corners(rng: random.Random) -> tuple[Background, Background, Background, Background]:
    """One background for the entire image, or one per half, or one per quarter."""

    def region() -> Background:
        return Background(rng.choice(PATTERNS), rng.choice(list(BACKGROUND_COLOURS)))

    match rng.choice(("whole", "columns", "rows", "quarters")):
        case "whole":
            a = region()
            return a, a, a, a
        case "columns":
            a, b = region(), region()
            return a, b, a, b
        case "rows":
            a, b = region(), region()
            return a, a, b, b
        case _:
            return region(), region(), region(), region()


def _paint_background(
    rng: np.random.Generator, side: int, corners: tuple[Background, ...], split: tuple[float, float]
) -> npt.NDArray[np.uint8]:
    """The four corners' textures, [side, side, 3] uint8."""
    pixels = np.empty((side, side, 3), dtype=np.uint8)
    x_split, y_split = round(split[0] * side), round(split[1] * side)
    painted: dict[Background, npt.NDArray[np.uint8]] = {}
    for index, corner in enumerate(corners):
        if corner not in painted:
            painted[corner] = _texture(rng, side, corner)
        rows = slice(0, y_split) if index < 2 else slice(y_split, side)
        columns = slice(0, x_split) if index % 2 == 0 else slice(x_split, side)
        pixels[rows, columns] = painted[corner][rows, columns]
    return pixels


def _texture(rng: np.random.Generator, side: int, background: Background) -> npt.NDArray[np.uint8]:
    """A pattern in two tones of one colour, [side, side, 3] uint8; its period is 1/22 to 1/14 of the side."""
    base = np.array(BACKGROUND_COLOURS[background.colour]) + rng.integers(-10, 11)
    x = np.arange(side, dtype=np.float32)[None, :] + np.float32(rng.integers(side))
    y = np.arange(side, dtype=np.float32)[:, None] + np.float32(rng.integers(side))
    period = np.float32(side * rng.uniform(1 / 22, 1 / 14))
    match background.pattern:
        case "striped":
            angle = np.float32(rng.integers(4) * math.pi / 4)
            phase = (x * np.cos(angle) + y * np.sin(angle)) / period
            accent = phase - np.floor(phase) < 0.5
        case "checked":
            accent = (x // (period / 2) + y // (period / 2)) % 2 == 0
        case "dotted":
            accent = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.28 * period) ** 2
        case _:
            accent = np.zeros((1, 1), dtype=bool)
    contrast = 34 if base.mean() < 100 else -34
    tones = np.stack([base, base + contrast]).clip(0, 255).astype(np.uint8)
    accents = np.broadcast_to(accent, (side, side))[:, :, None]
    return np.asarray(np.where(accents, tones[1], tones[0]), dtype=np.uint8)


def _draw_object(draw: ImageDraw.ImageDraw, rng: random.Random, item: SceneObject, side: int) -> None:
    """Draw one object, slightly off its nominal colour and tilted by up to 12 degrees (digits stay upright)."""
    x, y, r = item.x * side, item.y * side, item.radius * side
    red, green, blue = (min(max(value + rng.randint(-14, 14), 0), 255) for value in COLOURS[item.colour])
    fill = (red, green, blue)
    if item.group == "digit":
        stroke = max(r * 0.07, 1.0)
        draw.text((x, y), item.kind, fill, _font(round(2.7 * r)), anchor="mm", stroke_width=stroke)
    elif item.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif item.kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), None, fill, width=max(round(r * 0.36), 2))
    else:
        tilt = math.radians(rng.uniform(-12, 12))
        draw.polygon([(x + r * px, y + r * py) for px, py in _outline(item.kind, tilt)], fill)


def _outline(shape: str, tilt: float) -> Iterator[tuple[float, float]]:
    """Corners of a polygon within the unit circle, turned by `tilt` radians."""
    polar: dict[str, list[tuple[float, float]]] = {
        "square": [(45 + 90 * k, 1.0) for k in range(4)],
        "triangle": [(-90 + 120 * k, 1.0) for k in range(3)],
        "star": [(-90 + 36 * k, 0.42 if k % 2 else 1.0) for k in range(10)],
        "cross": [(90 * k + d, length) for k in range(4) for d, length in ((-17, 1.0), (17, 1.0), (45, 0.41))],
    }
    for degrees, length in polar[shape]:
        angle = math.radians(degrees) + tilt
        yield length * math.cos(angle), length * math.sin(angle)


@lru_cache(maxsize=256)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(height, 8))


def _add_noise(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Uniform noise of up to 9 levels on every pixel and channel."""
    pixels = np.asarray(image).astype(np.int16)
    pixels += rng.integers(-9, 10, pixels.shape, dtype=np.int8)
    np.clip(pixels, 0, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------- questions


def questions(scene: Scene, *, per_type: int = 3, seed: int = 0) -> list[Question]:
    """Up to `per_type` different questions of each type, in random order.

    Every question has exactly one right answer: an object is only named by words that single it out. A scene in
    which no digit can be singled out has no digit question, and so on.

    Args:
        scene: what the questions are about.
        per_type: the most questions of one type.
        seed: another seed chooses other questions; the same (scene, seed) always gives the same ones.
    """
    rng = random.Random(f"{scene.seed}/{seed}")
    chosen: list[Question] = []
    for kind, ask in _ASK.items():
        found = dict(ask(rng, scene) for _ in range(3 * per_type))
        found.pop("", None)
        chosen += [Question(kind, text, answer) for text, answer in list(found.items())[:per_type]]
    rng.shuffle(chosen)
    return chosen


_NOTHING = ("", "")


def _choose_unique_object(
    rng: random.Random, scene: Scene, describe: Callable[[SceneObject], tuple[str, ...]]
) -> tuple[SceneObject, str] | None:
    """A random object that has a description which fits no other object, and that description."""
    described = [(item, text) for item in scene.objects for text in describe(item)]
    fits = Counter(text for _, text in described)
    alone = [(item, text) for item, text in described if fits[text] == 1]
    return rng.choice(alone) if alone else None


def _ask_colour(rng: random.Random, scene: Scene) -> tuple[str, str]:
    found = _choose_unique_object(rng, scene, lambda item: (item.kind, f"{item.size} {item.kind}"))
    return (f"What colour is the {found[1]}?", found[0].colour) if found else _NOTHING


def _ask_name(rng: random.Random, scene: Scene, group: str) -> tuple[str, str]:
    def describe(item: SceneObject) -> tuple[str, ...]:
        if item.group != group:
            return ()
        return f"{item.colour} {group}", f"{item.size} {item.colour} {group}"

    found = _choose_unique_object(rng, scene, describe)
    return (f"What is the {found[1]}?", found[0].kind) if found else _NOTHING


def _ask_shape(rng: random.Random, scene: Scene) -> tuple[str, str]:
    return _ask_name(rng, scene, "shape")


def _ask_digit(rng: random.Random, scene: Scene) -> tuple[str, str]:
    return _ask_name(rng, scene, "digit")


def _ask_size(rng: random.Random, scene: Scene) -> tuple[str, str]:
    found = _choose_unique_object(rng, scene, lambda item: (item.kind, f"{item.colour} {item.kind}"))
    return (f"What size is the {found[1]}?", found[0].size) if found else _NOTHING


def _ask_where(rng: random.Random, scene: Scene) -> tuple[str, str]:
    found = _choose_unique_object(rng, scene, lambda item: (item.kind, f"{item.colour} {item.kind}"))
    if found is None:
        return _NOTHING
    item, text = found
    distance = min(abs(v - line) for v in (item.x, item.y) for line in (1 / 3, 2 / 3))
    return (f"Where is the {text}?", item.place) if distance > _WHERE_MARGIN else _NOTHING


def _ask_count(rng: random.Random, scene: Scene) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    word = rng.choice(
        (
            item.kind,
            item.kind,
            item.colour,
            item.colour,
            rng.choice((*SHAPES, *DIGITS)),
            rng.choice(list(COLOURS)),
            rng.choice(("object", "shape", "digit", "small", "large")),
        )
    )
    noun = f"{word} objects" if word in COLOURS or word in SIZES else _plural(word)
    number = sum(word in (o.kind, o.colour, o.size, o.group, "object") for o in scene.objects)
    return f"How many {noun} are there?", str(number)


def _plural(noun: str) -> str:
    return noun + ("es" if noun == "cross" else "s")


def _ask_exists(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Half the answers are yes; a pair for "no" combines a colour and a kind that are both present, if possible."""
    present = {(item.colour, item.kind) for item in scene.objects}
    if rng.random() < 0.5:
        colour, kind = rng.choice(sorted(present))
        return _is_there(colour, kind), "yes"
    mixed = {(colour, kind) for colour, _ in present for _, kind in present} - present
    everything = {(colour, kind) for colour in COLOURS for kind in (*SHAPES, *DIGITS)} - present
    colour, kind = rng.choice(sorted(mixed if mixed and rng.random() < 0.8 else everything))
    return _is_there(colour, kind), "no"


def _is_there(colour: str, kind: str) -> str:
    return f"Is there {'an' if colour == 'orange' else 'a'} {colour} {kind}?"


def _ask_background(rng: random.Random, scene: Scene) -> tuple[str, str]:
    corner = rng.randrange(len(CORNERS))
    background = scene.corners[corner]
    if rng.random() < 0.5:
        return f"What pattern is the background at the {CORNERS[corner]}?", background.pattern
    return f"What colour is the background at the {CORNERS[corner]}?", background.colour


_ASK: Final[dict[str, Callable[[random.Random, Scene], tuple[str, str]]]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "size": _ask_size,
    "where": _ask_where,
    "count": _ask_count,
    "exists": _ask_exists,
    "background": _ask_background,
}
