"""The page at ``/`` in a real browser: asking, streaming, comparing, errors, the keyboard, accessibility."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from promprune.embedded import scenes
from promprune.runtime import VisionLanguagePipeline
from promprune.runtime.engine.engine import Engine
from tests.support.browser import accessibility_violations, needs_browser, open_page, running_browser
from tests.support.fake_package import NUM_TOKENS, SIDE, FakeModel, write_fake_package
from tests.support.server import RunningServer, data_url, encoded, picture, running_server

expect.set_options(timeout=20_000)

PRUNED, FULL = "fake@0.25", "fake@1.0"
QUESTION = "What is the large blue digit?"
SAMPLE = 30_000_003
MAX_NEW_TOKENS = 40
KEY = "a-key-0123456789abcdef"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One model with 4 and with all 16 visual tokens."""
    folder = tmp_path_factory.mktemp("packages")
    write_fake_package(folder / "pruned")
    write_fake_package(folder / "full", FakeModel(keep_tokens=NUM_TOKENS))
    return [folder / "pruned", folder / "full"]


@pytest.fixture(scope="module")
def server(packages: list[Path]) -> Iterator[RunningServer]:
    with running_server(*packages, max_body_bytes=300_000, max_new_tokens=MAX_NEW_TOKENS) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with open_page(browser, url_of(server)) as opened:
        expect(opened.locator("#model")).to_have_value(PRUNED)
        yield opened


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every step of the engine take 50 ms more."""
    step = Engine.step

    def slow_step(self: Engine) -> Any:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow_step)


def url_of(server: RunningServer) -> str:
    return f"http://127.0.0.1:{server.port}/"


def take_sample(page: Page) -> None:
    page.get_by_alt_text("Sample: four objects").click()
    expect(page.locator("#question")).to_have_value(QUESTION)


def choose_file(page: Page, content: bytes, kind: str = "image/png") -> None:
    page.locator("#file").set_input_files([{"name": "chosen.png", "mimeType": kind, "buffer": content}])


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#stop")).to_be_hidden()


def card(page: Page, number: int) -> Any:
    return page.locator(".card").nth(number)


def fact(page: Page, number: int, name: str) -> str:
    return " ".join(card(page, number).locator(f"[data-fact={name}]").inner_text().split())


# ------------------------------------------------------------------------------------------------ without a browser


def test_everything_that_the_page_loads_is_served_and_nothing_else_is_allowed(server: RunningServer) -> None:
    index = server.client.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.strip().split(" ", 1) for rule in index.headers["content-security-policy"].split(";"))
    assert policy.pop("img-src") == "'self' data:"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert policy["default-src"] == "'none'"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', index.text)
    assert len(loaded) == 8
    for address in (*loaded, "page/api.js", "page/card.js", "page/view.js"):
        response = server.client.get(f"/{address}")
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == index.headers["content-security-policy"]
    for name in ("page/none.js", "page/index.html", "page/routes.py", "page/../routes.py", "page/"):
        assert server.client.get(f"/{name}").status_code == 404


def test_samples_are_scenes_and_their_questions_have_answers(server: RunningServer) -> None:
    listed = Path(scenes.__file__).with_name("questions.jsonl").read_text().splitlines()
    known = {scene["seed"]: {text for _, text, _ in scene["questions"]} for scene in map(json.loads, listed)}
    samples = re.findall(r'data-seed="(\d+)"\s+data-questions=\'([^\']+)\'', server.client.get("/").text)
    assert len(samples) == 4
    for seed, questions in samples:
        content = server.client.get(f"/page/sample-{seed}.png").content
        scene = scenes.render_scene(int(seed))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(scene.image))
        assert set(json.loads(questions)) <= known[int(seed)]


# --------------------------------------------------------------------------------------------- asking and comparing


@needs_browser
def test_two_answers_stand_side_by_side_with_what_was_kept(page: Page, packages: list[Path]) -> None:
    take_sample(page)
    ask(page)
    scene = scenes.render_scene(SAMPLE).image
    for number, package in enumerate(packages):
        with VisionLanguagePipeline.from_package(package, provider="cpu") as pipeline:
            wanted = pipeline.generate([scene], QUESTION, max_new_tokens=MAX_NEW_TOKENS)
        shown = card(page, number)
        assert shown.locator("h2").inner_text() == (PRUNED, FULL)[number]
        assert shown.locator(".answer").inner_text().strip() == wanted.text.strip()
        assert fact(page, number, "prompt") == f"{wanted.timings.prompt_tokens} tokens"
        assert fact(page, number, "answer") == f"{len(wanted.token_ids)} tokens"
        assert re.fullmatch(r"[\d.]+ (ms|s)", fact(page, number, "first"))
        assert re.fullmatch(r"[\d.]+ tokens/s", fact(page, number, "speed"))
    assert fact(page, 0, "tokens") == "16 → 4"
    assert fact(page, 1, "tokens") == "16"
    assert fact(page, 1, "entropy") == "\N{EN DASH}"
    comparison = page.locator("#comparison").inner_text()
    assert comparison.startswith("With 4 instead of 16 visual tokens, the first token came after ")
    same = card(page, 0).locator(".answer").inner_text() == card(page, 1).locator(".answer").inner_text()
    assert comparison.endswith("the answers are the same." if same else "the answers differ.")


@needs_browser
def test_kept_tokens_are_drawn_in_their_places_with_two_kinds_of_frame(page: Page, packages: list[Path]) -> None:
    take_sample(page)
    ask(page)
    with VisionLanguagePipeline.from_package(packages[0], provider="cpu") as pipeline:
        selection = pipeline.generate([scenes.render_scene(SAMPLE).image], QUESTION, max_new_tokens=1).selection[0]
    indices, mask = selection.token_indices, selection.saliency_mask
    assert mask is not None
    assert 0 < mask.sum() < 4, "both kinds have to occur"
    assert fact(page, 0, "entropy") == f"{selection.spectral_entropy:.3f}"
    for reason, kept in (("saliency", indices[mask]), ("coverage", indices[~mask])):
        assert f"{len(kept)} for {reason}" in card(page, 0).locator(".legend").inner_text()
        frame = page.locator(f".view .frame.{reason}")
        corners = re.findall(r"M([\d.]+) ([\d.]+)h", frame.get_attribute("d") or "")
        patches = [(int(float(x)) * 4 // SIDE, int(float(y)) * 4 // SIDE) for x, y in corners]
        assert patches == [(index % 4, index // 4) for index in kept]
        assert bool(frame.get_attribute("stroke-dasharray")) == (reason == "coverage")
    # On the screen: the centre of a kept patch is as bright as without pruning, that of a dropped one is dimmed.
    pruned, full = (np.asarray(Image.open(io.BytesIO(card(page, n).locator(".view").screenshot()))) for n in (0, 1))
    assert pruned.shape == full.shape
    height, width = pruned.shape[:2]
    for token in range(NUM_TOKENS):
        place = (token // 4 * 2 + 1) * height // 8, (token % 4 * 2 + 1) * width // 8
        share = pruned[place][:3].mean() / full[place][:3].mean()
        assert share == pytest.approx(1.0 if token in indices else 0.38, abs=0.03)
    assert card(page, 1).locator("path").count() == 0


@needs_browser
def test_tokens_of_several_grids_are_drawn_in_their_boxes(browser: Browser, server: RunningServer) -> None:
    grids = [
        {"rows": 2, "columns": 2, "left": 0, "top": 0, "width": 40, "height": 40},
        {"rows": 3, "columns": 2, "left": 40, "top": 0, "width": 60, "height": 90},
    ]
    image = {
        "grids": grids,
        "view_width": 100,
        "view_height": 90,
        "view": data_url(encoded(picture(0, 100, 90))),
        "visual_tokens": 10,
        "kept_tokens": 3,
        "token_indices": [3, 4, 9],
        "saliency": [True, True, False],
        "saliency_count": 2,
        "spectral_entropy": 0.5,
        "policy": "promprune",
    }
    event = {"choices": [{"index": 0, "delta": {"content": "a"}}], "promprune": {"images": [image]}}
    with open_page(browser, url_of(server)) as page:
        answer_with(page, body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
        take_sample(page)
        ask(page)
        view = card(page, 0).locator(".view svg")
        assert view.get_attribute("viewBox") == "0 0 100 90"
        box = r"M(\S+) (\S+)h(\S+)v(\S+)h\S+z"
        dropped = view.locator(".dropped").get_attribute("d").removeprefix("M0 0H100V90H0Z")
        assert re.findall(box, dropped) == [("20", "20", "20", "20"), ("40", "0", "30", "30"), ("70", "60", "30", "30")]
        saliency = re.findall(box, "".join(path.get_attribute("d") for path in view.locator(".frame.saliency").all()))
        assert saliency == [("21.6", "21.6", "16.8", "16.8"), ("42.4", "2.4", "25.2", "25.2")]
        coverage = re.findall(box, view.locator(".frame.coverage").get_attribute("d"))
        assert coverage == [("72.4", "62.4", "25.2", "25.2")]


@needs_browser
def test_the_image_can_be_enlarged(page: Page) -> None:
    take_sample(page)
    ask(page)
    small = card(page, 0).locator(".view svg").bounding_box()
    card(page, 0).get_by_role("button", name="Enlarge").press("Enter")
    large = page.locator("dialog svg").bounding_box()
    assert small["width"] < large["width"] <= 1280
    assert small["height"] < large["height"] <= 720
    assert page.locator("dialog .frame").count() == 2
    assert accessibility_violations(page) == []
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == "Enlarge"
    card(page, 1).get_by_role("button", name="Enlarge").click()
    page.get_by_role("button", name="Close").click()
    expect(page.locator("dialog")).to_be_hidden()


@needs_browser
def test_the_ratios_can_be_chosen(page: Page) -> None:
    assert page.locator("#other").input_value() == FULL
    page.locator("#model").select_option(FULL)
    assert page.locator("#other").input_value() == PRUNED
    take_sample(page)
    page.locator("#other").select_option("")
    expect(card(page, 1)).to_be_hidden()
    ask(page)
    assert fact(page, 0, "tokens") == "16"
    assert page.locator("#comparison").inner_text() == ""
    page.locator("#other").select_option(PRUNED)
    expect(card(page, 1)).to_be_visible()
    assert card(page, 0).locator(".answer").inner_text() != ""
    page.locator("#model").select_option(PRUNED)
    assert [card(page, number).locator(".answer").inner_text() for number in (0, 1)] == ["", ""]


@needs_browser
def test_an_image_is_chosen_dropped_or_pasted(page: Page) -> None:
    choose_file(page, encoded(picture(1)))
    expect(page.locator("#preview")).to_be_visible()
    chosen = page.locator("#preview").get_attribute("src")
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """async ([event, holder, url]) => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], `by ${event}.png`, {type: "image/png"}));
                const kind = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(new kind(event, {[holder]: transfer, bubbles: true}));
            }""",
            [event, holder, f"data:image/png;base64,{chosen.split(',')[1]}"],  # type: ignore[union-attr]
        )
        expect(page.locator("#drop-hint")).to_have_text(f"by {event}.png")
        assert page.locator("#preview").get_attribute("src") == chosen
    page.locator("#question").fill("What is it?")
    ask(page)
    assert fact(page, 0, "tokens") == "16 → 4"


# ------------------------------------------------------------------------------------------------------ streaming


@needs_browser
def test_an_answer_grows_and_can_be_stopped(page: Page, server: RunningServer, slow_steps: None) -> None:
    take_sample(page)
    page.get_by_role("button", name="Ask").click()
    answer = card(page, 0).locator(".answer")
    expect(answer).to_have_attribute("aria-busy", "true")
    assert answer.get_attribute("aria-live") == "polite"
    expect(card(page, 1).locator(".note")).to_contain_text("Waits for the other answer")
    expect(card(page, 0).locator(".view svg")).to_be_visible()
    lengths = []
    while len(lengths) < 3:
        lengths = sorted({*lengths, len(answer.inner_text())})
    page.get_by_role("button", name="Stop").click()
    server.wait_until_idle()
    expect(card(page, 0).locator(".note")).to_have_text("Stopped.")
    stopped = answer.inner_text()
    assert len(stopped) >= lengths[-1] > lengths[0]
    assert card(page, 1).locator(".note").inner_text() == ""
    assert page.locator("#comparison").inner_text() == ""
    page.wait_for_timeout(100)
    assert answer.inner_text() == stopped
    assert page.evaluate("document.activeElement.id") == "ask"


@needs_browser
def test_another_choice_ends_and_forgets_the_answer(page: Page, server: RunningServer, slow_steps: None) -> None:
    for change in (lambda: choose_file(page, encoded(picture(1))), lambda: page.locator("#model").select_option(FULL)):
        take_sample(page)
        page.get_by_role("button", name="Ask").click()
        expect(card(page, 0).locator(".view svg")).to_be_visible()
        change()
        expect(page.locator("#stop")).to_be_hidden()
        server.wait_until_idle()
        for number in (0, 1):
            assert card(page, number).get_attribute("data-state") == "empty"
            assert card(page, number).locator(".text").inner_text().strip() == ""


@needs_browser
def test_nothing_moves_if_motion_is_unwanted(browser: Browser, server: RunningServer, slow_steps: None) -> None:
    for wish, count in (("reduce", 0), ("no-preference", 1)):
        with open_page(browser, url_of(server), reduced_motion=wish) as page:
            take_sample(page)
            page.mouse.move(0, 0)
            page.locator("#question").press("Enter")
            expect(card(page, 0)).to_have_attribute("data-state", "running")
            page.wait_for_timeout(200)  # the end of transitions
            assert page.evaluate("document.getAnimations().length") == count
            page.keyboard.press("Escape")
            expect(page.locator("#stop")).to_be_hidden()
            server.wait_until_idle()


# --------------------------------------------------------------------------------------------------------- errors


def answer_with(page: Page, status: int = 200, body: str = "", **headers: str) -> None:
    """Answer the page's questions in place of the server."""

    def fulfill(route: Route) -> None:
        route.fulfill(
            status=status, body=body, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )

    page.route("**/v1/chat/completions", fulfill)


