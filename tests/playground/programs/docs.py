"""The API reference: every safe example is sent from the page, in light, dark and on a phone."""

from typing import Any

from page import CALL, Watched, chromium, say, watched
from playwright.sync_api import Locator

VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
SHOWN = "post/v1/images/edits"


def open_reference(at: Watched, call: str = "") -> None:
    at.page.goto(f"{CALL['base']}docs{'#' if call else ''}{call}")
    at.page.wait_for_selector("#call-list a", state="attached")


def answer_of(at: Watched) -> dict[str, Any]:
    """Send the form; what the page makes of the answer."""
    at.page.click(".trial button.primary")
    found = at.page.locator(".trial-answer[data-status]")
    found.wait_for()
    pictures = found.locator("img")
    for picture in pictures.all():
        wait_until_shown(picture)
    return {
        "status": int(found.get_attribute("data-status") or 0),
        "text": found.inner_text(),
        "pictures": pictures.count(),
    }


def wait_until_shown(picture: Locator) -> None:
    picture.evaluate("(image) => image.decode()")


def look_around(at: Watched) -> dict[str, Any]:
    """The overview, the search, and one call before and after it is sent."""
    page = at.page
    open_reference(at)
    wrong = at.look("docs-overview")
    page.keyboard.press("/")
    page.keyboard.type("edit openai")
    links = page.locator("#call-list a:visible")
    found = links.all_inner_texts()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector(".trial")
    url = page.url
    wrong += at.look("docs-call")
    answer = answer_of(at)
    wrong += at.look("docs-answer")
    page.locator(".answer summary").first.click()
    page.locator("summary", has_text="curl").click()
    wrong += at.look("docs-fields")
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return {"found": found, "url": url, "answer": answer, "wrong": wrong, "overflow": overflow}


def send_examples(at: Watched) -> list[dict[str, Any]]:
    """The answers to the calls of the test, in every form of their bodies."""
    answers = []
    for call in CALL["calls"]:
        open_reference(at, call)
        at.page.wait_for_selector(".trial")
        forms = at.page.locator("[aria-label='Form of the body'] option").all_inner_texts()
        for form in forms or [""]:
            at.page.evaluate(
                "document.querySelector('.trial-answer').removeAttribute('data-status')"
            )
            if len(forms) > 1:
                at.page.select_option("[aria-label='Form of the body']", form)
            answers.append({"call": call, "form": form, **answer_of(at)})
    return answers


def send_a_file(at: Watched) -> dict[str, Any]:
    """Another picture by the file picker."""
    open_reference(at, SHOWN)
    before = at.page.locator(".picture img").first.get_attribute("src")
    at.page.set_input_files("[aria-label='File for image']", CALL["picture"])
    at.page.wait_for_function(
        "(before) => document.querySelector('.picture img').src !== before", arg=before
    )
    at.page.fill(".json", "{")
    refusal = at.page.inner_text(".trial .error")
    return {"refusal": refusal}


with chromium() as browser:
    for name, context in VIEWS.items():
        with watched(browser, name, **context) as at:
            say(view=name, **look_around(at), errors=at.errors)
    with watched(browser, "all") as at:
        say(answers=send_examples(at), file=send_a_file(at), errors=at.errors)
        open_reference(at, SHOWN)
        sizes = at.page.evaluate(
            """() => performance.getEntriesByType("resource")
                .filter((each) => each.name.includes("/playground/"))
                .map((each) => each.decodedBodySize)"""
        )
        say(sizes=sizes)
