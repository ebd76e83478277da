"""How a benchmark tells what it found: JSON for programs, Markdown and a plot for people."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Cell = str | float | int | None

WIDTH, MARGIN, LABEL_WIDTH, BAR, GAP = 1000, 24, 260, 16, 12
INK, GRID = (30, 30, 30), (200, 200, 200)
COLOURS = ((31, 119, 180), (255, 127, 14), (127, 127, 127), (44, 160, 44), (148, 103, 189))


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars in groups: label of the group to series name to value.

    reference: where a line is drawn, such as 1 for ratios; None for no line.
    """

    title: str
    groups: dict[str, dict[str, float]]
    reference: float | None = None

    @property
    def series(self) -> list[str]:
        """Names in order of appearance."""
        return list(dict.fromkeys(name for bars in self.groups.values() for name in bars))

    @property
    def height(self) -> int:
        """Pixels it takes."""
        bars = sum(len(group) for group in self.groups.values())
        return 3 * MARGIN + bars * BAR + len(self.groups) * GAP


def write_report(
    out: Path, name: str, findings: dict[str, Any], text: str, charts: Sequence[Chart] = ()
) -> None:
    """Write `name`.json, .md and, where there are charts, .png into `out`, and print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(without_nan(findings), indent=1) + "\n")
    (out / f"{name}.md").write_text(text)
    if charts:
        picture = draw(charts, text.partition("\n")[0].lstrip("# "))
        picture.save(out / f"{name}.png", optimize=True)
    print(text)


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    cells = [[show(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *cells]) + "\n"


def show(cell: Cell) -> str:
    """Three digits are what a measurement here is good for."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def draw(charts: Sequence[Chart], title: str) -> Image.Image:
    """The charts one below the other."""
    drawn = [chart for chart in charts if chart.groups]
    height = 2 * MARGIN + sum(chart.height + MARGIN for chart in drawn)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN // 2), title, INK, ImageFont.load_default(16))
    names = dict.fromkeys(name for chart in drawn for name in chart.series)
    colours = dict(zip(names, COLOURS, strict=False))  # a name has one colour in all charts
    top = 2 * MARGIN
    for chart in drawn:
        draw_chart(pen, chart, top, colours)
        top += chart.height + MARGIN
    return picture


def draw_chart(
    pen: ImageDraw.ImageDraw, chart: Chart, top: int, colours: dict[str, tuple[int, int, int]]
) -> None:
    """A title, a legend, the bars, and the reference line behind them."""
    font = ImageFont.load_default(13)
    pen.text((MARGIN, top), chart.title, INK, ImageFont.load_default(15))
    draw_legend(pen, {name: colours[name] for name in chart.series}, top + MARGIN)
    values = [value for bars in chart.groups.values() for value in bars.values()]
    longest = max([value for value in values if math.isfinite(value)] + [chart.reference or 0])
    scale = (WIDTH - LABEL_WIDTH - 5 * MARGIN) / (longest or 1)
    y = top + 2 * MARGIN
    if chart.reference is not None:
        x = LABEL_WIDTH + chart.reference * scale
        pen.line((x, y, x, top + chart.height - MARGIN), GRID, 2)
    for label, bars in chart.groups.items():
        pen.text((MARGIN, y), label, INK, font)
        for name, value in bars.items():
            length = value * scale if math.isfinite(value) else 0
            pen.rectangle((LABEL_WIDTH, y, LABEL_WIDTH + length, y + BAR - 3), colours[name])
            pen.text((LABEL_WIDTH + length + 6, y - 1), show(value), INK, font)
            y += BAR
        y += GAP


def draw_legend(
    pen: ImageDraw.ImageDraw, colours: dict[str, tuple[int, int, int]], top: int
) -> None:
    """A patch and a name per series, in one line."""
    font = ImageFont.load_default(13)
    x = float(LABEL_WIDTH)
    for name, colour in colours.items():
        pen.rectangle((x, top + 2, x + 11, top + 13), colour)
        pen.text((x + 16, top), name, INK, font)
        x += 16 + pen.textlength(name, font) + MARGIN
