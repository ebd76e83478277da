"""How quick the playground is: first paint, and from a moved pointer to the painted pixel.

    inpaint-server serve --port 8000 &
    .venv/clients/bin/python benchmarks/playground.py http://127.0.0.1:8000/

It is run by the interpreter of `make clients`, which has Playwright, and needs Debian's Chromium.
The picture has 12 megapixels. A stroke's time is from the pointer event to the frame that shows it,
so it has the wait for the next frame (16.7 ms at 60 Hz) in it; the page's own part is printed too,
and how long the machine takes for a pointer that only moves.
"""

import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 4_000, 3_000
MOVES = 400
LOADS = 5

MEASURE = """() => {
    window.own = [];
    window.shown = [];
    let began = 0;
    addEventListener("pointermove", () => { began = performance.now(); }, true);
    addEventListener("pointermove", (event) => {
        window.own.push(performance.now() - began);
        requestAnimationFrame(() => {
            const channel = new MessageChannel();
            // After the frame's own work, as nothing tells of the screen.
            channel.port1.onmessage = () => window.shown.push(performance.now() - event.timeStamp);
            channel.port2.postMessage(0);
        });
    });
}"""

FIRST_PAINT = """() => new Promise((resolve) => requestAnimationFrame(() => setTimeout(() => {
    const [entry] = performance.getEntriesByName("first-contentful-paint");
    resolve(entry ? entry.startTime : performance.now());
})))"""


def photograph(folder: Path) -> Path:
    """A PNG of 12 megapixels with a gradient."""
    row = b"\0" + bytes(value for x in range(WIDTH) for value in (x * 255 // WIDTH, 90, 140))
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(row * HEIGHT, 1)), (b"IEND", b"")]
    path = folder / "photograph.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, data in parts:
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(kind + data)))
    return path


def percentiles(values: list[float]) -> str:
    ordered = sorted(values)
    p50, p95 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
    return f"p50 {p50:6.1f} ms   p95 {p95:6.1f} ms   most {ordered[-1]:6.1f} ms   n {len(ordered)}"


def load(page: Page, base: str) -> float:
    page.goto(base)
    page.wait_for_selector("#field-prompt")
    paint: float = page.evaluate(FIRST_PAINT)
    return paint


def stroke(page: Page, moves: int, *, is_pressed: bool = True) -> None:
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    if is_pressed:
        page.mouse.down()
    for index in range(moves):
        across = 100 + (index * 7) % (box["width"] - 200)
        down = 100 + (index * 3) % (box["height"] - 200)
        page.mouse.move(box["x"] + across, box["y"] + down)
    page.mouse.up()


def main(base: str) -> None:
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        paints = []
        for _ in range(LOADS):
            with browser.new_context(viewport={"width": 1360, "height": 900}) as context:
                paints.append(load(context.new_page(), base))
        print("first contentful paint   ", percentiles(paints))
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        load(page, base)
        page.set_input_files("#file", photograph(Path(folder)))
        page.wait_for_selector("#stage:visible")
        page.evaluate(MEASURE)
        stroke(page, MOVES, is_pressed=False)
        print("no stroke, until shown   ", percentiles(page.evaluate("window.shown")))
        for name, hardness in (("hard", "100"), ("soft", "0")):
            page.locator("label", has_text="Hardness").locator("input").fill(hardness)
            page.evaluate("() => { window.own = []; window.shown = []; }")
            stroke(page, MOVES)
            print(f"{name} brush, page's own part", percentiles(page.evaluate("window.own")))
            print(f"{name} brush, until shown    ", percentiles(page.evaluate("window.shown")))
        browser.close()


main(sys.argv[1])