def error_body(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})


TEXT_EVENT = 'data: {"choices": [{"index": 0, "delta": {"content": "begun"}}]}\n\n'


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"status": 429, "body": error_body("busy"), "retry_after": "7"}, "The server is busy. Try again in 7 seconds."),
    ({"status": 429, "body": error_body("busy"), "retry_after": "1"}, "The server is busy. Try again in 1 second."),
    ({"status": 413, "body": error_body("x")}, "The image is too large for this server. Choose a smaller one."),
    ({"status": 504, "body": error_body("x")}, "The answer took longer than this server allows."),
    ({"status": 502, "body": "<html>"}, "The server answered with status 502."),
    ({"body": f"{TEXT_EVENT}data: {error_body('the engine failed')}\n\n"}, "The engine failed."),
    ({"body": TEXT_EVENT}, "The connection broke before the answer was complete."),
]


@needs_browser
def test_errors_of_one_answer_are_sentences(browser: Browser, server: RunningServer) -> None:
    with open_page(browser, url_of(server), "Failed to load resource") as page:
        take_sample(page)
        for answer, sentence in ERRORS:
            answer_with(page, **answer)
            ask(page)
            for number in (0, 1):
                assert card(page, number).locator(".error").inner_text() == sentence
                assert card(page, number).locator(".answer").inner_text() == ("" if "status" in answer else "begun")
            page.unroute("**/v1/chat/completions")
        ask(page)
        assert card(page, 0).locator(".error").inner_text() == ""
        assert card(page, 0).locator(".answer").inner_text() != ""


