"""The status page of a server with keys: none, a wrong one, the right one, and a reload."""

from page import CALL, chromium, say, watched

with chromium() as browser, watched(browser, "status-keys") as at:
    page = at.page
    page.goto(f"{CALL['base']}/status")
    page.wait_for_selector("#key")
    is_shown = page.locator("#status").is_visible()
    page.fill("#key", "a-key-that-is-wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-text.error")
    refused = page.inner_text("#key-text")
    wrong = at.look("refused")
    page.fill("#key", CALL["key"])
    page.keyboard.press("Enter")
    page.wait_for_selector("#tiles div")
    wrong += at.look("no-worker")
    page.reload()
    page.wait_for_selector("#tiles div")
    say(
        is_shown=is_shown,
        refused=refused,
        text=page.inner_text("body"),
        wrong=wrong,
        errors=at.errors,
    )
