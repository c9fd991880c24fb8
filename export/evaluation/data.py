"""Questions about images, with their right answers: the embedded data set, or the user's folder.

A folder contains images and one ``*.jsonl`` file with a question per line::

    {"image": "kitchen.jpg", "question": "What is on the table?", "answers": ["bread", "a loaf"], "type": "what"}

``image`` is relative to the folder; ``answers`` may be a single text; ``type`` is optional and groups the results.
"""

from __future__ import annotations

import importlib.resources
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from PIL import Image

from promprune.embedded import scenes
from promprune.errors import ConfigError
from promprune.export.evaluation.config import EMBEDDED_DATA
from promprune.runtime import load_image

__all__ = ["EMBEDDED_DATA", "Picture", "Question", "is_right", "load_data", "normalise"]

_QUESTIONS_FILE: Final = "questions.jsonl"
SPARSE_AND_DENSE: Final = "1-5 or 11-16 objects"
_ANY_TYPE: Final = "question"


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        text: as a user would ask it.
        answers: the right answers; each of them is accepted.
        type: its group in the results.
    """

    text: str
    answers: tuple[str, ...]
    type: str


@dataclass(frozen=True)
class Picture:
    """An image and the questions about it.

    Attributes:
        name: file name, or the seed of a rendered scene.
        load: returns the image; called whenever the image is needed.
        questions: at least one.
        groups: further groups of the results that it belongs to, such as the number of objects.
        scene: the objects in the image; None if they are not known.
    """

    name: str
    load: Callable[[], Image.Image]
    questions: tuple[Question, ...]
    groups: tuple[str, ...] = ()
    scene: Callable[[], scenes.Scene] | None = None


class _Line(msgspec.Struct, frozen=True):
    """One line of a JSONL file."""

    image: str
    question: str
    answers: tuple[str, ...] | str
    type: str = _ANY_TYPE


class _SceneLine(msgspec.Struct, frozen=True):
    """One line of the embedded data set: the seed of a scene, and (type, question, answer) triples."""

    seed: int
    objects: int
    questions: tuple[tuple[str, str, str], ...]


def load_data(name: str, *, limit: int | None = None, image_size: int = 224) -> list[Picture]:
    """Read a data set.

    Args:
        name: ``"embedded"``, or a folder with images and one ``*.jsonl`` file, or that file.
        limit: read only the first images, at most this many; None for all.
        image_size: side of the rendered scenes of the embedded set, in pixels.

    Raises:
        ConfigError: there is no such folder, it has no questions, or a line is invalid.
    """
    pictures = embedded_pictures(image_size) if name == EMBEDDED_DATA else _folder_pictures(Path(name))
    return pictures[:limit]


def embedded_pictures(image_size: int) -> list[Picture]:
    """The evaluation set of the embedded model: 260 scenes of the test split, 2,004 questions."""
    lines = (importlib.resources.files("promprune.embedded") / _QUESTIONS_FILE).read_text(encoding="utf-8").splitlines()
    pictures = []
    for line in lines:
        entry = msgspec.json.decode(line, type=_SceneLine)
        scene = partial(scenes.render_scene, entry.seed, image_size=image_size)
        asked = tuple(Question(text, (answer,), kind) for kind, text, answer in entry.questions)
        pictures.append(Picture(str(entry.seed), partial(_image_of, scene), asked, _crowds(entry.objects), scene))
    return pictures


def _crowds(objects: int) -> tuple[str, ...]:
    if objects <= 5:
        return "1-5 objects", SPARSE_AND_DENSE
    return ("6-10 objects",) if objects <= 10 else ("11-16 objects", SPARSE_AND_DENSE)


def _image_of(scene: Callable[[], scenes.Scene]) -> Image.Image:
    return scene().image


def _folder_pictures(path: Path) -> list[Picture]:
    file = path if path.is_file() else _only_jsonl(path)
    asked: dict[str, list[Question]] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"line {number} of {file} cannot be read ({error})",
                expected='{"image": FILE, "question": TEXT, "answers": [TEXT, ...]}',
            ) from error
        answers = (line.answers,) if isinstance(line.answers, str) else line.answers
        if not answers or not (file.parent / line.image).is_file():
            raise ConfigError(
                f"line {number} of {file} names " + (f"{line.image}, which is not there" if answers else "no answer"),
                expected="an image file in the same folder, and at least one answer",
            )
        asked.setdefault(line.image, []).append(Question(line.question, answers, line.type))
    if not asked:
        raise ConfigError(f"{file} contains no question", expected="at least one line")
    return [
        Picture(name, partial(load_image, file.parent / name), tuple(questions)) for name, questions in asked.items()
    ]


def _only_jsonl(folder: Path) -> Path:
    found = sorted(folder.glob("*.jsonl"))
    if len(found) != 1:
        raise ConfigError(
            f"received {str(folder)!r}, which contains {len(found)} *.jsonl files",
            expected=f"{EMBEDDED_DATA!r}, or a folder with images and one *.jsonl file, or that file",
        )
    return found[0]


_NUMBER_WORDS: Final = {
    word: str(i)
    for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}


def normalise(text: str) -> str:
    """Normalise an answer for comparison: lower case, no articles, outer punctuation or double spaces; 0 for zero."""
    words = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip(" .,;:!?\"'").lower().split(" ")
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def is_right(answer: str, question: Question) -> bool:
    """Return whether an answer equals one of the right ones after `normalise`."""
    return normalise(answer) in {normalise(right) for right in question.answers}
