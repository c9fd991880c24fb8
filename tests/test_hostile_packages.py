"""Packages whose files are pipes, devices or links: one clear line, at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from promprune.errors import PackageError
from promprune.inputs import open_file, read_file
from promprune.package.engines import read_engines
from promprune.package.manifest import MANIFEST_FILE, read_manifest
from promprune.runtime import VisionLanguagePipeline
from tests.support.fake_package import write_fake_package

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="named pipes and devices are files of Unix")

FILES = (
    MANIFEST_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
    "config.json",
    "onnx/embed_tokens.onnx",
    "engines/onnxruntime-cpu/lowered.json",
    "engines/tensorrt-sm89/engine.json",
    "onnx/not-listed.onnx_data",
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_fake_package(tmp_path / "package")
    return tmp_path / "package"


def load(package: Path) -> None:
    with VisionLanguagePipeline.from_package(package, provider="cpu", num_threads=1) as pipeline:
        pipeline.generate((), "What?", max_new_tokens=1)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/random", "outside", "nowhere", "itself"])
@pytest.mark.parametrize("file", FILES)
def test_anything_but_a_regular_file_is_refused(package: Path, file: str, kind: str) -> None:
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    outside = package.parent / "outside"
    if path.exists():
        shutil.move(path, outside)
    else:
        outside.write_text("{}")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"outside": outside, "nowhere": package / "nowhere", "itself": path}.get(kind, Path(kind)))
    started = time.process_time()
    if (file, kind) == (MANIFEST_FILE, "nowhere"):
        expected = "is not an exported package"
    else:
        expected = r"regular file|out of it|inside the package|cannot be read|Too many levels"
    with pytest.raises(PackageError, match=expected) as caught:
        load(package)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 2


def test_links_inside_a_package_and_to_the_blobs_of_a_hub_cache_are_followed(package: Path) -> None:
    cache = package.parent / "models--a--b"
    snapshot = cache / "snapshots" / "abc"
    shutil.copytree(package, snapshot)
    (cache / "blobs").mkdir()
    for number, name in enumerate([MANIFEST_FILE, "tokenizer.json", "onnx/embed_tokens.onnx"]):
        blob = cache / "blobs" / f"{number:064x}"
        shutil.move(snapshot / name, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (snapshot / "config.json").rename(snapshot / "other.json")
    (snapshot / "config.json").symlink_to("other.json")
    load(snapshot)
    (cache / "secret").write_text("x")
    (snapshot / "link").symlink_to("../../secret")
    with pytest.raises(PackageError, match="is a link that leads out of it"):
        read_manifest(snapshot)


def test_weights_that_are_hard_links_are_read(package: Path) -> None:
    os.link(package / "onnx/embed_tokens.onnx", package.parent / "checkpoint")
    load(package)


def test_a_manifest_is_not_read_beyond_its_limit(package: Path) -> None:
    path = package / MANIFEST_FILE
    with path.open("r+b") as stream:
        stream.truncate(10**12)  # sparse: takes no space
    with pytest.raises(PackageError, match="1000000000000 bytes, more than"):
        read_manifest(package)


def test_a_large_file_that_is_no_weight_is_not_hashed(package: Path) -> None:
    with (package / "extra.json").open("wb") as stream:
        stream.truncate(10**12)
    manifest = json.loads((package / MANIFEST_FILE).read_text())
    manifest["files"].append({"path": "extra.json", "size_bytes": 10**12, "sha256": "0" * 64})
    (package / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"extra\.json in .* has 1000000000000 bytes; expected at most"):
        read_manifest(package)


def test_engines_are_read_like_packages(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "engine.json")
    with pytest.raises(PackageError, match="not a regular file"):
        read_engines(tmp_path)


def test_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_file(path, most_bytes=3) == b"abc"
    with pytest.raises(OSError, match="3 bytes, more than 2"):
        read_file(path, most_bytes=2)
    with pytest.raises(OSError, match="not a regular file"), open_file(tmp_path):
        pass
