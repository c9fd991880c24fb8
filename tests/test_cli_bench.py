"""``promprune-bench`` as a user meets it, on tiny models; the figures themselves depend on the machine."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from promprune.errors import ConfigError
from promprune.export import ExportResult
from promprune.export.baselines.export_cache import packages_of
from promprune.export.baselines.pytorch import PytorchContender, PytorchModel, PytorchSettings
from promprune.export.config import ExportConfig
from promprune.method.config import POLICIES
from promprune.runtime.bench.contenders import Question
from promprune.runtime.bench.report import FIRST_TOKEN_STAGES, Report, read_report
from promprune.runtime.bench.tables import grids
from promprune.runtime.commands import bench as command
from tests.support.command_line import run
from tests.support.progress import RecordedProgress
from tests.support.qwen import NEW_TOKENS
from tests.support.qwen import Reference as QwenReference

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def report(
    tiny_llava: Path,
    tiny_export: ExportResult,
    tiny_full_export: ExportResult,
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    """Two packages and both PyTorch baselines, in batches and at the same time."""
    output = tmp_path_factory.mktemp("bench") / "out"
    packages = [str(export.output) for export in (tiny_full_export, tiny_export)]
    options = ["--baseline", "hf, authors", "--model", str(tiny_llava), "--provider", "cpu", "--num-threads", "1"]
    loads = ["--batch", "2,1", "--concurrency", "1,2", "--rounds", "5", "--new-tokens", "3", "--cold-starts", "0"]
    outcome = run(command.main, *packages, *options, *loads, "-p", PROMPT, "-o", str(output), "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert {path.name for path in output.iterdir()} == {f"report.{end}" for end in ("json", "csv", "md", "html")}
    written = read_report(output / "report.json")
    assert json.loads(outcome.stdout)["created"] == written.created
    return written


def test_every_contender_is_measured_under_every_load(report: Report) -> None:
    names = {contender.name: contender.kind for contender in report.contenders}
    assert names == {
        "tiny-full": "package",
        "tiny": "package",
        "Hugging Face": "hugging_face",
        "authors, 4 tokens": "authors",
    }
    loads = {(case.contender, case.batch, case.concurrency) for case in report.cases}
    packages = {(name, 1, 2) for name in ("tiny", "tiny-full")}
    assert loads == {(name, batch, 1) for name in names for batch in (1, 2)} | packages
    for case in report.cases:
        assert case.stages["first_token"].n == 5 * case.concurrency
        assert case.prompts_per_s > 0


def test_the_tables_are_of_one_prompt_at_a_time(report: Report) -> None:
    """Although the first requested and measured load has batches of two."""
    assert report.cases[0].batch == 2
    assert [grid.title.partition(", ")[2] for grid in grids(report)[:1]] == ["one prompt at a time"]


def test_packages_and_baselines_are_named_by_the_same_weights(report: Report) -> None:
    assert len({contender.model for contender in report.contenders}) == 1
    assert {contender.device for contender in report.contenders} == {"CPU"}


def test_the_stages_add_up_to_the_first_token(report: Report) -> None:
    for case in report.cases:
        stages = {name: case.stages[name].samples_ms for name in FIRST_TOKEN_STAGES if name in case.stages}
        shares = []
        for index, whole in enumerate(case.stages["first_token"].samples_ms):
            parts = [samples[index] for samples in stages.values()]
            shares.append(sum(parts) / whole)
            # A selection that was interrupted when it ran by itself can take longer than the whole vision stage.
            assert sum(parts) <= whole + 0.01 or stages["vision"][index] == 0
        if report.contender(case.contender).kind == "package":  # what generate does besides has no stage
            assert statistics.median(shares) > 0.7


def test_the_selection_is_apart_where_there_is_one(report: Report) -> None:
    for case in report.cases:
        alone = case.concurrency == 1
        wanted = alone and case.contender in ("tiny", "authors, 4 tokens")
        assert ("selection" in case.stages) == wanted


def test_equal_work_has_equal_answers_and_counts(report: Report) -> None:
    ours, theirs = report.contender("tiny-full"), report.contender("Hugging Face")
    assert ours.token_ids == theirs.token_ids
    assert ours.prompt_tokens == theirs.prompt_tokens
    assert report.contender("tiny").prompt_tokens == report.contender("authors, 4 tokens").prompt_tokens
    assert report.contender("tiny").saliency_count == report.contender("authors, 4 tokens").saliency_count
    assert ours.kv_cache_bytes is not None
    assert theirs.kv_cache_bytes is not None
    assert ours.kv_cache_bytes >= theirs.kv_cache_bytes  # the lowered decoder reserves capacity ahead
    assert theirs.first_token_flops is not None
    assert ours.first_token_flops is not None
    # transformers runs one more layer of the vision tower than the features need
    assert ours.first_token_flops < theirs.first_token_flops < 1.35 * ours.first_token_flops


def test_the_work_of_every_stage_is_counted(report: Report) -> None:
    for name, stages in (("tiny-full", 4), ("tiny", 5)):
        contender = report.contender(name)
        assert len(contender.work) == stages
        assert all(work.traffic_bytes > 0 and work.bound_ms > 0 for work in contender.work.values())
        before = [work.flops for stage, work in contender.work.items() if stage != "decode"]
        assert contender.first_token_flops == sum(before)


@pytest.mark.parametrize(
    ("family", "num_tokens"), [("llava", 16), ("llava_next", 16 + 6 * (8 + 1)), ("qwen2_5_vl", 36)]
)
def test_the_baseline_answers_as_generate_does(
    family: str, num_tokens: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture = {"llava": "tiny_llava", "llava_next": "tiny_llava_next", "qwen2_5_vl": "tiny_qwen"}[family]
    folder: Path = request.getfixturevalue(fixture)
    image = tmp_path / "image.png"
    Image.effect_mandelbrot((168, 168) if family == "qwen2_5_vl" else (90, 70), (-2, -1, 1, 1), 40).save(image)
    settings = PytorchSettings(model=str(folder), dtype="fp32", device="cpu", threads=1)
    contender = PytorchContender("hf", PytorchModel(settings), settings)
    question = Question(image=image, prompt=PROMPT, new_tokens=NEW_TOKENS)
    sample = contender.run(question, 2)
    picture = Image.open(image).convert("RGB")
    if family == "qwen2_5_vl":
        qwen = QwenReference(folder)
        qwen.model.generation_config.eos_token_id = None
        prompt = qwen.prompt(([picture], PROMPT))
        expected = qwen.answer(**prompt.inputs)
    else:
        expected = generated(folder, picture)
    assert list(sample.token_ids) == expected
    facts = contender.facts(question)
    assert (facts.num_tokens, facts.keep_tokens, facts.policy) == (num_tokens, num_tokens, "all")
    assert sum(sample.stages_ms[stage] for stage in FIRST_TOKEN_STAGES if stage != "selection") == pytest.approx(
        sample.stages_ms["first_token"], rel=0.05
    )


def generated(folder: Path, picture: Image.Image) -> list[int]:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    tokens: list[int] = answer[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def test_the_authors_method_is_for_one_family(tiny_qwen: Path) -> None:
    settings = PytorchSettings(model=str(tiny_qwen), dtype="fp32", device="cpu", threads=1, keep_tokens=4)
    with pytest.raises(ConfigError, match=r"received --baseline authors for .* a 'qwen2_5_vl' model"):
        PytorchContender("authors", PytorchModel(settings), settings)


def test_packages_of_every_family_are_measured(next_export: ExportResult, tiny_qwen_export: ExportResult) -> None:
    for export in (next_export, tiny_qwen_export):
        options = ["--rounds", "2", "--warmup", "1", "--new-tokens", "2", "--cold-starts", "0", "--provider", "cpu"]
        outcome = run(command.main, str(export.output), *options, "--json")
        (contender,) = json.loads(outcome.stdout)["contenders"]
        assert contender["keep_tokens"] < contender["num_tokens"]
        assert contender["work"]["selection"]["flops"] > 0


def test_a_process_of_its_own_says_its_memory(tiny_export: ExportResult) -> None:
    options = ["--rounds", "1", "--provider", "cpu", "--cold-starts", "2", "--json"]
    outcome = run(command.main, str(tiny_export.output), *options)
    (contender,) = json.loads(outcome.stdout)["contenders"]
    cold = contender["cold_start"]
    assert cold["n"] == 2
    assert 20e6 < cold["peak_host_bytes"] < 400e6
    assert cold["first_token_ms"] > 50
    assert cold["peak_device_bytes"] is None


def test_what_a_process_refuses_is_the_whole_message(tiny_export: ExportResult, tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_text("no image")
    outcome = run(command.main, str(tiny_export.output), "--provider", "cpu", "-i", str(image))
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    assert outcome.error_lines[0].startswith(f"error: {image} ")
    assert "process that measures the cold start" not in outcome.error_lines[0]
    assert "ImageError" not in outcome.error_lines[0]


def test_a_baseline_of_another_model_is_refused(tiny_export: ExportResult, tiny_siglip: Path) -> None:
    outcome = run(command.main, str(tiny_export.output), "--baseline", "hf", "--model", str(tiny_siglip))
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    assert f"received a baseline of {tiny_siglip}, whose weights have the digest" in outcome.error_lines[0]
    assert "the package tiny, made from tiny-llava with the digest" in outcome.error_lines[0]
    assert "expected packages and baselines of the same model" in outcome.error_lines[0]


def test_packages_are_exported_once(
    tiny_llava: Path, tiny_export: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_package(config: ExportConfig) -> None:
        assert config.output is not None
        shutil.copytree(tiny_export.output, config.output)

    monkeypatch.setattr("promprune.export.pipeline.export_package", export_package)
    progress = RecordedProgress()
    made = packages_of(str(tiny_llava), (1.0, 0.25), "fp32", ("random",), tmp_path, progress)
    assert list(made) == ["1", "0.25", "0.25, random"]
    assert progress.items == progress.done == 3
    stamps = [(folder / "promprune.json").stat().st_mtime_ns for folder in made.values()]
    assert packages_of(str(tiny_llava), (1.0, 0.25), "fp32", ("random",), tmp_path, progress) == made
    assert [(folder / "promprune.json").stat().st_mtime_ns for folder in made.values()] == stamps


@pytest.mark.parametrize(
    ("arguments", "exit_code", "wanted"),
    [
        (["./nowhere"], 1, "nowhere is not an exported package (no such folder)"),
        (["a", "--ratios", "1.0"], 2, "received packages and --ratios; expected one of them: --ratios is for --model"),
        (["a", "--dtype", "fp32"], 2, "received packages and --dtype"),
        (["a", "--cache", "c"], 2, "received packages and --cache"),
        (["a", "--model", "m"], 2, "received packages and --model; expected --baseline hf or authors with it"),
        (["a", "--baseline", "random"], 2, "received packages and --baseline random; expected --model"),
        (["a", "--baseline", "vllm"], 1, f"baseline 'vllm'; expected one of hf, authors, {', '.join(POLICIES[1:])}"),
        (["a", "--peer", "openvino=.", "--batch", "4"], 1, "received batches = (4,) and a peer"),
        (["a", "--peer", "vllm"], 2, "received --peer 'vllm'; expected openvino=FOLDER"),
        (["a", "--peer", "openvino=./nowhere"], 1, "received peer nowhere, which is not a folder"),
        (["a", "--rounds", "0"], 1, "received rounds = 0; expected at least 1"),
        (["a", "--rounds", "x"], 2, "received 'x'; expected a whole number"),
        (["a", "--batch", "1,x"], 2, "received --batch '1,x'; expected whole numbers"),
        (["a", "--concurrency", "0"], 1, "received concurrencies = (0,); expected numbers of at least 1"),
        (["a", "--image", "nothing.png"], 1, "received image nothing.png, which is not a file"),
        (["a", "--cuda-graphs"], 1, "received cuda_graphs = True; expected the backend 'tensorrt' with it"),
        (["a", "--provider", "abacus"], 1, "received provider = 'abacus'"),
        (["a/b", "c/b"], 1, "received packages of the same name"),
        (["--ratios", "some"], 2, "received --ratios 'some'; expected fractions"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], exit_code: int, wanted: str) -> None:
    outcome = run(command.main, *arguments)
    assert outcome.exit_code == exit_code
    assert len(outcome.error_lines) == 1
    assert wanted in outcome.error_lines[0]


def test_a_report_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("precious")
    outcome = run(command.main, "a", "-o", str(tmp_path))
    assert outcome.exit_code == 1
    assert "holds a report already" in outcome.error_lines[0]
    assert (tmp_path / "report.json").read_text() == "precious"


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a measurement begins."""

    def measure(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("promprune.runtime.bench.measure.run_benchmark", measure)


@pytest.mark.usefixtures("unmeasured")
def test_what_the_page_needs_is_missed_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "promprune.runtime.bench.page", raising=False)
    outcome = run(command.main, "a", "-o", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert outcome.error_lines == [
        "error: this command needs matplotlib, which is not installed; pip install 'promprune[bench]'"
    ]


@pytest.mark.usefixtures("unmeasured")
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured() -> None:
    outcome = run(command.main, "a", "-o", "/proc/foo")
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    assert outcome.error_lines[0].startswith("error: /proc/foo cannot be written (")


def test_a_form_that_fails_does_not_take_the_report_with_it(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Report) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("promprune.runtime.bench.measure.run_benchmark", lambda *_: report)
    monkeypatch.setattr("promprune.runtime.bench.tables.to_csv", fail)
    outcome = run(command.main, "a", "-o", str(tmp_path))
    assert outcome.exit_code == 1
    fix = "free space there, or choose another place"
    assert outcome.error_lines == [f"error: {tmp_path} cannot be written (No space left on device); {fix}"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert read_report(tmp_path / "report.json") == report
    assert "Stages, one prompt at a time" in outcome.stdout


def test_the_tables_are_on_stdout(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promprune.runtime.bench.measure.run_benchmark", lambda *_: report)
    outcome = run(command.main, "a")
    assert outcome.exit_code == 0
    for wanted in ("Stages, one prompt at a time", "Hugging Face", "CPU, fp32", report.machine.system):
        assert wanted in outcome.stdout
        assert wanted not in outcome.stderr


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is not None, reason="OpenVINO GenAI is installed")
def test_a_peer_that_is_not_installed_is_answered_with_the_command(tmp_path: Path) -> None:
    outcome = run(command.main, "a", "--peer", f"openvino={tmp_path}")
    assert outcome.exit_code == 1
    assert outcome.error_lines == [
        "error: this needs openvino_genai, which is not installed; pip install openvino-genai"
    ]
