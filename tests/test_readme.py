"""The README's commands do what the README shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = "$ "


def shown() -> list[tuple[str, list[str]]]:
    """Every command of the README's ``console`` blocks, with the output shown under it."""
    examples: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            if line.startswith(PROMPT):
                examples.append((line.removeprefix(PROMPT), []))
            elif line.strip():
                examples[-1][1].append(line)
    return examples


def without_timings(text: str) -> str:
    """Blank out what differs from run to run: times, rates, rounding errors, and the width of the terminal."""
    text = re.sub(r"\d+(\.\d+)?(?= (s|ms|tokens/s|MB)\b)", "#", text)
    text = re.sub(r"\d(\.\d+)?e-\d+", "#", text)
    return " ".join(text.split())


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the README's relative paths work, and into which its outputs may go."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    command = "scripts/run pytest -n 2 --dist loadfile\n"
    assert command in README
    assert command in (ROOT / ".ci/run").read_text()


def test_the_readme_shows_the_main_job() -> None:
    commands = [command for command, _ in shown()]
    assert commands[0] == "scripts/run promprune-export --ratio 0.12"
    assert any(command.startswith("scripts/run promprune-run ") for command in commands)
    assert all(output for _, output in shown())


def test_every_command_prints_what_the_readme_shows(clone: Path) -> None:
    for command, wanted in shown():
        result = subprocess.run(shlex.split(command), cwd=clone, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        printed = {without_timings(line) for line in (result.stdout + result.stderr).splitlines()}
        missing = [line for line in wanted if without_timings(line) not in printed]
        assert not missing, f"{command} did not print {missing}, but:\n{result.stdout}{result.stderr}"


def test_the_served_page_opens(clone: Path) -> None:
    block = next(
        block for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) if "promprune-serve" in block
    )
    export, serve = block.strip().splitlines()
    for command in (shown()[0][0], export):
        subprocess.run([*shlex.split(command), "--no-verify", "--force"], cwd=clone, capture_output=True, check=True)
    server = subprocess.Popen([*shlex.split(serve), "--port", "0"], cwd=clone, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        listening = next(line for line in server.stderr if '"listening"' in line)
        url = json.loads(listening)["url"]
        with urllib.request.urlopen(url) as page:
            assert b"promprune" in page.read()
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0


def test_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def anchors(document: Path) -> set[str]:
    """Every anchor of a page: those of its headings, as GitHub names them, and those set with ``<a id>``."""
    text = document.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_links_lead_to_an_anchor() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", document.read_text(encoding="utf-8")):
            page = document.parent / target if target else document
            assert anchor in anchors(page), f"{document.name} links to {target}#{anchor}"
