"""A full queue, a value out of range, a picture of another host, and a file that is none."""

from page import CALL, chromium, say, watched

with chromium() as browser, watched(browser, "refusals") as at:
    page = at.page
    page.clock.install()
    at.open()
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"none"})
    page.wait_for_selector("#empty-error:has-text('not a picture')")
    at.choose_example()
    page.click("#advanced summary")
    page.select_option("#field-model", CALL["model"])
    model = page.inner_text("#model-facts")
    page.fill(".lora input", "0.5")
    wrong = at.look("model")
    page.select_option("#field-model", "away")
    away = page.inner_text("#model-facts")
    page.select_option("#field-model", "")
    page.fill("#field-width", "1032")
    at.send()
    page.wait_for_selector("#error-width:not(:empty)")
    field = page.inner_text("#error-width")
    page.fill("#field-width", "")
    at.send()
    page.wait_for_selector(".card-state:has-text('number 1 in the queue')")
    at.send()
    page.wait_for_selector("#send-error:has-text('Try again in')")
    full = page.inner_text("#send-error")
    wrong += at.look("full")
    is_enabled = page.locator("#send").is_enabled()
    page.clock.fast_forward(31_000)
    page.wait_for_selector("#send:enabled")
    page.locator("summary", has_text="Picture").click()
    page.click("text=Another picture")
    page.fill("#url", CALL["url"])
    page.click("text=Use URL")
    page.wait_for_selector("#stage:visible")
    at.drag((0.3, 0.3), (0.6, 0.6))
    wrong += at.look("url")
    page.locator(".card").first.get_by_role("button", name="Cancel").click()
    page.wait_for_selector(".card[data-state=cancelled]")
    sent = at.send()
    say(
        field=field,
        full=full,
        is_enabled=is_enabled,
        sent=sent,
        models=[model, away],
        wrong=wrong,
        errors=at.errors,
    )
