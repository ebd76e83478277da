"""What fingers, keys, drops and the clipboard do beyond a stroke; says the masks that are saved."""

import base64
from pathlib import Path
from typing import Any

from page import CALL, Watched, chromium, say, watched
from playwright.sync_api import CDPSession

SHIFT, CTRL, ALT = 8, 2, 1
"""Modifiers as the browser's protocol counts them."""

DROP = """([selector, name, type, text, files]) => {
    const data = new DataTransfer();
    for (const each of files) {
        const bytes = Uint8Array.from(atob(each), (character) => character.charCodeAt(0));
        data.items.add(new File([bytes], name, { type }));
    }
    if (text) data.setData("text/plain", text);
    const send = (target, kind) => target.dispatchEvent(
        new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
    send(document.querySelector("#editor"), "dragover");
    const target = document.querySelector(selector);
    const isShown = target.checkVisibility();
    send(target, "drop");
    return isShown;
}"""

PASTE = """([name, type, file]) => {
    const bytes = Uint8Array.from(atob(file), (character) => character.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type }));
    document.body.dispatchEvent(
        new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
}"""


def picture_of(name: str) -> str:
    return base64.b64encode(Path(CALL[name]).read_bytes()).decode()


def wait_for_size(at: Watched, width: int) -> None:
    at.page.wait_for_selector(f"#world[style*='width: {width}px']")


def fingers(session: CDPSession, kind: str, *points: tuple[float, float]) -> None:
    """points: on the screen, one for each finger that touches it."""
    touches = [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(points)]
    session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def press(at: Watched, key: str, code: str, modifiers: int) -> None:
    """A key of a layout on which it writes something else than its place says."""
    session = at.page.context.new_cdp_session(at.page)
    given = {"key": key, "code": code, "modifiers": modifiers}
    session.send("Input.dispatchKeyEvent", {"type": "keyDown", **given})
    session.send("Input.dispatchKeyEvent", {"type": "keyUp", **given})


def box(at: Watched) -> dict[str, Any]:
    found = at.page.locator("#picture").bounding_box()
    assert found
    return dict(found)


def size(at: Watched) -> int:
    return int(at.page.locator("label", has_text="Size").locator("output").inner_text())


def use_two_fingers(at: Watched) -> None:
    at.open()
    at.choose_example("a green square")
    at.page.locator("#tools button", has_text="Clear").tap()
    session = at.page.context.new_cdp_session(at.page)
    before = box(at)
    left, right = at.stage(0.4, 0.5), at.stage(0.6, 0.5)
    spread = right[0] - left[0]
    fingers(session, "touchStart", left, right)
    for share in (0.25, 0.5, 0.75, 1):
        step = share * spread / 2
        fingers(session, "touchMove", (left[0] - step, left[1]), (right[0] + step, right[1]))
    fingers(session, "touchEnd")
    pinched = box(at)
    fingers(session, "touchStart", left, right)
    for down in (10, 20, 30):
        fingers(session, "touchMove", (left[0], left[1] + down), (right[0], right[1] + down))
    fingers(session, "touchEnd")
    panned = box(at)
    say(step="fingers", boxes=[before, pinched, panned], mask=at.mask(), errors=at.errors)


def use_mouse(at: Watched) -> None:
    page = at.page
    page.keyboard.press("Shift+C")
    at.drag((0.5, 0.5), (1.4, 0.5))
    say(step="left the picture", mask=at.mask())
    page.keyboard.press("u")
    page.keyboard.down("Control")
    at.drag((0.7, 0.2), (1.2, 0.8))
    page.keyboard.up("Control")
    say(step="subtracted", mask=at.mask())
    page.keyboard.press("b")
    page.keyboard.press("x")
    say(step="swapped", pressed=page.locator("[data-tool][aria-pressed=true]").inner_text())
    page.keyboard.press("x")
    page.keyboard.press("Shift+C")
    pan_in_the_middle(at)
    page.mouse.move(*at.stage(0.5, 0.5))
    page.mouse.down(button="middle")
    page.mouse.move(*at.stage(0.55, 0.55))
    page.mouse.up(button="middle")
    page.mouse.move(*at.stage(0.5, 0.5))
    say(step="ring", is_shown=page.locator("#ring").is_visible())
    before = box(at)
    page.mouse.wheel(30, 0)
    page.mouse.wheel(0, 20)
    say(step="trackpad", boxes=[before, box(at)])


