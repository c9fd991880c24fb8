"""``promprune-verify``: a package is compared again, later and elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import onnx
import pytest

from promprune.export import ExportResult
from promprune.export.commands import verify as command
from promprune.package.manifest import MANIFEST_FILE, Manifest, file_records, write_manifest
from tests.support.command_line import run
from tests.support.tiny_models import save_tiny_llava


def test_a_good_package_passes(tiny_export: ExportResult, tiny_llava: Path) -> None:
    outcome = run(command.main, str(tiny_export.output), "--model", str(tiny_llava), "--images", "3", "--json")
    printed = json.loads(outcome.stdout)
    assert outcome.exit_code == 0
    assert printed["passed"]
    answers = next(check for check in printed["checks"] if check["name"].startswith("greedy answers"))
    assert answers["detail"] == "3 of 3"


def test_a_package_whose_selection_was_tampered_with_fails(
    tiny_export: ExportResult, tiny_llava: Path, tmp_path: Path
) -> None:
    """Coverage picks the worst token; every file's digest is put right, so that only the values can tell."""
    package = Path(shutil.copytree(tiny_export.output, tmp_path / "package"))
    path = package / "onnx/vision_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    steps = [node for loop in loops for attribute in loop.attribute for node in attribute.g.node]
    for node in steps:
        for attribute in node.attribute:
            if node.op_type == "TopK" and attribute.name == "largest":
                attribute.i = 1 - attribute.i
    path.write_bytes(model.SerializeToString())
    write_manifest(package, msgspec.structs.replace(read_manifest_unchecked(package), files=file_records(package)))
    outcome = run(command.main, str(package), "--model", str(tiny_llava), "--images", "4")
    assert outcome.exit_code == 1
    assert "FAILED" in outcome.stdout
    assert outcome.stderr.count("FAILED") >= 1


def read_manifest_unchecked(package: Path) -> Manifest:
    return msgspec.json.decode((package / MANIFEST_FILE).read_bytes(), type=Manifest)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "wanted"),
    [
        (["--images", "0"], 1, "received images = 0; expected 1 to 10000"),
        (["--images", "many"], 2, "received 'many'; expected a whole number"),
        (["--model", "./nowhere"], 1, "received './nowhere': there is no such folder"),
    ],
)
def test_mistakes(tiny_export: ExportResult, arguments: list[str], exit_code: int, wanted: str) -> None:
    outcome = run(command.main, str(tiny_export.output), *arguments)
    assert outcome.exit_code == exit_code
    assert wanted in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--tolerance", "0"], "received --tolerance without --against or --reference; expected one of those two"),
        (["--backend", "onnxruntime"], "received --backend without --against or --reference"),
        (["--against", "onnxruntime", "--images", "3"], "received --images with --against or --reference"),
        (["--reference", "other", "--model", "m"], "received --model with --against or --reference"),
        (["--inspect", "--json"], "received --json with --inspect"),
        (["--inspect", "--images", "0", "--layers"], "received --images and --layers with --inspect"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    tiny_export: ExportResult, arguments: list[str], wanted: str
) -> None:
    outcome = run(command.main, str(tiny_export.output), *arguments)
    assert outcome.exit_code == 2
    (line,) = outcome.error_lines
    assert wanted in line


@pytest.mark.parametrize("same", [["--against", "onnxruntime"], ["--reference", "."]])
def test_a_package_is_not_compared_with_itself(
    tiny_export: ExportResult, same: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_export.output)
    outcome = run(command.main, str(tiny_export.output), *same)
    assert outcome.exit_code == 1
    (line,) = outcome.error_lines
    assert "received --backend onnxruntime --against onnxruntime, which compares" in line
    assert "with itself; expected another backend, or another package" in line


def test_a_source_that_is_not_found_is_to_be_named(
    tiny_export: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(command.main, str(tiny_export.output))
    assert outcome.exit_code == 1
    (line,) = outcome.error_lines
    assert "was made from 'tiny-llava', and there is no model in a folder of that name here" in line
    assert line.endswith("pass it with --model")


def test_another_models_weights_are_refused(tiny_export: ExportResult, tmp_path: Path) -> None:
    other = save_tiny_llava(tmp_path / "other", seed=5)
    outcome = run(command.main, str(tiny_export.output), "--model", str(other))
    assert outcome.exit_code == 1
    assert "are not those that" in outcome.stderr


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    outcome = run(command.main, str(tmp_path))
    assert outcome.exit_code == 1
    assert "is not an exported package" in outcome.stderr
