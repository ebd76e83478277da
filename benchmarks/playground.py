"""How quick the playground is: first paint, and from a moved pointer to the painted pixel.

    inpaint-server serve --port 8000 &
    .venv/clients/bin/python benchmarks/playground.py http://127.0.0.1:8000/

It is run by the interpreter of `make clients`, which has Playwright, and needs Debian's Chromium.
The picture has 12 megapixels. A stroke's time is what Chromium traces as `EventLatency`: from the
pointer event to the frame that shows it. The wait for the next frame (16.7 ms at 60 Hz) is in it;
so the time of a pointer that only moves is printed too, and the page's own part: the CPU time
of its main thread.
"""

import json
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 4_000, 3_000
MOVES = 400
LOADS = 5
MOVED = ("MOVED_EVENT", "DRAGGED")
"""How Chromium's names of a moved mouse end, without and with a pressed button."""
TASK = "ThreadControllerImpl::RunTask"
STROKES = (("pointer only", "100", False), ("hard brush", "100", True), ("soft brush", "0", True))
"""Name, hardness, whether the button is pressed."""

CATEGORIES = ["benchmark", "cc", "input", "toplevel"]
"""Of Chromium's tracing: `EventLatency` and the tasks of every thread."""

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


def traced(page: Page, *, is_pressed: bool) -> list[dict[str, Any]]:
    """The events of a stroke's trace."""
    browser = page.context.browser
    assert browser
    browser.start_tracing(page=page, categories=CATEGORIES)
    stroke(page, MOVES, is_pressed=is_pressed)
    events: list[dict[str, Any]] = json.loads(browser.stop_tracing())["traceEvents"]
    return events


def latencies_ms(events: list[dict[str, Any]]) -> list[float]:
    """From each moved pointer to its frame."""
    begun: dict[str, float] = {}
    found = []
    for event in events:
        if event["name"] != "EventLatency":
            continue
        kind = event["args"].get("event_latency", {}).get("event_type", "")
        key = str(event.get("id", event.get("id2")))
        if event["ph"] == "b" and kind.startswith("MOUSE_") and kind.endswith(MOVED):
            begun[key] = event["ts"]
        elif event["ph"] == "e" and key in begun:
            found.append((event["ts"] - begun.pop(key)) / 1000)
    return found


def own_ms(events: list[dict[str, Any]]) -> float:
    """CPU time of the page's main thread for each move."""
    threads = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks = (
        event.get("tdur", 0)
        for event in events
        if event["name"] == TASK and (event["pid"], event["tid"]) in threads
    )
    return sum(tasks) / 1000 / MOVES


def main(base: str) -> None:
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        paints = []
        for _ in range(LOADS):
            with browser.new_context(viewport={"width": 1360, "height": 900}) as context:
                paints.append(load(context.new_page(), base))
        print("first contentful paint", percentiles(paints))
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        load(page, base)
        page.set_input_files("#file", photograph(Path(folder)))
        page.wait_for_selector("#stage:visible")
        for name, hardness, is_pressed in STROKES:
            page.locator("label", has_text="Hardness").locator("input").fill(hardness)
            events = traced(page, is_pressed=is_pressed)
            own = f"own part {own_ms(events):4.1f} ms"
            print(f"{name:<22}", percentiles(latencies_ms(events)), "  ", own)
        browser.close()


main(sys.argv[1])
