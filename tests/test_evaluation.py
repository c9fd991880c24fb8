"""promprune-eval: answers against transformers' generate, scores by hand, the shipped questions, the command line."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image
from PIL.Image import new as new_image

from promprune.embedded.scenes import questions, render_scene
from promprune.export import ExportResult
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.commands import eval as command
from promprune.export.evaluation import runs
from promprune.export.evaluation.data import Picture, Question, is_right, load_data
from promprune.export.evaluation.gallery import gallery
from promprune.export.evaluation.model import TorchModel
from promprune.export.evaluation.runs import ALL, Condition, Run, ask_package, ask_torch, conditions
from promprune.export.evaluation.scores import difference, scores
from promprune.export.verify.language import MAX_NEW_TOKENS, kept_position_ids, torch_answer
from promprune.method.config import SelectionConfig
from promprune.runtime import TokenSelection, draw_kept_tokens
from promprune.runtime.images.encoded import TokenGrid
from tests.support.command_line import run


def test_the_shipped_questions_are_those_of_the_scenes() -> None:
    pictures = load_data("embedded")
    assert sum(len(picture.questions) for picture in pictures) == 2004
    for picture in pictures[::40]:
        asked = questions(render_scene(int(picture.name), image_size=32), per_type=1)
        assert [(q.type, q.text, q.answers) for q in picture.questions] == [
            (q.type, q.text, (q.answer,)) for q in asked
        ]


def test_answers_are_those_of_generate() -> None:
    """Many questions after one cached prefix, padded, get the same answers as one at a time in transformers."""
    checkpoint = load_checkpoint(None)
    model, pictures = TorchModel(checkpoint), load_data("embedded", limit=3)
    wanted = conditions(model.num_tokens, [0.12], ["coverage"])
    found = ask_torch(model, pictures, wanted, SelectionConfig(), max_new_tokens=6)
    tokenizer = checkpoint.processor.tokenizer
    for index, picture in enumerate(pictures):
        features = model.encode(picture.load()).features[0]
        for one in found:
            chosen = one.selections[index].token_indices if one.selections else range(256)
            kept = features[torch.as_tensor(list(chosen))]
            for question, answer in zip(picture.questions, one.answers[index], strict=True):
                with torch.inference_mode():
                    ids = torch_answer(model.family, question.text, kept)
                assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()


def _scenes() -> list[Picture]:
    """Square, wide and tall, with questions of different lengths."""
    asked = (Question("Is it red?", ("yes",), "t"), Question("What is at the top left of it?", ("a",), "t"))
    images = [render_scene(seed, image_size=96).image.resize(size) for seed, size in enumerate(((96, 96), (130, 70)))]
    return [Picture(str(number), partial(Image.copy, image), asked) for number, image in enumerate(images)]


@pytest.mark.parametrize("family", ["tiny_llava_next", "tiny_qwen"])
def test_crops_and_rotary_positions_answer_as_generate_does(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint = load_checkpoint(str(request.getfixturevalue(family)))
    model, pictures = TorchModel(checkpoint), _scenes()
    wanted = conditions(model.num_tokens, [0.25], ["promprune", "none"])
    full, none, pruned = ask_torch(model, pictures, wanted, SelectionConfig(), max_new_tokens=MAX_NEW_TOKENS)
    assert full.answers != pruned.answers != none.answers
    for index, picture in enumerate(pictures):
        tokens = model.encode(picture.load())
        draw_kept_tokens(model.view(picture.load()), pruned.selections[index])  # refuses a view of another size
        for one in (full, pruned):
            chosen = one.selections[index].token_indices if one.selections else range(tokens.num_tokens)
            indices = torch.as_tensor(list(chosen))
            for question, answer in zip(picture.questions, one.answers[index], strict=True):
                with torch.inference_mode():
                    kept = model.family.kept_features(tokens.reference, indices)
                    places = kept_position_ids(model.family, question.text, tokens.reference, indices)
                    ids = torch_answer(model.family, question.text, kept, places)
                assert answer == checkpoint.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("model", "export"), [("tiny_llava_next", "next_export"), ("tiny_onevision", "onevision_export")]
)
def test_crops_are_chosen_from_as_in_a_package(model: str, export: str, request: pytest.FixtureRequest) -> None:
    checkpoint, result = request.getfixturevalue(model), request.getfixturevalue(export)
    pictures, counts = _scenes(), result.manifest.tokens_of()
    condition = Condition("torch", "promprune", counts.keep_tokens, counts.num_tokens)
    config = result.manifest.selection.config
    torch_model = TorchModel(load_checkpoint(str(checkpoint)))
    ours = ask_torch(torch_model, pictures, [condition], config, max_new_tokens=4)[0]
    package = ask_package(result.output, pictures, max_new_tokens=4)
    assert ours.answers == package.answers
    for one, other in zip(ours.selections, package.selections, strict=True):
        assert one.grids == other.grids
        assert one.token_indices.tolist() == other.token_indices.tolist()
        assert one.saliency_mask.tolist() == other.saliency_mask.tolist()  # type: ignore[union-attr]


def _asked(name: str, *answers: str) -> Picture:
    return Picture(name, lambda: render_scene(0).image, tuple(Question("?", (text,), "t") for text in answers))


def test_scores_by_hand() -> None:
    pictures = [_asked("a", "one", "red"), _asked("b", "blue", "2")]
    full = Run(Condition("torch", ALL, 4, 4), (("1", "Red."), ("blue", "3")))
    pruned = Run(Condition("torch", "coverage", 1, 4), (("1", "green"), ("a blue", "3")))
    first, second = scores([full, pruned], pictures)
    assert (first.accuracy.value, second.accuracy.value) == (0.75, 0.5)
    assert second.retention is not None
    assert second.retention.value == pytest.approx(2 / 3)
    assert second.agreement == 0.75
    change = difference(pruned, full, pictures)
    assert (change.value, change.low, change.high) == (-0.25, -0.5, 0.0)
    assert not is_right("seven", Question("?", ("8",), "t"))


def test_the_command_on_a_folder(tmp_path: Path, tiny_llava: Path) -> None:
    render_scene(1, image_size=64).image.save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What?", "answers": "nothing"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    page, out = tmp_path / "page.html", tmp_path / "out"
    options = ["--ratios", "0.5", "--max-new-tokens", "2", "-o", str(out), "--gallery", str(page), "--json"]
    outcome = run(command.main, str(tiny_llava), "--data", str(tmp_path), *options, "--runtime", "fp32")
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)["runs"]
    assert [(row["by"], row["policy"]) for row in found][-2:] == [
        ("runtime, fp32", "all"),
        ("runtime, fp32", "promprune"),
    ]
    answers = json.loads((out / "answers.jsonl").read_text())
    assert answers["torch/all/16"] == answers["runtime, fp32/all/16"]
    assert "data:image/jpeg" in page.read_text()
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ratios", "few"], "such as 0.5,0.12"),
        (["--ratios", "2"], "received ratio = 2; expected fractions above 0 and at most 1"),
        (["--ratios", "nan"], "received ratio = nan"),
        (["--runtime", "int8"], "received runtime = 'int8'; expected one of fp32, fp16, bf16"),
        (["--limit", "0"], "received limit = 0; expected at least 1"),
        (["--limit", "-5"], "received limit = -5; expected at least 1"),
        (["--threads", "0"], "received threads = 0; expected at least 1"),
        (["--max-new-tokens", "0"], "received max_new_tokens = 0; expected at least 1"),
        (["--gallery-limit", "-1"], "received gallery_limit = -1; expected at least 1"),
        (["--policies", "half", "--gallery", "page.html"], "promprune among the policies"),
        (["--ratios", "1", "--gallery", "page.html"], "a ratio below 1"),
        (["--gallery", "nowhere/page.html"], "but nowhere is not a folder"),
        (["--gallery", "."], "which is a folder"),
        (["--policies", "oracle", "--data", "photos"], "this policy needs to know the objects of a scene"),
        (["./nowhere"], "there is no such folder"),
        (["a-file"], "which is a file"),
        (["-o", "a-file"], "but a-file is not a folder"),
        (["-o", "a-file/results"], "but a-file is not a folder"),
        (["--policies", "best", "--limit", "1"], "one of promprune"),
        (["--data", "/nowhere"], "'embedded', or a folder"),
        (["one", "two"], "2 models"),
    ],
)
def test_refusals(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    outcome = run(command.main, *argv)
    assert outcome.exit_code == 1
    assert message in " ".join(outcome.stderr.split())
    assert len(outcome.error_lines) == 1


@pytest.mark.parametrize(
    "option",
    [["--ratios", "0.5"], ["--policies", "half"], ["--runtime", "fp32"], ["--threads", "2"], ["--gallery", "x.html"]],
)
def test_what_only_a_model_understands_is_refused_with_packages_only(
    option: list[str], tiny_export: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(command.main, str(tiny_export.output), *option)
    assert outcome.exit_code == 1
    assert f"received {option[0][2:]} without a model" in outcome.error_lines[0]


def test_bf16_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from promprune.runtime.sessions import providers

    monkeypatch.setattr(providers, "why_not", lambda name: f"no {name} here")
    outcome = run(command.main, "--runtime", "bf16", "--limit", "1")
    assert outcome.exit_code == 1
    assert "packages in bf16 run on CUDA only, which cannot be used here (no cuda here)" in outcome.error_lines[0]


def test_a_missing_matplotlib_is_told_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(runs, "ask_torch", pytest.fail)
    outcome = run(command.main, "--limit", "1", "-o", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert "promprune[eval]" in outcome.error_lines[0]


def test_the_table_is_printed_even_where_nothing_can_be_written(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(command, "replace_file", full)
    options = ["--ratios", "0.5", "--policies", " promprune, half ", "--max-new-tokens", "1", "--limit", "1"]
    outcome = run(command.main, str(tiny_llava), *options, "-o", str(tmp_path / "out"))
    assert outcome.exit_code == 1
    assert "No space left" in outcome.error_lines[-1]
    assert "questions about 1 images" in outcome.stdout


def test_the_gallery_makes_what_it_shows_and_nothing_else() -> None:
    pictures = [_asked(str(number), "1") for number in range(3)]
    grid = TokenGrid(rows=2, columns=2, left=0, top=0, width=8, height=8)
    chosen = TokenSelection((grid,), np.array([1]), np.array([True]), (0.4,), "promprune")
    full = Run(Condition("torch", ALL, 4, 4), (("1",),) * 3)
    pruned = Run(Condition("torch", "promprune", 1, 4), (("1",), ("2",), ("1",)), (chosen,) * 3)
    shown: list[str] = []

    def view(picture: Picture) -> Image:
        shown.append(picture.name)
        return new_image("RGB", (8, 8))

    page = gallery(full, pruned, pictures, view=view, limit=1)
    assert shown == ["1"]
    assert "1 of 3 pictures" in page
