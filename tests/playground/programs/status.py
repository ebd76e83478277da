"""The status page while jobs run, fail and end, while its tab is hidden, and without its server."""

from typing import Any

from page import CALL, Watched, chromium, say, wait_for_word, watched

HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
LOADED = """() => performance.getEntriesByType("resource")
    .filter((each) => each.name.includes("/playground/"))
    .map((each) => each.decodedBodySize)"""
VIEWS: dict[str, dict[str, Any]] = {
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


def open_status(at: Watched) -> None:
    at.page.goto(f"{CALL['base']}/status")
    at.page.wait_for_selector("#tiles div")


def tiles(at: Watched) -> list[str]:
    return at.page.locator("#tiles > div").all_inner_texts()


def is_asked_while_hidden(at: Watched) -> bool:
    """Whether a minute in the background brings a question, before the page is seen again."""
    asked: list[str] = []
    with at.page.expect_response("**/api/status"):
        pass
    at.page.evaluate(HIDE, True)
    at.page.on("request", lambda request: asked.append(request.url))
    at.page.clock.fast_forward(60_000)
    at.page.evaluate("() => fetch('healthz')")
    is_asked = any("status" in url for url in asked)
    with at.page.expect_request("**/api/status"):
        at.page.evaluate(HIDE, False)
    return is_asked


with chromium() as browser, watched(browser, "light", color_scheme="light") as at:
    page = at.page
    page.clock.install()
    open_status(at)
    wrong = at.look("1-idle")
    say(step="idle", tiles=tiles(at))
    page.wait_for_selector("#worker-rows progress")
    wrong += at.look("2-running")
    page.wait_for_selector("#failures li")
    page.wait_for_selector("#webhooks dd.bad")
    page.wait_for_selector("#tiles > div:has-text('Finished') dd:text-is('2')")
    page.locator("#throughput .plot").focus()
    page.keyboard.press("ArrowLeft")
    values = [page.get_attribute("#throughput .plot", "aria-valuenow")]
    page.keyboard.press("Home")
    values.append(page.get_attribute("#throughput .plot", "aria-valuenow"))
    told = page.get_attribute("#throughput .plot", "aria-valuetext")
    page.locator("#latency .plot").hover()
    page.click("#minutes summary")
    wrong += at.look("3-busy")
    say(
        step="busy",
        tiles=tiles(at),
        failures=page.inner_text("#failures"),
        summary=page.inner_text("#throughput-text"),
        latency=page.inner_text("#latency-text"),
        rows=page.locator("#minute-rows tr").count(),
        values=values,
        told=told,
        wrong=wrong,
    )
    say(step="hidden", is_asked=is_asked_while_hidden(at))
    for name, context in VIEWS.items():
        with watched(browser, name, **context) as other:
            open_status(other)
            wrong = other.look("3-busy")
            width = other.page.evaluate("document.documentElement.scrollWidth - innerWidth")
            sizes = other.page.evaluate(LOADED)
            say(step=name, wrong=wrong, errors=other.errors, overflow=width, sizes=sizes)
    wait_for_word()
    page.wait_for_selector("#old:has-text('does not answer')")
    page.wait_for_selector("#server-state[data-level=bad]")
    wrong = at.look("4-away")
    say(step="away", old=page.inner_text("#old"), tiles=tiles(at), wrong=wrong)
    wait_for_word()
    page.wait_for_selector("#old", state="hidden")
    page.wait_for_selector("#server-state[data-level=ok]")
    say(step="back", tiles=tiles(at), errors=at.errors)
