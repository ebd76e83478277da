"""A server with keys: a wrong one, then the right one."""

from page import CALL, chromium, say, watched

with chromium() as browser, watched(browser, "keys") as at:
    page = at.page
    page.goto(CALL["base"])
    page.wait_for_selector("#key")
    wrong = at.look("key-wanted")
    page.fill("#key", "a-key-that-is-wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-text.error")
    refused = page.inner_text("#key-text")
    wrong += at.look("key-wrong")
    page.fill("#key", CALL["key"])
    page.keyboard.press("Enter")
    page.wait_for_selector("#field-prompt")
    at.choose_example()
    page.click("#advanced summary")
    page.fill("#field-webhook", CALL["webhook"])
    at.send()
    page.wait_for_selector(".facts")
    stored = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }])")
    code = page.inner_text(".block pre")
    page.get_by_role("tab", name="Webhook").click()
    page.wait_for_selector("[role=tabpanel] li:has-text('500')")
    wrong += at.look("webhook")
    page.click("text=Redeliver")
    page.wait_for_selector("[role=tabpanel] li:has-text('200')")
    say(refused=refused, code=code, stored=stored, wrong=wrong, errors=at.errors)
