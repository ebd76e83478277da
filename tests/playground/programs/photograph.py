"""A photograph of 12 megapixels, of which only the masked part is repainted; then the example that
is a photograph, without a prompt."""

from page import CALL, chromium, say, watched

with chromium() as browser, watched(browser, "photograph") as at:
    page = at.page
    at.open()
    page.set_input_files("#file", CALL["photograph"])
    page.wait_for_selector("#stage:visible")
    page.fill("#field-prompt", "a red circle")
    at.drag((0.45, 0.5), (0.55, 0.5))
    page.click("#advanced summary")
    page.check("#field-only_masked")
    page.locator("#field-num_inference_steps").fill("4")
    sent = at.send()
    page.wait_for_selector(".facts")
    wrong = at.look("result")
    size = page.evaluate(
        "(({ naturalWidth, naturalHeight }) => [naturalWidth, naturalHeight])"
        "(document.querySelector('.layers img'))"
    )
    say(
        size=size,
        facts=page.inner_text(".facts"),
        warnings=page.locator(".warning").all_inner_texts(),
        only_masked=sent["only_masked"],
        wrong=wrong,
        errors=at.errors,
    )
    at.open()
    at.choose_example("take the stone away")
    page.locator("#field-num_inference_steps").fill("4")
    sent = at.send()
    page.wait_for_selector(".facts")
    wrong = at.look("stone")
    say(prompt=sent["prompt"], facts=page.inner_text(".facts"), wrong=wrong, errors=at.errors)
