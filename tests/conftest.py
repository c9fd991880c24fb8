"""Checkpoints and packages that many tests share; made once per run, and never changed by a test."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Nothing in the tests may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from tests.support.skips import fail_wrong_skip
from tests.support.tiny_models import (
    save_tiny_llava,
    save_tiny_llava_next,
    save_tiny_qwen,
    save_tiny_siglip_llava,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes minutes, and say so, unless the command line chooses tests by their markers."""
    if config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_wrong_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_wrong_skip(report)
    return report


@pytest.fixture
def sigint_handled() -> Iterator[None]:
    """Handle SIGINT as at a terminal, also in child processes, if the suite was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def exported(folders: pytest.TempPathFactory, name: str, **options: Any) -> ExportResult:
    return export_package(ExportConfig(output=folders.mktemp("packages") / name, **options))


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 16 visual tokens per image."""
    return save_tiny_llava(tmp_path_factory.mktemp("checkpoints") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_export(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """It, exported and verified: 4 of 16 visual tokens."""
    return exported(tmp_path_factory, "tiny", model=str(tiny_llava), ratio=0.25, split_selector=True)


@pytest.fixture(scope="session")
def tiny_full_export(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The unpruned baseline of the same model."""
    return exported(tmp_path_factory, "tiny-full", model=str(tiny_llava), ratio=1.0)


@pytest.fixture(scope="session")
def tiny_fp16_export(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The same model in fp16, exported and verified: 4 of 16 visual tokens."""
    return exported(tmp_path_factory, "tiny-fp16", model=str(tiny_llava), ratio=0.25, dtype="fp16")


@pytest.fixture(scope="session")
def tiny_bf16_export(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The same model in bf16, exported and verified: 4 of 16 visual tokens."""
    return exported(tmp_path_factory, "tiny-bf16", model=str(tiny_llava), ratio=0.25, dtype="bf16")


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA whose vision tower is SigLIP: 16 visual tokens per image, no CLS token."""
    return save_tiny_siglip_llava(tmp_path_factory.mktemp("checkpoints") / "tiny-siglip")


@pytest.fixture(scope="session")
def siglip_export(tiny_siglip: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """It, exported and verified: 4 of 16 visual tokens."""
    return exported(tmp_path_factory, "siglip", model=str(tiny_siglip), ratio=0.25)


@pytest.fixture(scope="session")
def tiny_llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-NeXT of 16 visual tokens per crop."""
    return save_tiny_llava_next(tmp_path_factory.mktemp("checkpoints") / "tiny-llava-next")


@pytest.fixture(scope="session")
def next_export(tiny_llava_next: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """It, exported and verified: 2 of 16 visual tokens per crop."""
    return exported(tmp_path_factory, "next", model=str(tiny_llava_next), ratio=0.12)


@pytest.fixture(scope="session")
def next_full_export(tiny_llava_next: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The unpruned baseline of the same model."""
    return exported(tmp_path_factory, "next-full", model=str(tiny_llava_next), ratio=1.0)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL."""
    return save_tiny_qwen(tmp_path_factory.mktemp("checkpoints") / "tiny-qwen", tiny_qwen2_5_vl())


@pytest.fixture(scope="session")
def tiny_qwen_export(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """It, exported and verified for images of 6 x 6 and of 4 x 7 tokens; the default ratio."""
    return exported(tmp_path_factory, "tiny-qwen", model=str(tiny_qwen), image_grids=((6, 6), (4, 7)))


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL."""
    return save_tiny_qwen(tmp_path_factory.mktemp("checkpoints") / "tiny-qwen2", tiny_qwen2_vl())


@pytest.fixture(scope="session")
def tiny_qwen2_export(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """It, exported and verified for images of 4 x 6 tokens; the default ratio."""
    return exported(tmp_path_factory, "tiny-qwen2", model=str(tiny_qwen2), image_grids=((4, 6),))


@pytest.fixture(scope="session")
def embedded_export(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The embedded model at the default ratio, exported and verified."""
    return exported(tmp_path_factory, "embedded")
