"""Loads masks that are wrong; says what the page finds, and what it sends after a cure."""

from page import CALL, Watched, chromium, say, watched

CHECKS = "**/api/masks/check"


def load(at: Watched, name: str) -> None:
    """Choose a file as the mask, and wait until it is checked."""
    with at.page.expect_response(CHECKS):
        at.page.set_input_files("#mask-file", CALL[name])


def codes(at: Watched) -> list[str]:
    """What is found, once it is shown."""
    at.page.wait_for_selector("#mask-findings details")
    found = at.page.locator(".finding").all()
    return [each.get_attribute("data-code") or "" for each in found]


def ask(at: Watched) -> None:
    with at.page.expect_response(CHECKS):
        at.page.get_by_role("button", name="Check mask").click()


def cure_inverted(at: Watched) -> None:
    at.open()
    at.choose_example("a red circle")
    load(at, "inverted")
    found, wrong = codes(at), at.look("1-inverted")
    text = at.page.locator(".finding").first.inner_text()
    with at.page.expect_response(CHECKS):
        at.page.get_by_role("button", name="Invert the mask").click()
    at.page.wait_for_selector("text=The mask looks fine")
    cured = codes(at)
    at.page.get_by_text("What the server sees").click()
    at.page.locator(".overlay img").scroll_into_view_if_needed()
    wrong += at.look("2-cured")
    mask = at.mask()
    at.send()
    at.finished().wait_for()
    say(step="inverted", found=found, text=text, cured=cured, mask=mask, wrong=wrong)


def find_others(at: Watched) -> None:
    at.open()
    at.choose_example("a red circle")
    load(at, "stretched")
    found, wrong = codes(at), at.look("3-stretched")
    say(step="stretched", found=found, text=at.page.locator(".finding").first.inner_text())
    at.page.keyboard.press("Shift+C")
    at.page.wait_for_selector(".finding", state="detached")
    ask(at)
    say(step="empty", found=codes(at), wrong=wrong + at.look("4-empty"))
    load(at, "soft")
    found, wrong = codes(at), at.look("5-soft")
    with at.page.expect_response(CHECKS):
        at.page.get_by_role("button", name="Use a soft mask").click()
    at.page.wait_for_selector("text=The mask looks fine")
    is_soft = at.page.is_checked("#field-soft_mask")
    say(step="soft", found=found, cured=codes(at), is_soft=is_soft, wrong=wrong)


def count_checks(at: Watched) -> None:
    """Nothing is sent while somebody paints."""
    sent: list[str] = []
    at.page.on("request", lambda request: sent.append(request.url))
    at.open()
    at.choose_example("a red circle")
    for down in (0.2, 0.4, 0.6):
        at.drag((0.2, down), (0.8, down))
    before = len([url for url in sent if url.endswith("/api/masks/check")])
    ask(at)
    codes(at)
    at.page.fill("#field-width", "100")
    at.page.locator("#field-width").press("Tab")
    at.page.wait_for_selector("#mask-findings details", state="detached")
    ask(at)
    at.page.wait_for_selector("text=The mask could not be checked")
    text = at.page.locator("#mask-findings").inner_text()
    say(step="counted", before=before, text=text, wrong=at.look("6-refused"))


VIEWS = {
    "light": {"color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}

with chromium() as browser:
    for name, context in VIEWS.items():
        with watched(browser, f"doctor-{name}", **context) as cured_at:
            cure_inverted(cured_at)
            say(step="errors", errors=cured_at.errors)
    with watched(browser, "doctor-dark", color_scheme="dark") as other_at:
        find_others(other_at)
        count_checks(other_at)
        say(step="errors", errors=other_at.errors)
