"""Chromium, driven from the tests, and pages in it that watch what the browser complains about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

AXE: Final = Path(__file__).parent / "axe/node_modules/axe-core/axe.min.js"
CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not AXE.is_file(),
    reason="needs Chromium, and npm ci in tests/support/axe",
)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, complaints: str = "", **options: Any) -> Iterator[Page]:
    """Open a page in a fresh context; fail if it asks another host, or if the browser complains.

    Args:
        browser: the browser.
        url: address of the page.
        complaints: text that all complaints of the browser must contain; empty if there must be none.
        options: those of the context, such as ``color_scheme``.
    """
    with browser.new_context(**{"reduced_motion": "reduce", **options}) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        hosts: set[str] = set()
        found: list[str] = []
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: found.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.goto(url)
        yield page
        assert hosts - {""} == {urlsplit(url).netloc}  # data URLs have no host
        assert all(complaints and complaints in text for text in found), found


def accessibility_violations(page: Page) -> list[str]:
    """Return what axe finds wrong with the page as it is now."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{rule['id']}: {node['html']}: {node['failureSummary']}" for rule in found for node in rule["nodes"]]