def pan_in_the_middle(at: Watched) -> None:
    """Half a stroke, a pan, the other half."""
    page = at.page
    mouse = page.mouse
    mouse.move(*at.stage(0.2, 0.5))
    mouse.down()
    mouse.move(*at.stage(0.4, 0.5), steps=3)
    page.keyboard.down(" ")
    x, y = at.stage(0.4, 0.5)
    mouse.move(x, y + 60, steps=3)
    page.keyboard.up(" ")
    mouse.move(*at.stage(0.8, 0.5), steps=3)
    mouse.up()
    say(step="panned in a stroke", mask=at.mask())


def use_keys(at: Watched) -> None:
    """Keys that another window has seen released, and keys of a Swiss keyboard."""
    page = at.page
    hidden = page.locator("#paint.unseen")
    page.locator("#stage").focus()
    page.keyboard.down("o")
    was_hidden = hidden.count()
    page.keyboard.down(" ")
    was_panning = page.locator("#stage.panning").count()
    page.evaluate("window.dispatchEvent(new Event('blur'))")
    still = [hidden.count(), page.locator("#stage.panning").count()]
    say(step="blur", before=[was_hidden, was_panning], after=still)
    page.keyboard.up("o")
    page.keyboard.up(" ")
    page.keyboard.press("0")
    page.keyboard.press("Shift+C")
    at.drag((0.2, 0.5), (0.8, 0.5))
    press(at, "z", "KeyY", CTRL)
    say(step="swiss undo", mask=at.mask())
    press(at, "Z", "KeyY", CTRL | SHIFT)
    say(step="swiss redo", mask=at.mask())
    sizes = [size(at)]
    for key, code, modifiers in (
        ("[", "BracketLeft", CTRL | ALT),
        ("]", "BracketRight", ALT),
        (",", "Comma", 0),
        (".", "Period", 0),
        ("}", "Backslash", ALT),
    ):
        press(at, key, code, modifiers)
        sizes.append(size(at))
    page.keyboard.press("h")
    say(
        step="swiss brackets", sizes=sizes, is_list_open=page.locator("#shortcut-list").is_visible()
    )
    page.keyboard.press("h")


def use_files(at: Watched) -> None:
    page = at.page
    is_shown = page.evaluate(DROP, ["#mask-zone", "m.png", "image/png", "", [picture_of("mask")]])
    at.page.wait_for_function("!document.querySelector('[data-edit=undo]').disabled")
    say(step="dropped mask", mask=at.mask(), is_zone_shown=is_shown)
    page.evaluate(DROP, ["#stage", "p.png", "image/png", "", [picture_of("wide")]])
    wait_for_size(at, 320)
    page.evaluate(PASTE, ["p.png", "image/png", picture_of("transparent")])
    wait_for_size(at, 96)
    page.locator("summary", has_text="Mask").click()
    page.click("text=From transparency")
    say(step="from alpha", mask=at.mask())
    page.set_input_files("#mask-file", CALL["mask"])
    page.wait_for_function("!document.querySelector('[data-edit=undo]').disabled")
    say(step="mask file", mask=at.mask())
    page.evaluate(DROP, ["#stage", "", "", CALL["url"], []])
    page.wait_for_selector("#hint:has-text('the server fetches this one')")
    say(step="dropped url", errors=at.errors)


def use_every_side(at: Watched) -> None:
    page = at.page
    page.evaluate(PASTE, ["p.png", "image/png", picture_of("wide")])
    wait_for_size(at, 320)
    page.locator("summary", has_text="Picture").click()
    page.click("text=Extend the canvas")
    for side, pixels in (("left", 40), ("top", 24), ("right", 80), ("bottom", 56)):
        page.fill(f"[aria-label='Pixels {side}']", str(pixels))
    wrong = at.look("extend")
    page.get_by_role("button", name="Extend", exact=True).click()
    wait_for_size(at, 440)
    say(step="every side", mask=at.mask(), wrong=wrong)


with chromium() as browser:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with watched(browser, "fingers", **phone) as at_touch:
        use_two_fingers(at_touch)
    with watched(browser, "gestures") as at_mouse:
        at_mouse.open()
        at_mouse.choose_example("a green square")
        use_mouse(at_mouse)
        use_keys(at_mouse)
        use_files(at_mouse)
        use_every_side(at_mouse)
        say(step="ended", errors=at_mouse.errors)
