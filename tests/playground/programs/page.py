"""What the playground's programs share: a page in Chromium that is watched while it is used."""

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright

TIMEOUT_MS = 120_000
CALL: dict[str, Any] = json.loads(sys.argv[1])
EXPECTED = "Failed to load resource"
"""Chromium's own word for an answer of 4xx or 5xx, or for none, whatever the page makes of it."""


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def wait_for_word() -> None:
    """Until the test has done its part."""
    sys.stdin.readline()


class Watched:
    """A page, and what went wrong on it.

    name: begins the names of its screenshots, which go into the call's folder `shots`.
    """

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        self.name = name
        self.errors: list[str] = []
        page.on("console", lambda message: self.note(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith(EXPECTED):
            self.errors.append(text)

    def open(self) -> None:
        self.page.goto(CALL["base"])
        self.page.wait_for_selector("#field-prompt")

    def look(self, view: str) -> list[str]:
        """Save a screenshot; what is wrong for people with disabilities on this view."""
        self.page.screenshot(path=str(Path(CALL["shots"]) / f"{self.name}-{view}.png"))
        # By `evaluate`, because the page's security policy refuses a script element.
        self.page.evaluate(Path(CALL["axe"]).read_text())
        found = self.page.evaluate("async () => (await axe.run()).violations")
        return [
            f"{view}: {each['id']} at {node['target']}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    def choose_example(self, prompt: str = "a red circle") -> None:
        self.page.locator(".example", has_text=prompt).click()
        self.page.wait_for_selector("#send:enabled")

    def send(self) -> dict[str, Any]:
        """Click Inpaint, and wait until the browser remembers the job or tells of a refusal.

        The request's JSON.
        """
        with self.page.expect_response("**/api/jobs") as answered:
            self.page.click("#send")
        self.page.wait_for_selector("#send-hint:not(:has-text('Sending…'))", state="attached")
        sent: dict[str, Any] = answered.value.request.post_data_json
        return sent

    def mask(self) -> str:
        """The mask that the page saves, as base64 of a PNG."""
        self.page.locator("summary", has_text="Mask").click()
        with self.page.expect_download() as download:
            self.page.click("text=Save the mask")
        return base64.b64encode(Path(download.value.path()).read_bytes()).decode()

    def stage(self, across: float, down: float) -> tuple[float, float]:
        """A point of the picture, each from 0 to 1, on the screen."""
        box = self.page.locator("#picture").bounding_box()
        assert box
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    def drag(
        self, start: tuple[float, float], end: tuple[float, float], button: Any = "left"
    ) -> None:
        mouse = self.page.mouse
        mouse.move(*self.stage(*start))
        mouse.down(button=button)
        mouse.move(*self.stage(*end), steps=6)
        mouse.up(button=button)

    def codes(self) -> dict[str, str]:
        """The code that the open result copies, by dialect and language."""
        self.page.evaluate(
            """() => {
                window.copied = "";
                navigator.clipboard.writeText = async (text) => { window.copied = text; };
            }"""
        )
        found = {}
        for dialect in self.page.locator("[aria-label=API] option").all_inner_texts():
            self.page.select_option("[aria-label=API]", dialect)
            for language in self.page.locator("[aria-label=Language] option").all_inner_texts():
                self.page.select_option("[aria-label=Language]", language)
                self.page.click("button.copy")
                self.page.wait_for_selector("text=Copied")
                found[f"{dialect} {language}"] = self.page.evaluate("window.copied")
        return found

    def finished(self) -> Locator:
        return self.page.locator(".card[data-state=finished]")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # As root, Chromium needs to be told to do without its sandbox.
        browser = playwright.chromium.launch(
            executable_path=CALL["chromium"], args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, name: str, **context: Any) -> Iterator[Watched]:
    given: dict[str, Any] = {"viewport": {"width": 1360, "height": 900}, **context}
    with browser.new_context(**given) as opened:
        opened.set_default_timeout(TIMEOUT_MS)
        yield Watched(opened.new_page(), name)
