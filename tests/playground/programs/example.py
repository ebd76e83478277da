"""Three clicks from opening to an inpainted example, and a fourth that copies its curl command."""

from page import CALL, chromium, say, watched

VIEWS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}

DIFFERENCE = """() => {
    const shown = document.querySelector(".compare canvas");
    const copy = Object.assign(document.createElement("canvas"), {
        width: shown.width, height: shown.height,
    });
    const context = copy.getContext("2d");
    context.drawImage(shown, 0, 0);
    const { data } = context.getImageData(0, 0, copy.width, copy.height);
    return [data[0], data.filter((value, at) => at % 4 === 0 && value > 0).length];
}"""
"""Of the difference picture: its first pixel, and how many are not black."""

with chromium() as browser:
    for name in CALL["views"]:
        context = VIEWS[name]
        with watched(browser, name, permissions=["clipboard-write"], **context) as at:
            page, wrong = at.page, []
            at.open()
            wrong += at.look("1-empty")
            at.choose_example()  # the first click
            wrong += at.look("2-picture")
            sent = at.send()  # the second
            page.wait_for_selector(".card img[src^='data:']")
            page.wait_for_selector(".card progress:not([value='0'])")
            wrong += at.look("3-running")
            # What has ended opens by itself, so there is no third.
            facts = page.locator(".facts").inner_text()
            wrong += at.look("4-result")
            page.locator("input[aria-label='Before and after']").press("ArrowRight")
            page.click("text=Difference")
            page.wait_for_selector(".compare canvas")
            difference = page.evaluate(DIFFERENCE)
            codes = at.codes()
            for tab in ("Answer", "Receipt", "Webhook"):
                page.get_by_role("tab", name=tab).click()
                wrong += at.look(f"6-{tab.lower()}")
            width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            say(
                facts=facts,
                difference=difference,
                codes=codes,
                sent=sent,
                wrong=wrong,
                errors=at.errors,
                overflow=width,
                sizes=page.evaluate(
                    """() => Object.values(Object.fromEntries(
                        performance.getEntriesByType("resource")
                            .filter((each) => each.name.includes("/playground/"))
                            .map((each) => [each.name, each.decodedBodySize])))"""
                ),
            )
