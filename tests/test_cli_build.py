"""``promprune-build`` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from promprune.export.commands.build import main
from promprune.package.engines import EngineConfig, read_engines
from tests.support.command_line import run
from tests.support.fake_package import write_fake_package

RTX = "TensorRT for RTX is not installed (Linux x86-64 only)"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    write_fake_package(tmp_path / "package")
    return tmp_path / "package"


def test_engines_are_built_reported_and_then_left_alone(fake: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=RTX)
    first = run(
        main, str(fake), "--target", "sm89,sm120", "--max-prompt-tokens", "32", "--max-batch", "2", "--decode-profile"
    )
    assert first.exit_code == 0, first.stderr
    assert [line.split(", ")[1] for line in first.stdout.splitlines()] == ["sm89", "sm120"]
    assert first.stdout.count("built in") == 2
    for word in ("vision_encoder", "prefill, decode", "done  sm89 decoder_model_merged"):
        assert word in first.stderr
    options = read_engines(fake / "engines" / "tensorrt-rtx-sm120").identity.options
    assert (options.max_prompt_tokens, options.max_batch) == (32, 2)
    again = run(
        main, str(fake), "--target", "sm89", "--max-prompt-tokens", "32", "--max-batch", "2", "--decode-profile"
    )
    assert again.exit_code == 0
    assert again.stdout.endswith("sm89, up to date\n")


def test_stale_engines_are_refused_and_rebuilt_on_request(fake: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=RTX)
    assert run(main, str(fake), "--target", "sm89").exit_code == 0
    refused = run(main, str(fake), "--target", "sm89", "--workspace-mib", "512")
    assert refused.exit_code == 1
    assert "stale (built with workspace_mib = unlimited, not 512)" in refused.error_lines[-1]
    assert refused.error_lines[-1].endswith("add --rebuild to replace them")
    assert run(main, str(fake), "--target", "sm89", "--workspace-mib", "512", "--rebuild").exit_code == 0


def test_json_is_one_line_on_stdout(fake: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=RTX)
    outcome = run(main, str(fake), "--target", "sm89", "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.count("\n") == 1
    (engines,) = json.loads(outcome.stdout)["engines"]
    assert engines["built"] is True
    assert engines["identity"]["target"] == "sm89"
    assert engines["engines"]["embed_tokens"]["size_bytes"] > 0


def test_a_target_it_does_not_know_is_answered_with_those_it_knows(fake: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=RTX)
    outcome = run(main, str(fake), "--target", "sm42")
    assert outcome.exit_code == 1
    assert "does not know; expected one of sm75, " in outcome.error_lines[-1]


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    outcome = run(main, str(tmp_path), "--target", "sm89")
    assert outcome.exit_code == 1
    assert "is not an exported package" in outcome.error_lines[-1]
    assert not (tmp_path / "engines").exists()


def test_a_backend_that_is_not_installed_is_answered_with_the_command(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    outcome = run(main, str(fake), "--backend", "tensorrt")
    assert outcome.exit_code == 1
    assert "pip install" in outcome.error_lines[-1]
    assert "promprune[tensorrt]" in outcome.error_lines[-1]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--target", ""], 1, "received no target"),
        (["--target", "rtx4090"], 1, "received target 'rtx4090'; expected a compute capability such as sm89"),
        (["--backend", "abacus"], 1, "received backend = 'abacus'; expected one of "),
        (["--max-batch", "0"], 1, "received max_batch = 0; expected at least 1"),
        (["--max-batch", "many"], 2, "received 'many'; expected a whole number"),
        (["--workspace-mib", "1.5"], 2, "expected a whole number of MiB"),
        (["--fp16"], 2, "No such option"),
        ([], 2, "Missing argument"),
    ],
)
def test_mistakes_are_one_line(fake: Path, arguments: list[str], exit_code: int, message: str) -> None:
    if "rtx4090" in arguments:
        pytest.importorskip("tensorrt_rtx", reason=RTX)
    package = [str(fake)] if arguments else []
    outcome = run(main, *package, *arguments)
    assert outcome.exit_code == exit_code
    assert len(outcome.error_lines) == 1
    assert message in outcome.error_lines[0]


def test_help_shows_the_defaults_of_the_settings() -> None:
    outcome = run(main, "--help")
    assert outcome.exit_code == 0
    defaults = EngineConfig()
    for word in (f"[default: {defaults.backend}]", f"[default: {defaults.max_prompt_tokens}]", "promprune-build llava"):
        assert word in outcome.stdout
