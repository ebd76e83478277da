"""A server whose pictures have URLs of another origin than the page's."""

from page import chromium, say, watched

with chromium() as browser, watched(browser, "origin") as at:
    page = at.page
    at.open()
    at.choose_example()
    page.locator("#field-num_inference_steps").fill("1")
    at.send()
    page.wait_for_selector(".facts")
    page.get_by_role("tab", name="Answer").click()
    url = page.evaluate(
        "JSON.parse(document.querySelector('[role=tabpanel] pre').innerText).outputs[0].url"
    )
    shown = page.evaluate(
        "[...document.querySelectorAll('.layers img')].map((each) => each.naturalWidth)"
    )
    page.click("text=Back to painting")
    page.locator("summary", has_text="Picture").click()
    page.click("text=Another picture")
    page.fill("#url", url)
    page.click("text=Use URL")
    page.wait_for_selector("#world[style*='width: 512px']")
    hint = page.inner_text("#hint")
    at.drag((0.3, 0.3), (0.6, 0.6))
    sent = at.send()
    page.wait_for_selector(".card[data-state=finished] >> nth=1")
    say(page=page.url, url=url, shown=shown, hint=hint, sent=sent, errors=at.errors)
