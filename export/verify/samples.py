"""The images and questions that packages are verified and compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from promprune.embedded import scenes

__all__ = ["Sample", "check_samples"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with one question."""

    image: Image.Image
    question: str


def check_samples(count: int, *, sizes: Sequence[tuple[int, int]]) -> list[Sample]:
    """Render the images that a package is verified with: scenes of shapes and digits that were not used in training.

    Args:
        count: number of images.
        sizes: (height, width) of the images in pixels, used in turn; scenes are rendered square and then stretched.
    """
    samples = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        scene = scenes.render_scene(scenes.TEST_SEEDS[index], image_size=max(height, width))
        question = scenes.questions(scene, per_type=1, seed=index)[index % 2].text
        image = scene.image if height == width else scene.image.resize((width, height))
        samples.append(Sample(image=image, question=question))
    return samples
