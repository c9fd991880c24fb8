"""Capture the page of promprune-serve: one sample, answered with few and with all visual tokens.

python scripts/figures/capture_page.py PRUNED_PACKAGE FULL_PACKAGE OUT.png

The packages are those of the embedded model with --ratio 0.12 and 1.0. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.browser import open_page, running_browser
from tests.support.server import running_server

OTHER_SAMPLE, SAMPLE = "30000005", "30000003"
WIDTH = 1280
PAGE_COLOURS = 24  # kept exactly; the other colours of the palette are those of the images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs=2)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with running_server(*arguments.packages) as server, running_browser() as browser:
        picture = compress(capture(browser, f"http://127.0.0.1:{server.port}/"))
    picture.save(arguments.out, optimize=True)
    print(f"{arguments.out}: {picture.width} x {picture.height} pixels, {arguments.out.stat().st_size} bytes")


def capture(browser: Browser, url: str) -> Image.Image:
    """Return the page with two answers, without what is below them."""
    options = {"viewport": {"width": WIDTH, "height": 900}, "device_scale_factor": 1.25}
    with open_page(browser, url, **options) as page:
        ask(page, OTHER_SAMPLE)  # the first answers after a start take longer
        ask(page, SAMPLE)
        page.locator("#question").blur()
        end = page.locator("#comparison").bounding_box()
        assert end is not None
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + 20}
        return Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")


def ask(page: Page, sample: str) -> None:
    """Ask the first question about a sample, and wait for both answers."""
    page.locator(f"[data-seed='{sample}']").click()
    page.locator(f"[data-seed='{sample}'][aria-pressed=true]").wait_for()
    page.locator("#question").press("Enter")
    page.locator("#comparison:not(:empty)").wait_for()


def compress(picture: Image.Image) -> Image.Image:
    """Return the picture with 256 colours: the most frequent ones, and others that are chosen by an octree."""
    frequent = [colour for colour, _ in Counter(picture.get_flattened_data()).most_common(PAGE_COLOURS)]
    others = picture.quantize(256 - PAGE_COLOURS, Image.Quantize.FASTOCTREE).getpalette() or []
    palette = np.array([*np.ravel(frequent), *others], np.int32).reshape(-1, 3)
    colours, place = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_inverse=True)
    nearest = np.concatenate(
        [
            ((part[:, None] - palette) ** 2).sum(2).argmin(1)
            for part in np.split(colours, range(4096, len(colours), 4096))
        ]
    )
    compressed = Image.fromarray(nearest[place].reshape(picture.height, picture.width).astype(np.uint8), "P")
    compressed.putpalette(palette.astype(np.uint8).tobytes())
    return compressed


if __name__ == "__main__":
    main()
