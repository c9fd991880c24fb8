"""``promprune-run`` as a user sees it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from promprune.package.manifest import read_manifest
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.commands import run as command
from promprune.terminal import print_json
from tests.support.fake_package import rewrite_manifest, write_fake_package


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "package"
    write_fake_package(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command as the shell would, in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["promprune-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return call


def answer_of(package: Path, images: Any, prompt: str, **options: Any) -> Any:
    with VisionLanguagePipeline.from_package(package) as pipeline:
        return pipeline.generate(images, prompt, **options)


def test_the_answer_goes_to_stdout_and_nothing_else(run: Any, package: Path, image: Path) -> None:
    done = run(package, "--image", image, "--prompt", "What?", "--max-new-tokens", 12)
    assert (done.code, done.err) == (0, "")
    assert done.out == answer_of(package, image, "What?", max_new_tokens=12).text.lstrip() + "\n"


def test_json_is_one_object_with_units(run: Any, package: Path, image: Path) -> None:
    done = run(package, "-i", image, "-i", image, "-p", "What?", "--max-new-tokens", 5, "--json")
    assert (done.code, done.err) == (0, "")
    (line,) = done.out.splitlines()
    report = json.loads(line)
    expected = answer_of(package, [image, image], "What?", max_new_tokens=5)
    assert report["token_ids"] == list(expected.token_ids)
    assert report["images"] == [str(image)] * 2
    assert report["device"] == "CPU"
    assert report["load_ms"] > 0
    assert report["timings"]["first_token_ms"] > 0
    assert [len(selection["token_indices"]) for selection in report["selection"]] == [4, 4]


def test_stats_name_every_stage(run: Any, package: Path, image: Path) -> None:
    done = run(package, "-i", image, "-p", "What?", "--max-new-tokens", 5, "--stats")
    assert done.code == 0
    for word in (
        "4 of 16",
        "entropy",
        "vision + selection",
        "prefill",
        "first token",
        "decode",
        "KV cache",
        "provider cpu: ",
        "not tensorrt: ",
    ):
        assert word in done.err


def test_kept_tokens_are_drawn_for_every_image(run: Any, package: Path, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    done = run(package, "-i", image, "-i", image, "-p", "What?", "--max-new-tokens", 2, "--show-tokens", target)
    assert done.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept-2.png", "kept.png"]
    assert Image.open(target).size[0] == 896


def test_kept_tokens_are_drawn_without_a_question(run: Any, package: Path, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    done = run(package, "-i", image, "--show-tokens", target)
    assert (done.code, done.out) == (0, "")
    assert "4 of 16 visual tokens" in done.err
    report = json.loads(run(package, "-i", image, "--show-tokens", target, "--json").out)
    assert report["selection"][0]["keep_tokens"] == 4
    assert Image.open(target).size[0] == 896


def test_a_package_without_language_model(run: Any, package: Path, image: Path, tmp_path: Path) -> None:
    manifest = read_manifest(package)
    shutil.copytree(package, tmp_path / "vision")
    for name in ("embed_tokens", "decoder_model_merged"):
        (tmp_path / "vision" / "onnx" / f"{name}.onnx").unlink()
    graphs = {"vision_encoder": manifest.graphs["vision_encoder"]}
    rewrite_manifest(tmp_path / "vision", manifest, graphs=graphs)
    done = run(tmp_path / "vision", "-i", image, "-p", "What?")
    assert done.code == 1
    assert "exported with --vision-only" in done.err
    assert run(tmp_path / "vision", "-i", image, "--show-tokens", tmp_path / "kept.png").code == 0


def test_sampling_options_reach_the_model(run: Any, package: Path, image: Path) -> None:
    options = {"max_new_tokens": 12, "temperature": 2.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = run(package, "-i", image, "-p", "What?", *flags, "--seed", 3, "--stop", "zz", "--stop", "yy")
    expected = answer_of(package, image, "What?", **options, seed=3, stop=("zz", "yy"))
    assert done.out == expected.text.lstrip() + "\n"


def test_a_prompt_from_stdin(package: Path, image: Path) -> None:
    done = shell([str(package), "-i", str(image), "-p", "-", "--max-new-tokens", "8"], text="What?\n")
    assert done.returncode == 0
    assert done.stdout == answer_of(package, image, "What?", max_new_tokens=8).text.lstrip() + "\n"


def test_interactive_answers_line_by_line(package: Path, image: Path) -> None:
    done = shell(
        [str(package), "-i", str(image), "--interactive", "--max-new-tokens", "6", "--stats"], text="What?\nSure?\n"
    )
    assert done.returncode == 0
    with VisionLanguagePipeline.from_package(package) as pipeline:
        chat = pipeline.chat()
        first, second = chat.ask("What?", image, max_new_tokens=6), chat.ask("Sure?", max_new_tokens=6)
    assert done.stdout == f"{first.text.lstrip()}\n{second.text.lstrip()}\n"
    assert f"{second.timings.reused_tokens} of them reused" in done.stderr


def test_interactive_goes_on_after_a_refusal(package: Path, image: Path) -> None:
    lines = f"a <image> in the text\n/image {image}\nWhat?\n/image missing.png\nAnd this?\nSure?\n"
    done = shell([str(package), "--interactive", "--max-new-tokens", "6"], text=lines)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 2
    with VisionLanguagePipeline.from_package(package) as pipeline:
        chat = pipeline.chat()
        texts = [chat.ask("What?", image, max_new_tokens=6).text, chat.ask("Sure?", max_new_tokens=6).text]
    assert done.stdout == "".join(f"{text.lstrip()}\n" for text in texts)


def shell(arguments: list[str], text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from promprune.runtime.commands.run import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{missing}", "-i", "{image}", "-p", "x"], 1, ["not an exported package", "promprune-export"]),
        (["{package}", "-i", "{missing}", "-p", "x"], 1, ["does not exist", "expected an image file"]),
        (["{package}", "-i", "{package}", "-p", "x"], 1, ["is a folder"]),
        (["{package}", "-i", "{package}/promprune.json", "-p", "x"], 1, ["not an image"]),
        (["{package}", "-i", "{image}"], 2, ["no --prompt", "--interactive"]),
        (["{package}", "-i", "{image}", "-p", "x", "--interactive", "--json"], 2, ["--json with --interactive"]),
        (["-p", "x"], 2, ["PACKAGE"]),
        (["{package}", "-p", "x", "--bogus"], 2, ["--bogus"]),
        (["{package}", "-p", "x", "--max-new-tokens", "many"], 2, ["received 'many'", "whole number"]),
        (["{package}", "-p", "x", "--max-new-tokens", "0"], 1, ["max_new_tokens = 0", "expected at least 1"]),
        (["{package}", "-p", "x", "--max-new-tokens", "999"], 1, ["999", "256"]),
        (["{package}", "-p", "x", "--temperature", "-1"], 1, ["temperature = -1"]),
        (["{package}", "-p", "x", "--temperature", "nan"], 1, ["temperature = nan"]),
        (["{package}", "-p", "x", "--provider", "tpu"], 1, ["'tpu'", "one of auto, cpu, cuda, tensorrt"]),
        (["{package}", "-p", "x", "--backend", "abacus"], 1, ["'abacus'", "onnxruntime"]),
        (["{package}", "-p", "x", "--num-threads", "0"], 1, ["num_threads = 0"]),
        (["{package}", "-p", "an <image>"], 1, ["stands for an image"]),
        (["{package}", "-p", "x" * 300], 1, ["tokens long", "256"]),
        (["{package}", "-p", "x", "--show-tokens", "{out}/kept.png"], 2, ["without --image"]),
        (["{package}", "-i", "{image}", "-p", "x", "--show-tokens", "{out}/kept.gif"], 1, [".png"]),
        (["{package}", "-i", "{image}", "-p", "x", "--show-tokens", "{missing}/kept.png"], 1, ["is not a folder"]),
        (["{package}", "-i", "{image}", "-p", "x", "--show-tokens", "{out}/folder.png"], 1, ["is a folder"]),
    ],
)
def test_wrong_input_is_one_line(
    run: Any, package: Path, image: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    places = {"package": package, "image": image, "missing": tmp_path / "missing", "out": tmp_path}
    done = run(*[argument.format(**places) for argument in arguments])
    assert done.code == code
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png"]


def test_a_missing_gpu_is_said_in_one_line(run: Any, package: Path) -> None:
    import onnxruntime

    done = run(package, "-p", "x", "--provider", "cuda", "--max-new-tokens", 1)
    if done.code == 0:
        assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return
    (line,) = done.err.splitlines()
    assert "cuda" in line
    assert "--provider cpu" in line


def test_without_an_image_it_says_so(run: Any, package: Path) -> None:
    done = run(package, "-p", "hello", "--max-new-tokens", 3)
    assert done.code == 0
    assert done.err.strip() == "no --image: answering from the text alone"


def test_output_that_cannot_be_encoded_is_replaced(package: Path, image: Path) -> None:
    arguments = [str(package), "-i", str(image), "-p", "What?", "--max-new-tokens", "40"]
    done = shell(arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "?" in done.stdout


def test_a_closed_pipe_is_no_traceback(package: Path, image: Path) -> None:
    code = "from promprune.runtime.commands.run import main; main()"
    arguments = [sys.executable, "-c", code, str(package), "-i", str(image), "-p", "What?"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait() != 0


@pytest.mark.usefixtures("sigint_handled")
def test_ctrl_c_ends_without_a_traceback(package: Path) -> None:
    code = "from promprune.runtime.commands.run import main; main()"
    arguments = [sys.executable, "-c", code, str(package), "--interactive"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert "one question per line" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        rest = process.stderr.read()
    assert "Traceback" not in rest
    assert rest.splitlines()[-1:] == ["error: interrupted"]


def test_a_terminal_is_not_steered_by_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command._write("a\x1b[31mb\x07\x9bc\n\td\r")
    assert capsys.readouterr().out == "a\ufffd[31mb\ufffd\ufffdc\n\td\ufffd"


STEERING = "\x1b]0;owned\x07\x9b2J"


def test_a_terminal_is_not_steered_by_a_package(run: Any, package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "package")
    manifest = json.loads((package / "promprune.json").read_text())
    manifest["files"][0]["path"] = STEERING
    (tmp_path / "package" / "promprune.json").write_text(json.dumps(manifest))
    refused(run(tmp_path / "package", "-p", "x"), "2J is missing from")


def test_a_terminal_is_not_steered_by_the_names_of_files(
    run: Any, package: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run(package, "-p", "x", "-i", tmp_path / STEERING), "does not exist")
    refused(run(package, "-p", "x", f"--{STEERING}"), "No such option", code=2)
    monkeypatch.setattr(command, "_answer", lambda *_: (tmp_path / STEERING).read_text())
    refused(run(package, "-p", "x"), "No such file")
    monkeypatch.undo()
    named = Path(shutil.copy(image, tmp_path / f"{STEERING}.png"))
    done = run(package, "-i", named, "--show-tokens", tmp_path / f"{STEERING}-kept.png")
    assert done.code == 0
    assert done.err.count("]0;owned") == 3
    assert all(character.isprintable() for line in done.err.splitlines() for character in line)


def refused(done: Done, message: str, *, code: int = 1) -> None:
    (line,) = done.err.splitlines()
    assert done.code == code
    assert message in line
    assert all(character.isprintable() for character in line), line


def test_a_conversation_does_not_steer_the_terminal(package: Path, tmp_path: Path) -> None:
    done = shell([str(package), "--interactive"], text=f"/image {tmp_path / STEERING}\nWhat?\n")
    assert done.stderr.count("error: ") == 1
    assert all(character.isprintable() for line in done.stderr.splitlines() for character in line)


def test_json_is_printed_without_what_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": f"{STEERING}\x7fü"})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert "ü" in line
    assert json.loads(line) == {"text": f"{STEERING}\x7fü"}


def test_a_picture_that_cannot_be_written_is_one_line(
    run: Any, package: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    target = tmp_path / "kept.png"
    done = run(package, "-i", image, "-p", "x", "--max-new-tokens", 1, "--show-tokens", target)
    assert done.code == 1
    assert "No space left" in done.err
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples(run: Any) -> None:
    done = run("--help")
    assert done.code == 0
    assert "Examples:" in done.out
    for option in ("--image", "--prompt", "--show-tokens", "--stats", "--json", "--provider", "--max-new-tokens"):
        assert option in done.out
