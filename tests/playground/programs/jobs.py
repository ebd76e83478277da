"""Several jobs: one is cancelled, twenty fill the history, and a reload finds them."""

import base64
from pathlib import Path

from page import chromium, say, watched

JOBS = 20

with chromium() as browser, watched(browser, "jobs") as at:
    page = at.page
    at.open()
    at.choose_example()
    page.fill("#field-seed", "1")
    page.locator("#field-num_inference_steps").fill("150")
    at.send()
    at.send()
    page.locator(".card").first.get_by_role("button", name="Cancel").click()
    page.wait_for_selector(".card[data-state=cancelled]")
    say(step="cancelled", states=page.locator(".card-state").all_inner_texts())
    page.reload()
    page.wait_for_selector("#field-prompt")
    page.wait_for_selector(".card >> nth=1")
    page.keyboard.press("Shift+X")
    at.choose_example()
    page.keyboard.press("Shift+X")
    page.wait_for_selector(".card[data-state=cancelled] >> nth=1")
    say(step="cancelled by key", states=page.locator(".card-state").all_inner_texts())
    # While a result is open, no other takes its place.
    page.locator(".card").first.get_by_role("button", name="Open").click()
    page.wait_for_selector("#result:has-text('cancelled')")
    page.click("text=Remove ended")
    page.wait_for_selector(".card", state="detached")
    page.locator("#field-num_inference_steps").fill("1")
    for _ in range(JOBS):
        at.send()
    page.wait_for_selector(f".card[data-state=finished] >> nth={JOBS - 1}")
    wrong = at.look("twenty")
    page.reload()
    page.wait_for_selector(f".card >> nth={JOBS - 1}")
    page.locator(".card").last.get_by_role("button", name="Open").click()
    page.wait_for_selector(".facts")
    say(
        step="twenty",
        cards=at.finished().count(),
        is_editor_open=page.locator("#editor").is_visible(),
        wrong=wrong,
    )
    page.click("text=Variations")
    page.wait_for_selector(".card[data-state=finished] >> nth=20")
    page.locator(".card").first.get_by_role("button", name="Open").click()
    page.wait_for_selector(".strip button >> nth=3")
    wrong = at.look("samples")
    page.locator(".strip button").nth(2).click()
    facts = page.inner_text(".facts")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    sample = base64.b64encode(Path(download.value.path()).read_bytes()).decode()
    with page.expect_response("**/api/jobs") as answered:
        page.click("text=Again with this seed")
    page.wait_for_selector(".card[data-state=finished] >> nth=21")
    page.locator(".card").first.get_by_role("button", name="Open").click()
    page.wait_for_selector(".facts")
    with page.expect_download() as repeated:
        page.get_by_role("button", name="Download").click()
    say(
        step="again",
        facts=facts,
        names=[download.value.suggested_filename, repeated.value.suggested_filename],
        sent=answered.value.request.post_data_json,
        pictures=[sample, base64.b64encode(Path(repeated.value.path()).read_bytes()).decode()],
    )
    page.click("text=Use as next picture")
    page.wait_for_selector("#stage:visible")
    page.locator(".card").first.get_by_role("button", name="Remove").click()
    page.wait_for_selector(f".card >> nth={JOBS + 1}", state="detached")
    page.reload()
    page.wait_for_selector(".card")
    page.wait_for_selector("#field-prompt")
    say(step="removed", cards=page.locator(".card").count(), wrong=wrong, errors=at.errors)
