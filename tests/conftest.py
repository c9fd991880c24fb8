"""Checkpoints and packages that many tests share; made once per run of the tests, and never changed by a test."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

# Nothing in the tests may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes whose threads wait for each other are slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from promprune.export import ExportResult
from tests.support.shared import Shared
from tests.support.skips import fail_wrong_skip
from tests.support.tiny_models import (
    save_tiny_granite_vision,
    save_tiny_llava,
    save_tiny_llava_next,
    save_tiny_llava_onevision,
    save_tiny_qwen,
    save_tiny_siglip_llava,
    tiny_language_model,
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


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """What is made once per run; with pytest-xdist, all processes share it."""
    folder = tmp_path_factory.getbasetemp()
    return Shared((folder.parent if hasattr(request.config, "workerinput") else folder) / "shared")


@pytest.fixture(scope="session")
def tiny_llava(shared: Shared) -> Path:
    """A random LLaVA of 16 visual tokens per image."""
    return shared.make("tiny-llava", save_tiny_llava)


@pytest.fixture(scope="session")
def tiny_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 4 of 16 visual tokens."""
    return shared.export("tiny", tiny_llava, ratio=0.25, split_selector=True)


@pytest.fixture(scope="session")
def tiny_full_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """The unpruned baseline of the same model."""
    return shared.export("tiny-full", tiny_llava, ratio=1.0)


@pytest.fixture(scope="session")
def tiny_linked_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """The package of ``tiny_export``, not verified, with weights that are linked from the checkpoint."""
    return shared.export("tiny-linked", tiny_llava, ratio=0.25, split_selector=True, copy_weights=False, verify=False)


@pytest.fixture(scope="session")
def tiny_fp16_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """The same model in fp16, exported and verified: 4 of 16 visual tokens."""
    return shared.export("tiny-fp16", tiny_llava, ratio=0.25, dtype="fp16")


@pytest.fixture(scope="session")
def tiny_bf16_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """The same model in bf16, exported and verified: 4 of 16 visual tokens."""
    return shared.export("tiny-bf16", tiny_llava, ratio=0.25, dtype="bf16")


@pytest.fixture(scope="session")
def tiny_siglip(shared: Shared) -> Path:
    """A random LLaVA whose vision tower is SigLIP: 16 visual tokens per image, no CLS token."""
    return shared.make("tiny-siglip", save_tiny_siglip_llava)


@pytest.fixture(scope="session")
def siglip_export(tiny_siglip: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 4 of 16 visual tokens."""
    return shared.export("siglip", tiny_siglip, ratio=0.25)


@pytest.fixture(scope="session")
def tiny_llava_next(shared: Shared) -> Path:
    """A random LLaVA-NeXT of 16 visual tokens per crop."""
    return shared.make("tiny-llava-next", save_tiny_llava_next)


@pytest.fixture(scope="session")
def next_export(tiny_llava_next: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 2 of 16 visual tokens per crop."""
    return shared.export("next", tiny_llava_next, ratio=0.12)


@pytest.fixture(scope="session")
def next_full_export(tiny_llava_next: Path, shared: Shared) -> ExportResult:
    """The unpruned baseline of the same model, not verified: its tests compare it with transformers."""
    return shared.export("next-full", tiny_llava_next, ratio=1.0, verify=False)


@pytest.fixture(scope="session")
def tiny_mistral(shared: Shared) -> Path:
    """A random LLaVA-NeXT whose language model attends to the last 24 tokens."""
    text = tiny_language_model("mistral", sliding_window=24)
    return shared.make("tiny-mistral", lambda folder: save_tiny_llava_next(folder, text=text))


@pytest.fixture(scope="session")
def mistral_export(tiny_mistral: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 2 of 16 visual tokens per crop."""
    return shared.export("mistral", tiny_mistral, ratio=0.12)


@pytest.fixture(scope="session")
def tiny_onevision(shared: Shared) -> Path:
    """A random LLaVA-OneVision of 16 visual tokens per crop."""
    return shared.make("tiny-onevision", save_tiny_llava_onevision)


@pytest.fixture(scope="session")
def onevision_export(tiny_onevision: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 2 of 16 visual tokens per crop."""
    return shared.export("onevision", tiny_onevision, ratio=0.12)


@pytest.fixture(scope="session")
def tiny_granite(shared: Shared) -> Path:
    """A random Granite Vision of 16 visual tokens per crop."""
    return shared.make("tiny-granite", save_tiny_granite_vision)


@pytest.fixture(scope="session")
def granite_export(tiny_granite: Path, shared: Shared) -> ExportResult:
    """It, exported and verified: 2 of 16 visual tokens per crop."""
    return shared.export("granite", tiny_granite, ratio=0.12)


@pytest.fixture(scope="session")
def tiny_qwen(shared: Shared) -> Path:
    """A random Qwen2.5-VL."""
    return shared.make("tiny-qwen", lambda folder: save_tiny_qwen(folder, tiny_qwen2_5_vl()))


@pytest.fixture(scope="session")
def tiny_qwen_export(tiny_qwen: Path, shared: Shared) -> ExportResult:
    """It, exported and verified for images of 6 x 6 and of 4 x 7 tokens; the default ratio."""
    return shared.export("tiny-qwen-pruned", tiny_qwen, image_grids=((6, 6), (4, 7)))


@pytest.fixture(scope="session")
def tiny_qwen2(shared: Shared) -> Path:
    """A random Qwen2-VL."""
    return shared.make("tiny-qwen2", lambda folder: save_tiny_qwen(folder, tiny_qwen2_vl()))


@pytest.fixture(scope="session")
def tiny_qwen2_export(tiny_qwen2: Path, shared: Shared) -> ExportResult:
    """It, exported and verified for images of 4 x 6 tokens; the default ratio."""
    return shared.export("tiny-qwen2-pruned", tiny_qwen2, image_grids=((4, 6),))


@pytest.fixture(scope="session")
def embedded_export(shared: Shared) -> ExportResult:
    """The embedded model at the default ratio, exported and verified."""
    return shared.export("embedded")
