"""Calibration: the rule by hand, the entropies against numpy, the command line, and the export's warning."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from promprune.embedded import scenes
from promprune.embedded.scenes import render_scene
from promprune.errors import ConfigError
from promprune.export.checkpoint import loading as checkpoint_module
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.commands import calibrate as calibrate_command
from promprune.export.commands import export as export_command
from promprune.export.evaluation.calibration import calibrate, calibration_scenes, folder_images, image_entropies
from promprune.package.manifest import read_manifest
from tests.support.command_line import run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed in range(12):
        place = folder / "more" if seed % 2 else folder
        render_scene(seed, image_size=64).image.save(place / f"{seed}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def own_llava(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "model"))


def test_the_rule_by_hand() -> None:
    entropies = [0.30, 0.32, 0.34, 0.34, 0.36, 0.38, 0.40, 0.42, 0.44]
    fitted = calibrate(entropies)
    assert fitted.mu == 0.36
    assert fitted.tau == round(np.std(entropies, ddof=1) / 2, 4)
    shares = fitted.saliency_shares()
    assert shares[4] == pytest.approx(0.5)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("entropies", [[0.3] * 7, [0.3] * 20])
def test_what_cannot_be_fitted_is_refused(entropies: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        calibrate(entropies)


def test_entropies_are_those_of_transformers_features(tiny_llava: Path) -> None:
    pictures = list(calibration_scenes(3, 56))
    found = list(image_entropies(load_checkpoint(str(tiny_llava)), pictures))
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_llava)
    for picture, entropies in zip(pictures, found, strict=True):
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0].detach().numpy()
        assert entropies == [pytest.approx(_entropy(features), abs=1e-6)]


def _entropy(features: np.ndarray) -> float:
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    p = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
    p = p[p > 1e-14] / p.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(features)))


def test_images_of_any_size_take_the_closest_grid(tiny_qwen: Path) -> None:
    picture = next(calibration_scenes(1, 70)).resize((130, 70))
    checkpoint = load_checkpoint(str(tiny_qwen))
    found = list(image_entropies(checkpoint, [picture], ((6, 6), (4, 7))))
    side = checkpoint.processor.image_processor.patch_size * checkpoint.processor.image_processor.merge_size
    wide = picture.resize((7 * side, 4 * side), Image.Resampling.BICUBIC)
    inputs = checkpoint.processor.image_processor([wide], return_tensors="pt")
    assert inputs["image_grid_thw"].prod() == 4 * 7 * checkpoint.processor.image_processor.merge_size**2
    with torch.inference_mode():
        features = checkpoint.model.get_image_features(**inputs, return_dict=True).pooler_output[0].numpy()
    assert found == [[pytest.approx(_entropy(features), abs=1e-6)]]


def test_images_are_found_in_subfolders_and_drawn_evenly(photos: Path) -> None:
    every = folder_images(photos, 100)
    assert len(every) == 12
    assert folder_images(photos, 4) == every[::3]


def test_the_command_fits_and_the_export_uses_it(own_llava: Path, photos: Path, tmp_path: Path) -> None:
    plot = tmp_path / "entropy.png"
    argv = [str(own_llava), "--images", str(photos), "--write", "--plot", str(plot)]
    printed = run(calibrate_command.main, *argv)
    assert printed.exit_code == 0
    written = json.loads((own_llava / "promprune_config.json").read_text())
    assert printed.stdout.strip() == f"--mu {written['mu']} --tau {written['tau']}"
    assert "█" in printed.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "out"
    assert run(export_command.main, str(own_llava), "--ratio", "0.5", "--vision-only", "-o", str(out)).exit_code == 0
    record = read_manifest(out).selection
    assert (record.config.mu, record.config.tau, record.parameters_from) == (written["mu"], written["tau"], "model")


def test_json(tiny_llava: Path, photos: Path) -> None:
    outcome = run(calibrate_command.main, str(tiny_llava), "--images", str(photos), "--limit", "8", "--json")
    found = json.loads(outcome.stdout)
    assert found["images"] == len(found["entropies"]) == 8
    assert found["mu"] == round(float(np.median(found["entropies"])), 4)


def test_an_export_whose_budget_is_not_split_warns(tiny_llava: Path, tmp_path: Path) -> None:
    def export(mu: str, tau: str) -> str:
        out = tmp_path / f"out-{mu}"
        argv = [str(tiny_llava), "--ratio", "0.5", "--vision-only", "--mu", mu, "--tau", tau, "-o", str(out)]
        outcome = run(export_command.main, *argv)
        verification = read_manifest(out).verification
        assert verification is not None
        assert outcome.exit_code == 0
        assert verification.passed
        (check,) = [check for check in verification.checks if check.advisory]
        assert check.passed == ("warning:" not in outcome.stderr)
        return outcome.stderr

    (warning,) = [line for line in export("0.05", "0.01").splitlines() if line.startswith("warning:")]
    assert "mu = 0.05 and tau = 0.01 (command line) give all to coverage in 8 of 8" in warning
    assert "promprune-calibrate" in warning
    assert "warning:" not in export("0.8", "1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["some/model"], "--images DIR"),
        (["--images", "/nowhere"], "not a folder"),
        (["--write"], "give --mu and --tau"),
        (["--limit", "0"], "received limit = 0; expected at least 8 images"),
        (["--limit", "7"], "received limit = 7; expected at least 8 images"),
        (["./nowhere", "--images", "."], "there is no such folder"),
        (["--image-grid", "24"], "received --image-grid '24'"),
        (["--plot", "p.xyz"], "received --plot p.xyz; expected a name that ends in .png, .svg"),
        (["--plot", "nodir/p.png"], "but nodir is not a folder"),
        (["--images", "."], "there is no image"),
    ],
)
def test_refusals(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(calibrate_command.main, *argv)
    assert outcome.exit_code == 1
    (line,) = outcome.error_lines
    assert message in line


def test_fewer_images_than_can_be_fitted_are_refused_at_once(photos: Path) -> None:
    outcome = run(calibrate_command.main, "--images", str(photos / "more"))
    assert outcome.exit_code == 1
    assert "which holds 6 images; expected at least 8" in outcome.error_lines[0]


def test_no_more_scenes_are_counted_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "CALIBRATION_SEEDS", scenes.CALIBRATION_SEEDS[:9])
    outcome = run(calibrate_command.main, "--limit", "20000", "--json")
    found = json.loads(outcome.stdout)
    assert found["images"] == len(found["entropies"]) == 9


def test_a_missing_matplotlib_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(checkpoint_module, "load_checkpoint", pytest.fail)
    outcome = run(calibrate_command.main, "--plot", str(tmp_path / "p.png"))
    assert outcome.exit_code == 1
    assert "promprune[eval]" in outcome.error_lines[0]
