"""Damaged and hostile packages and images give a typed one-line error or an answer, and never another failure."""

from __future__ import annotations

import io
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promprune.errors import PrompruneError
from promprune.runtime import VisionLanguagePipeline, load_image
from tests.support.fake_package import write_fake_package

VALUES = [
    None,
    True,
    0,
    -1,
    1,
    5,
    2**63,
    1e308,
    0.5,
    "",
    "x",
    "../../secret",
    "/etc/passwd",
    "float16",
    [],
    {},
    [1],
    "ü\n\0",
]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_fake_package(tmp_path / "package")
    return tmp_path / "package"


def paths_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    yield path
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in children:
        yield from paths_of(value, (*path, key))


def mutated(content: Any, chance: random.Random) -> Any:
    """Change one place of a JSON document: replace, remove, add, or copy from elsewhere."""
    content = json.loads(json.dumps(content))
    places = list(paths_of(content))
    *parents, key = chance.choice(places[1:])
    holder = content
    for parent in parents:
        holder = holder[parent]
    kind = chance.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(["extra", "file", "path", "shape"])] = chance.choice(VALUES)
    elif kind == 2:
        source: Any = content
        for part in chance.choice(places[:1]) or ():
            source = source[part]
        holder[key] = json.loads(json.dumps(list(source)[:1]))
    else:
        holder[key] = chance.choice(VALUES)
    return content


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Change, cut or double some bytes."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    if chance.random() < 0.3:
        damaged = damaged[: chance.randrange(len(damaged))]
    return bytes(damaged)


def outcome(action: Callable[[], Any]) -> str:
    """Run a function; an error must be one of promprune's, and one line."""
    try:
        action()
    except PrompruneError as error:
        return type(error).__name__ if "\n" not in str(error) else f"several lines: {error}"
    return "done"


def answer(package: Path) -> Any:
    with VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1) as pipeline:
        return pipeline.generate(PICTURE, "What?", max_new_tokens=2)


def files_around(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fuzz_manifests(package: Path, count: int) -> set[str]:
    path = package / "promprune.json"
    original = path.read_bytes()
    chance = random.Random(0)
    before = files_around(package.parent)
    seen = set()
    for number in range(count):
        if number % 3:
            document = mutated(json.loads(original), chance)
            for _ in range(chance.randrange(3)):
                document = mutated(document, chance) if isinstance(document, dict) and document else document
            path.write_text(json.dumps(document))
        else:
            path.write_bytes(flipped(original, chance))
        seen.add(outcome(lambda: answer(package)))
    assert files_around(package.parent) == before
    return seen


def assert_only_typed(seen: set[str]) -> None:
    assert {"PackageError", "done"} <= seen <= {"PackageError", "BackendError", "PromptError", "done"}


def fuzz_images(count: int) -> set[str]:
    chance = random.Random(0)
    encoded = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "JPEG2000"):
        stream = io.BytesIO()
        Image.fromarray(PICTURE).save(stream, format=kind)
        encoded.append(stream.getvalue())
    return {outcome(lambda: load_image(flipped(chance.choice(encoded), chance))) for _ in range(count)}


def test_damaged_manifests(package: Path) -> None:
    assert_only_typed(fuzz_manifests(package, 200))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images() -> None:
    assert fuzz_images(300) == {"ImageError", "done"}


@pytest.mark.slow
def test_ten_thousand_damaged_manifests(package: Path) -> None:
    assert_only_typed(fuzz_manifests(package, 10_000))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_thousand_damaged_images() -> None:
    assert fuzz_images(2_000) == {"ImageError", "done"}


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json")


@pytest.mark.parametrize("name", [*TEXT_FILES, "chat_template.jinja"])
def test_damaged_text_files_with_a_manifest_that_agrees(package: Path, name: str) -> None:
    from promprune.package.manifest import read_manifest
    from tests.support.fake_package import rewrite_manifest

    manifest = read_manifest(package)
    original = (package / name).read_bytes()
    chance = random.Random(1)
    for number in range(40):
        if name.endswith(".json") and number % 2:
            (package / name).write_text(json.dumps(mutated(json.loads(original), chance)))
        else:
            (package / name).write_bytes(flipped(original, chance))
        rewrite_manifest(package, manifest)
        assert outcome(lambda: answer(package)).isidentifier()


@pytest.mark.parametrize("name", ["onnx/decoder_model_merged.onnx", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_is_refused(package: Path, name: str) -> None:
    path = package / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert outcome(lambda: answer(package)) == "PackageError"


@pytest.mark.parametrize("name", ["promprune.json", "onnx/embed_tokens.onnx", "tokenizer.json", "config.json"])
def test_a_missing_file_is_refused(package: Path, name: str) -> None:
    (package / name).unlink()
    assert outcome(lambda: answer(package)) == "PackageError"


def test_files_that_vanish_after_loading_are_not_missed(package: Path) -> None:
    """Everything is read when a package is loaded."""
    with VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1) as pipeline:
        shutil.rmtree(package)
        assert outcome(lambda: pipeline.generate(PICTURE, "What?", max_new_tokens=2)) == "done"


def test_a_pipeline_survives_what_it_refuses(package: Path) -> None:
    with VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1) as pipeline:
        expected = pipeline.generate(PICTURE, "What?", max_new_tokens=5).token_ids
        for images, prompt in ((b"no image", "x"), (PICTURE, "<image>"), (PICTURE, "x" * 999), (PICTURE, [])):
            assert outcome(lambda images=images, prompt=prompt: pipeline.generate(images, prompt)) != "done"
            assert pipeline.generate(PICTURE, "What?", max_new_tokens=5).token_ids == expected


def test_closing_while_others_run_is_typed(package: Path) -> None:
    pipeline = VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1)
    seen: list[str] = []

    def work() -> None:
        while not seen or seen[-1] == "done":
            seen.append(outcome(lambda: pipeline.generate(PICTURE, "What?", max_new_tokens=3)))

    thread = threading.Thread(target=work)
    thread.start()
    while len(seen) < 3:
        pass
    pipeline.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert seen[-1] == "BackendError"