@needs_browser
def test_markup_in_an_answer_is_text(page: Page) -> None:
    markup = "<img src=http://elsewhere.invalid/x onerror=alert(1)><script>alert(2)</script>"
    event = {"choices": [{"index": 0, "delta": {"content": markup}}]}
    answer_with(page, body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
    take_sample(page)
    ask(page)
    assert card(page, 0).locator(".answer").inner_text() == markup


@needs_browser
def test_the_server_refuses_an_image_in_a_sentence(browser: Browser, server: RunningServer) -> None:
    with open_page(browser, url_of(server), "Failed to load resource") as page:
        page.locator("#question").fill("What is it?")
        choose_file(page, b"no image")
        ask(page)
        assert re.fullmatch(r"[A-Z].*image.*\.", card(page, 0).locator(".error").inner_text())
        choose_file(page, encoded(picture(1, 500, 400)))  # noise: 600,000 bytes
        ask(page)
        assert "too large" in card(page, 0).locator(".error").inner_text()
        choose_file(page, b"x", "text/plain")
        assert page.locator("#alert").inner_text().startswith("This is not an image.")


@needs_browser
def test_what_is_missing_is_said(page: Page) -> None:
    alert = page.locator("#alert")
    page.get_by_role("button", name="Ask").click()
    expect(alert).to_contain_text("Choose an image first")
    page.locator("#question").fill("")
    take_sample(page)
    expect(alert).to_have_text("")
    page.locator("#question").fill("  ")
    page.get_by_role("button", name="Ask").click()
    expect(alert).to_have_text("Type a question first.")
    assert page.evaluate("document.activeElement.id") == "question"


@needs_browser
def test_a_server_that_is_gone_is_said_once(browser: Browser, packages: list[Path]) -> None:
    with running_server(*packages) as server:
        opened = open_page(browser, url_of(server), "Failed to load resource")
        page = opened.__enter__()
        take_sample(page)
    ask(page)
    expect(page.locator("#alert")).to_contain_text("The server does not answer.")
    assert [card(page, number).locator(".error").inner_text() for number in (0, 1)] == ["", ""]
    page.get_by_alt_text("Sample: ten objects").click()
    expect(page.locator("#alert")).to_contain_text("The server does not answer.")
    opened.__exit__(None, None, None)


@needs_browser
def test_a_key_is_asked_for_and_not_stored(browser: Browser, packages: list[Path]) -> None:
    with (
        running_server(*packages, api_keys=(KEY,)) as server,
        open_page(browser, url_of(server), "Failed to load resource") as page,
    ):
        expect(page.locator("#key")).to_be_focused()
        assert page.locator("#key-alert").inner_text() == ""
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-alert")).to_have_text("The server does not accept this key.")
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        take_sample(page)
        ask(page)
        assert card(page, 1).locator(".answer").inner_text() != ""
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


# ------------------------------------------------------------------------------------- keyboard and accessibility


def focus_next(page: Page) -> str:
    """Press Tab, check that the focus is visible, and return what has it."""
    page.keyboard.press("Tab")
    name, outline = page.evaluate(
        """() => {
            const element = document.activeElement;
            const shown = element.id === "file" ? element.nextElementSibling : element;
            const style = getComputedStyle(shown);
            const name = element.id || element.textContent.trim() || element.dataset.seed;
            return [name, `${style.outlineStyle} ${style.outlineWidth}`];
        }"""
    )
    assert outline == "solid 3px", name
    return str(name)


@needs_browser
def test_the_keyboard_is_enough(page: Page) -> None:
    order = [focus_next(page) for _ in range(10)]
    samples = ["30000003", "30000005", "30000018", "30000009"]
    assert order == ["file", *samples, "question", "model", "other", "ask", "How to read this"]
    for _ in range(8):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#preview")).to_be_visible()
    assert page.locator("[data-seed='30000003']").get_attribute("aria-pressed") == "true"
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Control+A")
    page.keyboard.type("What")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("is it?")
    assert page.locator("#question").input_value() == "What\nis it?"
    page.keyboard.press("Enter")
    expect(page.locator("#comparison")).to_contain_text("With 4 instead of 16")
    assert page.evaluate("document.activeElement.id") == "question"


@needs_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing(browser: Browser, server: RunningServer, scheme: str, width: int) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with open_page(browser, url_of(server), "Failed to load resource", **options) as page:
        expect(page.locator("#model")).to_have_value(PRUNED)
        assert accessibility_violations(page) == []
        take_sample(page)
        ask(page)
        page.locator("summary").click()
        assert accessibility_violations(page) == []
        answer_with(page, 429, error_body("busy"))
        ask(page)
        answer_with(page, 401, error_body("no key"))
        page.locator("#question").press("Enter")
        expect(page.locator("#key")).to_be_focused()
        assert accessibility_violations(page) == []


@needs_browser
def test_nothing_is_wider_than_the_screen(page: Page) -> None:
    take_sample(page)
    page.locator("#question").fill("w" * 100)
    ask(page)
    page.locator("summary").click()
    for width in (320, 390, 700, 1000):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
