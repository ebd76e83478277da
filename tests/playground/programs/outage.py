"""The server goes away while a job runs, and comes back."""

from page import chromium, say, wait_for_word, watched

with chromium() as browser, watched(browser, "outage") as at:
    page = at.page
    at.open()
    at.choose_example()
    page.locator("#field-num_inference_steps").fill("100")
    at.send()
    page.wait_for_selector(".card progress:not([value='0'])")
    say(step="running")
    wait_for_word()
    page.wait_for_selector("#server-state[data-level=bad]")
    page.wait_for_selector("text=Connection lost")
    wrong = at.look("away")
    page.click("#send")
    page.wait_for_selector("#send-error:has-text('does not answer')")
    say(step="away", text=page.inner_text("#server-state"), wrong=wrong)
    wait_for_word()
    page.wait_for_selector(".card[data-state=finished]")
    page.wait_for_selector("#server-state[data-level=ok]")
    say(step="back", states=page.locator(".card-state").all_inner_texts(), errors=at.errors)
