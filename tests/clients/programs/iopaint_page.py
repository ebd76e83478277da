"""IOPaint's page in Chromium: loads a picture, paints a stroke, asks for it, saves the result.

base: the page's URL. Beside the pictures, a line has the mask as the page sent it, and the
notifications that the page showed before.
"""

import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from answering import Call
from playwright.sync_api import Page, sync_playwright

TIMEOUT_MS = 120_000
CALL_OF_PAINT = "**/api/v1/inpaint"


def paint(page: Page, call: Call) -> dict[str, Any]:
    open_with_settings(page, call)
    with page.expect_response("**/api/v1/gen-info"):
        page.set_input_files("input[type=file]", call["image"])
    draw_stroke(page)
    page.get_by_placeholder("I want to repaint of...").fill(call["prompt"])
    notes = notifications(page)
    with page.expect_response(CALL_OF_PAINT) as answered:
        page.get_by_role("button", name="Paint", exact=True).click()
    sent = answered.value.request.post_data_json
    line = {"mask": sent["mask"].split(",")[1], "notifications": notes}
    if not answered.value.ok:
        page.get_by_role("status").first.wait_for()
        text = " ".join(notifications(page))
        return {**line, "error": str(answered.value.status), "text": text}
    return {**line, "pictures": [saved(page)]}


def open_with_settings(page: Page, call: Call) -> None:
    """Open the page, set its sliders by what it stores, and open it again."""
    page.goto(call["base"])
    page.get_by_role("button", name="Paint", exact=True).wait_for()
    settings = {"sdSteps": call["steps"], "seed": call["seed"], "seedFixed": True, "sdMaskBlur": 0}
    page.evaluate(
        """(settings) => {
            const stored = JSON.parse(localStorage.ZUSTAND_STATE);
            Object.assign(stored.state.settings, settings);
            localStorage.ZUSTAND_STATE = JSON.stringify(stored);
        }""",
        settings,
    )
    page.reload()
    page.wait_for_selector("input[type=file]", state="attached")


def draw_stroke(page: Page) -> None:
    """With the mouse, over a hundred pixels of the picture."""
    page.wait_for_selector("canvas")
    # The page draws the picture first and moves it into the middle then.
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector("canvas").getBoundingClientRect();
            return Math.abs(canvas.x + canvas.width / 2 - innerWidth / 2) < 1;
        }"""
    )
    box = page.locator("canvas").last.bounding_box()
    assert box
    page.mouse.move(box["x"] + 80, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 140, steps=8)
    page.mouse.up()


def notifications(page: Page) -> list[str]:
    return page.get_by_role("status").all_inner_texts()


def saved(page: Page) -> str:
    """The file that the page lets its user save, as base64."""
    # The button is disabled until the page has taken the result.
    page.locator("button:enabled", has_text="Paint").wait_for()
    with page.expect_download() as download:
        page.keyboard.press("Control+s")
    return base64.b64encode(Path(download.value.path()).read_bytes()).decode()


with sync_playwright() as playwright:
    # As root, Chromium needs to be told to do without its sandbox.
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    for each in json.loads(sys.argv[1]):
        with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
            context.set_default_timeout(TIMEOUT_MS)
            print(json.dumps(paint(context.new_page(), each)), flush=True)
    browser.close()
