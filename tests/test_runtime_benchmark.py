"""The benchmark's report; the figures themselves depend on the machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promprune.runtime.benchmark import main
from tests.fake_package import FakeModel, write_fake_package


def test_packages_are_compared_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fake_package(tmp_path / "pruned")
    write_fake_package(tmp_path / "full", FakeModel(keep_tokens=16))
    image = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(image)
    packages = [str(tmp_path / "pruned"), str(tmp_path / "full")]
    assert main([*packages, "--image", str(image), "--runs", "1", "--new-tokens", "4", "--provider", "cpu"]) == 0
    captured = capsys.readouterr()
    pruned, full = json.loads(captured.out.splitlines()[-1])["packages"]
    assert (pruned["keep_tokens"], full["keep_tokens"]) == (4, 16)
    assert full["prompt_tokens"] - pruned["prompt_tokens"] == 12
    for report in (pruned, full):
        assert 0 < report["first_token_ms"] < report["cold_start_ms"]
        assert report["peak_resident_bytes"] > 10e6
    assert "decode_tokens_per_s" in captured.err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--image", "x.png"]) == 1
    assert "not an exported package" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--image", "x.png", "--runs", "0"])
    assert "expected a whole number of at least 1" in capsys.readouterr().err
