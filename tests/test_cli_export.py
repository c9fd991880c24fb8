"""``promprune-export`` as a user meets it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from promprune.export import ExportResult, pipeline
from promprune.export.commands import export as command
from promprune.package.manifest import MANIFEST_FILE, read_manifest
from tests.support.command_line import run

VISION_ONLY = ("--vision-only", "--no-verify")  # the fastest export


@pytest.mark.parametrize(
    ("arguments", "exit_code", "wanted"),
    [
        (["--ratio", "0"], 1, "received ratio = 0; expected a fraction above 0 and at most 1"),
        (["--ratio", "1.5"], 1, "received ratio = 1.5; expected a fraction above 0 and at most 1"),
        (["--ratio", "-0.1"], 1, "received ratio = -0.1; expected"),
        (["--ratio", "nan"], 1, "received ratio = nan; expected"),
        (["--ratio", "abc"], 2, "received 'abc'; expected a fraction above 0 and at most 1"),
        (["--keep-tokens", "0"], 1, "received keep_tokens = 0; expected at least 1"),
        (["--keep-tokens", "12.5"], 2, "received '12.5'; expected a whole number"),
        (["--dtype", "int3"], 1, "received dtype = 'int3'; expected one of fp32, fp16, bf16"),
        (["--opset", "9"], 1, "received opset = 9; expected 18 to 23"),
        (["--image-grid", "24"], 1, "received --image-grid '24'; expected rows x columns of visual tokens"),
        (
            ["--image-grid", "24x24,0x8"],
            1,
            "received the image grids 24x24, 0x8; expected rows and columns of at least",
        ),
        (["--order", "random"], 1, "received order = 'random'; expected 'spatial' or 'selection'"),
        (["--policy", "none"], 1, "received policy = 'none'; expected one of promprune, saliency"),
        (["--ratio", "0.5", "--keep-tokens", "5"], 2, "received --ratio and --keep-tokens; expected one of them"),
        (["--tau", "0"], 1, "received tau = 0.0; expected a finite number above 0"),
        (["--surprise"], 2, "--surprise"),
        (["a", "b"], 2, "b"),
        (["./nowhere"], 1, "received './nowhere': there is no such folder; expected a folder in Hugging Face format"),
        (["no-such-org/no-such-model"], 1, "received 'no-such-org/no-such-model': no such folder, and the hub"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_was_expected(
    arguments: list[str], exit_code: int, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(command.main, *arguments)
    assert outcome.exit_code == exit_code
    assert len(outcome.error_lines) == 1, outcome.stderr
    assert outcome.error_lines[0].startswith("error: ")
    assert wanted in outcome.error_lines[0]
    assert outcome.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for content, wanted in (
        (None, "has no config.json"),
        ("{", "is not a model's configuration"),
        ("[]", "is not a model's configuration"),
        ('{"model_type": "bert"}', "of the family 'bert'; expected one of the families llava"),
        ('{"model_type": "llava"}', r"no *.safetensors weights; expected weights in safetensors format"),
    ):
        if content is not None:
            (model / "config.json").write_text(content)
        outcome = run(command.main, str(model), "-o", str(tmp_path / "out"))
        assert outcome.exit_code == 1
        assert len(outcome.error_lines) == 1
        assert wanted in outcome.error_lines[0]
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_tokens_than_there_are_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    outcome = run(command.main, str(tiny_llava), "--keep-tokens", "17", "-o", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert "received keep_tokens = 17; expected 1 to 16" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_at_once_and_kept(tiny_export: ExportResult) -> None:
    before = (tiny_export.output / MANIFEST_FILE).read_bytes()
    outcome = run(command.main, "-o", str(tiny_export.output))
    assert outcome.exit_code == 1
    assert "already exists" in outcome.stderr
    assert "--force" in outcome.stderr
    assert (tiny_export.output / MANIFEST_FILE).read_bytes() == before


def test_json_is_the_manifest_on_stdout_and_progress_on_stderr(tiny_llava: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcome = run(command.main, str(tiny_llava), "--ratio", "0.5", *VISION_ONLY, "--json", "-o", str(output))
    assert outcome.exit_code == 0
    (line,) = outcome.stdout.splitlines()
    printed = json.loads(line)
    assert printed.pop("output") == str(output)
    assert printed == json.loads((output / MANIFEST_FILE).read_text())
    assert printed["graphs"]["vision_encoder"]["tokens"]["keep_tokens"] == 8
    assert printed["verification"] is None
    assert "export vision_encoder" in outcome.stderr


def test_the_time_is_that_of_the_command_with_the_start_of_pytorch(
    tiny_export: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_package(*_: object, **__: object) -> ExportResult:
        return replace(tiny_export, seconds=-1.0)

    clock = iter([100.0, *[107.0] * 99])
    monkeypatch.setattr(pipeline, "export_package", export_package)
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    outcome = run(command.main, "-o", str(tmp_path / "out"))
    assert outcome.exit_code == 0
    assert "exported in 7.0 s" in outcome.stderr


def test_help_has_examples_and_says_that_the_ratio_is_kept() -> None:
    outcome = run(command.main, "--help")
    assert outcome.exit_code == 0
    assert "KEPT" in outcome.stdout
    assert "promprune-export --ratio 0.12" in outcome.stdout


COMMAND = [sys.executable, "-c", "from promprune.export.commands.export import main; main()"]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as on a full disk, rather than kills


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_half_written(tiny_llava: Path, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [*COMMAND, str(tiny_llava), *VISION_ONLY, "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit_file_size,
        check=False,
    )
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert outcome.returncode == 1, outcome.stderr
    assert len(errors) == 1
    assert "cannot be written (File too large)" in errors[0]
    assert "Traceback" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["export vision_encoder", "write tokenizer"])
def test_a_killed_export_leaves_no_package(tiny_llava: Path, tmp_path: Path, step: str) -> None:
    arguments = [str(tiny_llava), *VISION_ONLY, "-o", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if step in line:
                break
        if step == "write tokenizer":
            time.sleep(0.001)  # about when the package is moved into place
        process.kill()
    if (tmp_path / "out").exists():
        read_manifest(tmp_path / "out", check_weights=True)
    else:
        assert all(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())


@pytest.mark.usefixtures("sigint_handled")
def test_an_interrupted_export_says_so_and_leaves_nothing(tiny_llava: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_llava), "--no-verify", "-o", str(tmp_path / "out")]
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "read the checkpoint" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "error: interrupted" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
