"""The API reference of a server with keys: no key, a wrong one, the right one; odd addresses."""

from page import CALL, chromium, say, watched

with chromium() as browser, watched(browser, "docs-key") as at:
    page = at.page
    said, wrong = [], []
    for number, key in enumerate((None, "a-key-that-is-wrong", CALL["key"])):
        # A1111's calls answer 401 with `Basic`, at which a browser may ask on its own.
        page.goto(f"{CALL['base']}docs#get/sdapi/v1/samplers")
        page.reload()
        page.wait_for_selector(".trial")
        if key is not None:
            page.click("#key-change")
            page.fill("#key", key)
            page.keyboard.press("Enter")
        page.click(".trial button.primary")
        page.wait_for_selector(".trial-answer[data-status]")
        said.append(page.inner_text("#key-text") if page.is_visible("#key-text") else "")
        wrong += at.look(f"docs-key-{number}")
    status = page.get_attribute(".trial-answer", "data-status")
    stored = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }])")
    page.locator("summary", has_text="curl").click()
    curl = page.inner_text(".curl pre")
    headings = []
    for odd in ("%", "%E0%A4%A", "__proto__", "constructor", "get/<img src=x onerror=alert(1)>"):
        page.goto("about:blank")
        page.goto(f"{CALL['base']}docs#{odd}")
        page.wait_for_selector("#call-list a", state="attached")
        headings.append(page.locator("#call h2").all_inner_texts())
    found = {"said": said, "status": status, "stored": stored, "curl": curl, "headings": headings}
    say(**found, wrong=wrong, errors=at.errors)
