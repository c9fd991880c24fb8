"""A LLaVA of a billion random parameters, exported and run in ONNX Runtime, against PyTorch; 12 GB of memory.

pytest -m slow tests/test_billion.py -s
"""

from __future__ import annotations

from pathlib import Path

import pytest

from promprune.dtypes import Dtype
from promprune.export import export_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig
from promprune.export.verify.checks import LIMITS
from promprune.export.verify.samples import check_samples
from promprune.export.verify.verification import verify_package
from promprune.runtime import VisionLanguagePipeline
from tests.support.random_llava import config_of, save

IMAGES = 4
LAYERS = 11  # 1.02 billion parameters


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("billion") / "checkpoint"
    save(folder, config_of("1b", num_hidden_layers=LAYERS), "float32", seed=0)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_billion_parameters_answer_as_in_torch(billion: Path, tmp_path: Path, dtype: Dtype) -> None:
    """Features, logits and greedy answers, at 12 % of the visual tokens; torch is given the tokens that were kept."""
    config = ExportConfig(model=str(billion), ratio=0.12, dtype=dtype, output=tmp_path / "package", verify=False)
    result = export_package(config)
    samples = check_samples(IMAGES, sizes=((336, 336),))
    with VisionLanguagePipeline.from_package(result.output, provider="cpu") as pipeline:
        answers = {tuple(pipeline.generate([s.image], s.question, max_new_tokens=16).token_ids) for s in samples}
    assert len(answers) > 1
    assert min(len(set(answer)) for answer in answers) > 1
    record = verify_package(result.package, load_checkpoint(str(billion)), num_images=IMAGES)
    measured = {check.name: check.measured for check in record.checks}
    for check in record.checks:
        print(f"{dtype}  {check.name:<50} {check.measured:<10.3g} {check.comparison} {check.limit:g}  {check.detail}")
    assert record.not_verified == ()
    assert record.passed
    assert max(measured["prefill logits, relative error"], measured["decode logits, relative error"]) <= (
        LIMITS[dtype].relative_error
    )
    if dtype == "fp32":
        assert measured["greedy answers equal to torch's"] == 1
