"""lmms-eval drives the runtime: its own command on a local task, and what its requests mean to the runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from promprune.errors import ConfigError
from promprune.export import ExportResult
from promprune.export.evaluation.data import load_data
from promprune.export.evaluation.runs import ask_package
from promprune.export.evaluation.scores import scores
from promprune.runtime.integrations.harness import generation_options, images_and_messages

_TASK = """\
task: promprune_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
_UTILS = """\
from PIL import Image


def images(document):
    return [Image.open(document["image"]).convert("RGB")]
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": 0.5, "do_sample": False, "num_beams": 1, "image_aspect_ratio": "pad"}, {}),
        ({"max_new_tokens": 9, "until": "\n"}, {"max_new_tokens": 9, "stop": ("\n",)}),
        ({"until": ["", "end"]}, {"stop": ("end",)}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}),
        ({"temperature": 0.7, "do_sample": False}, {}),
    ],
)
def test_options(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation_options(given) == {"stop": (), "max_new_tokens": None, **expected}


def test_images_keep_their_places_in_a_chat() -> None:
    first, second = Image.new("RGB", (2, 2)), "second.png"
    content = [{"type": "text", "text": "A"}, {"type": "image", "url": first}, {"type": "image", "url": second}]
    images, messages = images_and_messages([{"role": "user", "content": content}])
    assert images == [first, second]
    parts = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "image"}]
    assert messages == [{"role": "user", "content": parts}]


def test_what_the_runtime_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="no beam search"):
        generation_options({"num_beams": 4})
    with pytest.raises(ConfigError, match="'video'; expected only images and texts"):
        images_and_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


@pytest.fixture
def lmms_eval() -> None:
    """Skip if the harness is not installed: its dependencies are larger than all others together."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'promprune[lmms-eval]'")


@pytest.mark.usefixtures("lmms_eval")
def test_its_command_finds_the_accuracy_that_ours_finds(embedded_export: ExportResult, tmp_path: Path) -> None:
    assert [entry.name for entry in entry_points(group="lmms_eval.models") if "promprune" in entry.value] == [
        "promprune"
    ]
    pictures = load_data("embedded", limit=12)
    ours = ask_package(embedded_export.output, pictures, max_new_tokens=6)
    lines = []
    for picture in pictures:
        image = tmp_path / f"{picture.name}.png"
        picture.load().save(image)
        lines += [{"image": str(image), "question": q.text, "answer": q.answers[0]} for q in picture.questions]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "promprune_scenes.yaml").write_text(_TASK.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(_UTILS)
    arguments = ["--model", "promprune", "--model_args", f"package={embedded_export.output},device=cpu"]
    arguments += ["--tasks", "promprune_scenes", "--include_path", str(tmp_path), "--batch_size", "5"]
    arguments += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    subprocess.run([sys.executable, "-m", "lmms_eval", *arguments], check=True, cwd=tmp_path)
    found = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text())
    accuracy = found["results"]["promprune_scenes"]["exact_match,none"]
    assert accuracy == pytest.approx(scores([ours], pictures)[0].accuracy.value)
    logged = next((tmp_path / "out").rglob("*samples_promprune_scenes.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, logged), key=lambda sample: sample["doc_id"])
    answers = [answer for texts in ours.answers for answer in texts]
    assert [sample["filtered_resps"] for sample in samples] == answers


@pytest.mark.usefixtures("lmms_eval")
def test_rounds_and_refusals(embedded_export: ExportResult) -> None:
    """Every round is a new chat that contains the answers so far."""
    from lmms_eval.api.instance import Instance

    from promprune.runtime.integrations.lmms_eval import PromPrune

    picture = load_data("embedded", limit=1)[0]
    questions = [question.text for question in picture.questions[:3]]

    def chat(document: Any, round_idx: int = 0, previous_output: Any = (), previous_round_info: Any = None) -> Any:
        assert len(previous_output) == round_idx
        assert previous_round_info == (round_idx if round_idx > 1 else None)
        if round_idx == len(questions):
            return None, True, previous_output, None
        parts = [{"type": "image", "url": document}, {"type": "text", "text": questions[round_idx]}]
        messages = [{"role": "user", "content": parts}]
        return (messages, False, previous_output, round_idx + 1) if round_idx else messages

    expected = ask_package(embedded_export.output, [picture], max_new_tokens=6).answers[0][:3]
    model = PromPrune(str(embedded_export.output), device="cpu")
    model.task_dict = {"t": {"test": [picture.load()]}}
    arguments = ("", chat, {"max_new_tokens": 6}, 0, "t", "test")
    request = Instance("generate_until_multi_round", arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})
    assert model.generate_until_multi_round([request]) == [list(expected)]
    with pytest.raises(ConfigError, match="task 't' compares the likelihoods"):
        model.loglikelihood([request])
    model.clean()
    with pytest.raises(ConfigError, match="batch_size = 'auto'; expected at least 1"):
        PromPrune(str(embedded_export.output), batch_size="auto")
