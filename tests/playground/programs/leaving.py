"""Pictures that the server has removed since, and a server that is stopping."""

from page import CALL, chromium, say, wait_for_word, watched

with chromium() as browser, watched(browser, "leaving") as at:
    page = at.page
    at.open()
    at.choose_example()
    at.send()
    page.goto("about:blank")
    say(step="away")
    wait_for_word()
    at.open()
    page.wait_for_selector(".card:has-text('have been removed since')")
    page.locator(".card").first.get_by_role("button", name="Open").click()
    page.wait_for_selector("#result:has-text('removed')")
    wrong = at.look("expired")
    say(step="expired", result=page.inner_text("#result"), wrong=wrong)
    # A server that stops closes its connections within a second, so a look would come too late.
    # The answer is that of its probe.
    page.route(
        "**/readyz", lambda route: route.fulfill(status=503, json={"reason": CALL["reason"]})
    )
    page.wait_for_selector("#server-state:has-text('is stopping')")
    wrong = at.look("draining")
    say(step="draining", text=page.inner_text("#server-state"), wrong=wrong, errors=at.errors)
