"""Untrusted packages: whatever happens in their process, the caller gets a typed error and serves the next request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promprune.errors import (
    BackendError,
    ConfigError,
    DeadlineError,
    ImageError,
    PackageError,
    PromptError,
    WorkerError,
)
from promprune.runtime import ImageEncoder, RuntimeConfig, VisionLanguagePipeline
from promprune.runtime.untrusted import Failure, UntrustedPipeline
from tests.support.endless import write_endless_package, write_large_package
from tests.support.fake_package import TEMPLATE, rewrite_manifest, write_fake_package
from tests.support.meter import memory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of this kind")

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def load(folder: Path, **options: object) -> UntrustedPipeline:
    pipeline = VisionLanguagePipeline.from_package(folder, untrusted=True, num_threads=1, **options)
    assert isinstance(pipeline, UntrustedPipeline)
    return pipeline


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_fake_package(tmp_path / "package")
    return tmp_path / "package"


def test_answers_errors_and_streams_are_those_of_the_pipeline(package: Path) -> None:
    with VisionLanguagePipeline.from_package(package, provider="cpu") as trusted, load(package) as pipeline:
        assert pipeline.manifest == trusted.manifest
        for images, prompt in ((PICTURE, "What?"), ((), "abc"), ([PICTURE, PICTURE], "Two?")):
            expected = trusted.generate(images, prompt, max_new_tokens=6)
            found = pipeline.generate(images, prompt, max_new_tokens=6)
            assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
            assert found.finish_reason == expected.finish_reason
            assert [s.to_dict() for s in found.selection] == [s.to_dict() for s in expected.selection]
            stream = pipeline.stream(images, prompt, max_new_tokens=6)
            assert "".join(stream) == stream.result.text == expected.text
        batch = pipeline.generate_batch([(PICTURE, "a"), ((), "b")], max_new_tokens=3)
        assert [len(result.token_ids) for result in batch] == [3, 3]
        with pytest.raises(ImageError, match="not an image"):
            pipeline.generate(b"no picture", "What?")
        with pytest.raises(PromptError, match="stands for an image"):
            pipeline.generate((), "<image>")
        with pytest.raises(ConfigError, match="an option named"):
            pipeline.generate((), "a", other=1)
        assert pipeline.generate((), "abc", max_new_tokens=1).timings.new_tokens == 1
    with pytest.raises(BackendError, match="closed"):
        pipeline.generate((), "abc")


def test_a_damaged_package_is_refused_as_ever(package: Path) -> None:
    (package / "config.json").write_text("{} ")
    with pytest.raises(PackageError, match=r"config\.json"):
        load(package)


def test_a_graph_without_an_end(tmp_path: Path) -> None:
    write_endless_package(tmp_path / "package")
    with load(tmp_path / "package", worker_timeout_s=60.0) as pipeline:
        with pytest.raises(DeadlineError):
            pipeline.generate(PICTURE, "What?", timeout_s=0.5)
        started = time.monotonic()
        with pytest.raises((DeadlineError, WorkerError)):
            pipeline.generate(PICTURE, "What?", timeout_s=0.5)
        assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_graph_that_needs_more_memory_than_it_may(tmp_path: Path) -> None:
    write_large_package(tmp_path / "package", side=40_000)  # 6.4 GB
    begin = memory("VmRSS")
    refused = 0
    for _ in range(2):
        try:
            with load(tmp_path / "package") as pipeline:
                pipeline.generate(PICTURE, "What?", max_new_tokens=1)
        except BackendError:  # when it is loaded, or when it runs
            refused += 1
    assert refused == 2
    assert memory("VmRSS") - begin < 100 * 2**20


def test_a_process_that_dies_or_hangs_is_replaced(package: Path) -> None:
    with load(package) as pipeline:
        expected = pipeline.generate(PICTURE, "What?", max_new_tokens=3).token_ids
        for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV):
            os.kill(pipeline._idle[0]._process.pid, number)
            pipeline._idle[0]._process.wait()
            assert pipeline.generate(PICTURE, "What?", max_new_tokens=3).token_ids == expected
        os.kill(pipeline._idle[0]._process.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match=r"did not answer within 1\.2 s"):
            pipeline.generate(PICTURE, "What?", max_new_tokens=3, timeout_s=0.2)
        assert pipeline.generate(PICTURE, "What?", max_new_tokens=3).token_ids == expected


def test_a_process_that_runs_out_of_memory_is_a_typed_error(package: Path) -> None:
    with pytest.raises(WorkerError):
        load(package, worker_memory_mb=100)
    with load(package) as pipeline, pytest.raises((WorkerError, PromptError)):
        pipeline.generate((), [{"role": "user", "content": "x" * 60_000_000}])


def test_a_template_that_eats_memory(package: Path) -> None:
    (package / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}" + TEMPLATE)
    rewrite_manifest(package, read_manifest_unchecked(package))
    with load(package) as pipeline:
        for _ in range(2):
            with pytest.raises(PromptError, match="texts of more than"):
                pipeline.generate(PICTURE, "What?")


def test_an_open_stream_does_not_block_others(package: Path) -> None:
    with load(package) as pipeline:
        stream = pipeline.stream(PICTURE, "What?", max_new_tokens=50, ignore_eos=True)
        next(stream)
        assert pipeline.generate(PICTURE, "What?", max_new_tokens=2).timings.new_tokens == 2
        stream.close()
        with pytest.raises(BackendError, match="not finished"):
            _ = stream.result


def test_only_errors_of_promprune_are_restored() -> None:
    assert isinstance(Failure("ImageError", "x").restore(), ImageError)
    for kind in ("SystemExit", "os", "one_line", "__all__", ""):
        assert isinstance(Failure(kind, "x").restore(), WorkerError)


@pytest.mark.parametrize("options", [{"provider": "cuda"}, {"backend": "tensorrt"}])
def test_only_the_cpu_is_limited(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="on the CPU"):
        RuntimeConfig(untrusted=True, **options)


def read_manifest_unchecked(folder: Path) -> object:
    import msgspec

    from promprune.package.manifest import Manifest

    return msgspec.convert(json.loads((folder / "promprune.json").read_text()), Manifest)


def test_only_a_pipeline_can_be_untrusted(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"VisionLanguagePipeline\.from_package"):
        ImageEncoder.from_package(package, untrusted=True)


def test_the_command_answers_from_an_untrusted_package(package: Path, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    command = [
        sys.executable,
        "-m",
        "promprune.runtime.commands.run",
        str(package),
        "-i",
        str(tmp_path / "picture.png"),
    ]
    command += ["-p", "What?", "--max-new-tokens", "4", "--json"]
    answers = []
    for options in ([], ["--untrusted"]):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout)["token_ids"])
    assert answers[0] == answers[1]
