"""Packages in a foreign client: transformers.js under Node gives the same answers as our runtime.

The processors of transformers, which count placeholders in the same way, are tested here too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image
from transformers import AutoProcessor

from promprune.embedded import scenes
from promprune.export import ExportResult, export_package
from promprune.export.checkpoint.weights import torch_dtype
from promprune.export.config import ExportConfig
from promprune.runtime import VisionLanguagePipeline
from tests.support.tiny_models import save_tiny_llava

CLIENT = Path(__file__).parents[1] / "scripts/transformers_js"
MAX_NEW_TOKENS = 16

needs_client = pytest.mark.skipif(
    shutil.which("node") is None or not (CLIENT / "node_modules/@huggingface/transformers").is_dir(),
    reason=f"needs Node.js, and npm ci in {CLIENT.relative_to(CLIENT.parents[1])}",
)


def transformers_js(package: Path, image: Path, questions: list[str]) -> list[dict[str, Any]]:
    """Answer with transformers.js."""
    command = ["node", str(CLIENT / "answer.mjs"), str(package), str(image), *questions]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def our_answers(package: Path, image: Path, questions: list[str]) -> list[list[int]]:
    with VisionLanguagePipeline.from_package(package, provider="cpu") as pipeline:
        return [
            list(pipeline.generate([image], question, max_new_tokens=MAX_NEW_TOKENS).token_ids)
            for question in questions
        ]


@needs_client
@pytest.mark.parametrize("seed", range(3))
def test_the_embedded_model_answers_alike(embedded_export: ExportResult, tmp_path: Path, seed: int) -> None:
    scene = scenes.render_scene(scenes.TEST_SEEDS[seed], image_size=224)
    image = tmp_path / "scene.png"
    scene.image.save(image)
    questions = [question.text for question in scenes.questions(scene, per_type=1, seed=seed)]
    theirs = transformers_js(embedded_export.output, image, questions)
    assert [answer["token_ids"] for answer in theirs] == our_answers(embedded_export.output, image, questions)
    assert len({answer["text"] for answer in theirs}) > 2
    assert {answer["placeholders"] for answer in theirs} == {embedded_export.manifest.tokens_of().keep_tokens}


@needs_client
@pytest.mark.parametrize("package", ["tiny_export", "tiny_fp16_export"])
def test_a_random_llava_answers_alike(package: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    check_answers(request.getfixturevalue(package).output, tmp_path)


@needs_client
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_random_llava_with_linked_weights_answers_alike(tmp_path: Path, dtype: Any) -> None:
    """All tokens are kept; the weights can be linked because the checkpoint has the package's dtype."""
    checkpoint = save_tiny_llava(tmp_path / "tiny-llava", dtype=torch_dtype(dtype))
    output = tmp_path / "package"
    export_package(
        ExportConfig(model=str(checkpoint), ratio=1.0, dtype=dtype, output=output, copy_weights=False, verify=False)
    )
    check_answers(output, tmp_path)


def check_answers(package: Path, scratch: Path) -> None:
    image = scratch / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(image)
    questions = ["What is this?", "héllo 世界"]
    theirs = transformers_js(package, image, questions)
    assert [answer["token_ids"] for answer in theirs] == our_answers(package, image, questions)


def test_the_processor_of_transformers_writes_as_many_placeholders_as_tokens_are_kept(
    tiny_export: ExportResult, tiny_full_export: ExportResult
) -> None:
    with Image.open(Path(skimage.__file__).parent / "data/coffee.png") as image:
        for result in (tiny_export, tiny_full_export):
            processor = AutoProcessor.from_pretrained(result.output)
            inputs = processor(images=image, text="<image>\nWhat is this?", return_tensors="np")
            placeholders = (inputs["input_ids"] == result.manifest.image.token_id).sum()
            assert placeholders == result.manifest.tokens_of().keep_tokens
