"""Paints with mouse, touch and keyboard; says the masks that the page saves, and what it sends."""

from page import Watched, chromium, say, watched


def use_mouse(at: Watched) -> None:
    at.open()
    at.choose_example("a green square")
    page = at.page
    page.keyboard.press("Shift+C")
    say(step="cleared", mask=at.mask())
    at.drag((0.2, 0.5), (0.8, 0.5))
    say(step="stroke", mask=at.mask())
    at.drag((0.5, 0.3), (0.5, 0.7), button="right")
    say(step="erased", mask=at.mask())
    page.keyboard.press("Control+z")
    say(step="undone", mask=at.mask())
    page.keyboard.press("Control+Shift+Z")
    say(step="redone", mask=at.mask())
    page.keyboard.press("Shift+V")
    say(step="inverted", mask=at.mask())
    page.keyboard.press("Shift+C")
    page.keyboard.press("u")
    at.drag((0.25, 0.25), (0.75, 0.5))
    say(step="rectangle", mask=at.mask())
    page.keyboard.press("Shift+C")
    page.keyboard.press("l")
    draw_triangle(at)
    say(step="lasso", mask=at.mask())
    soft_dot(at)
    say(step="soft", mask=at.mask())
    many_undone(at)
    zoomed(at)
    say(step="sent", sent=at.send(), errors=at.errors)


def draw_triangle(at: Watched) -> None:
    mouse = at.page.mouse
    mouse.move(*at.stage(0.2, 0.2))
    mouse.down()
    for corner in ((0.8, 0.2), (0.2, 0.8)):
        mouse.move(*at.stage(*corner), steps=4)
    mouse.up()


def soft_dot(at: Watched) -> None:
    page = at.page
    page.keyboard.press("Shift+C")
    page.keyboard.press("b")
    page.locator("label", has_text="Hardness").locator("input").fill("0")
    page.locator("label", has_text="Size").locator("input").fill("200")
    at.drag((0.5, 0.5), (0.5, 0.5))


def many_undone(at: Watched) -> None:
    """Sixty strokes, of which fifty-five are undone."""
    page = at.page
    page.keyboard.press("Shift+C")
    page.locator("label", has_text="Hardness").locator("input").fill("100")
    page.locator("label", has_text="Size").locator("input").fill("8")
    for index in range(60):
        across = (index + 0.5) / 60
        at.drag((across, 0.2), (across, 0.8))
        if index == 4:
            say(step="five strokes", mask=at.mask())
    for _ in range(55):
        page.keyboard.press("Control+z")
    say(step="fifty-five undone", mask=at.mask())


def zoomed(at: Watched) -> None:
    """A dot at the same point of the picture after a zoom and a pan."""
    page = at.page
    page.keyboard.press("Shift+C")
    page.mouse.move(*at.stage(0.25, 0.25))
    page.mouse.wheel(0, -800)
    page.locator("#stage").focus()
    page.keyboard.down(" ")
    at.drag((0.25, 0.25), (0.3, 0.3))
    page.keyboard.up(" ")
    at.drag((0.25, 0.25), (0.25, 0.25))
    say(step="zoomed", mask=at.mask())


def use_touch(at: Watched) -> None:
    at.open()
    at.choose_example("a green square")
    page = at.page
    page.locator("#tools button", has_text="Clear").tap()
    touch(at, [(0.2, 0.5), (0.5, 0.5), (0.8, 0.5)])
    say(step="touched", mask=at.mask(), errors=at.errors)


def touch(at: Watched, points: list[tuple[float, float]]) -> None:
    """One finger from point to point, as the browser itself reports it."""
    session = at.page.context.new_cdp_session(at.page)
    for kind, point in [
        ("touchStart", points[0]),
        *(("touchMove", each) for each in points[1:]),
    ]:
        x, y = at.stage(*point)
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def use_keys(at: Watched) -> None:
    """A dot by the keyboard alone, and a wider canvas."""
    at.open()
    at.choose_example("a green square")
    page = at.page
    page.locator("#stage").focus()
    page.keyboard.press("Shift+C")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    say(step="dot", mask=at.mask())
    page.keyboard.press("Shift+C")
    page.locator("summary", has_text="Picture").click()
    page.click("text=Extend the canvas")
    page.fill("[aria-label='Pixels right']", "128")
    page.get_by_role("button", name="Extend", exact=True).click()
    page.wait_for_selector("#world[style*='width: 640px']")
    say(step="extended", mask=at.mask(), strength=page.input_value("#field-strength"))
    page.keyboard.press("Control+z")
    page.wait_for_selector("#world[style*='width: 512px']")
    say(step="extension undone", mask=at.mask(), errors=at.errors)


with chromium() as browser:
    with watched(browser, "mouse") as at_mouse:
        use_mouse(at_mouse)
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with watched(browser, "touch", **phone) as at_touch:
        use_touch(at_touch)
    with watched(browser, "keys") as at_keys:
        use_keys(at_keys)
