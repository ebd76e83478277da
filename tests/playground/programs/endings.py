"""Jobs that end otherwise than with the picture that was asked for: flagged, and failed."""

from page import CALL, chromium, say, watched

with chromium() as browser:
    for view, context in (
        ("light", {}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 844}}),
    ):
        with watched(browser, f"endings-{view}", **context) as at:
            page = at.page
            at.open()
            at.choose_example()
            page.fill("#field-prompt", CALL["unsafe"])
            at.send()
            page.wait_for_selector(".card[data-state=finished]")
            page.locator(".card").first.get_by_role("button", name="Open").click()
            page.wait_for_selector(".facts")
            flagged = page.inner_text("#result")
            wrong = at.look("flagged")
            page.locator(".card").first.get_by_role("button", name="Remove").click()
            page.wait_for_selector(".card", state="detached")
            at.open()
            at.choose_example()
            page.locator("#advanced summary").click()
            page.fill("#field-clip_skip", CALL["clip_skip"])
            at.send()
            page.wait_for_selector(".card[data-state=failed]")
            page.locator(".card").first.get_by_role("button", name="Open").click()
            page.wait_for_selector("#result:has-text('clip_skip')")
            say(
                step=view,
                flagged=flagged,
                failed=page.inner_text("#result"),
                wrong=wrong + at.look("failed"),
                errors=at.errors,
            )
