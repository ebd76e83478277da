// @ts-check
// Plots of an hour, a value for each minute: stacked bars or lines, as SVG.
//
// A plotting library is not needed for two plots of sixty points. SVG takes its colours from the
// stylesheet, so it follows the colour scheme by itself, and costs a tenth of a library's bytes.

import { el } from "./dom.js";

const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
const TICK_MINUTES = 15;

/**
 * @typedef {{name: string, text: string, values: (number | null)[]}} Series
 *   name: its class in the stylesheet; values: one for each minute
 */

/** @param {string} tag @param {Record<string, string | number>} attributes @param {...(Node | string)} children */
function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** @param {Date} time */
export function clockTime(time) {
  return time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
}

export class Plot {
  /** @type {Date[]} */
  times = [];
  /** @type {Series[]} */
  series = [];
  /** The minute under the pointer or chosen by key; null for the present one. @type {number | null} */
  chosen = null;

  /**
   * @param {HTMLElement} host
   * @param {{isStacked: boolean, label: string, tops: number[], format: (value: number) => string}} options
   *   isStacked: bars on top of each other instead of lines; tops: where the axis may end, rising
   */
  constructor(host, options) {
    this.options = options;
    this.drawing = svg("svg", { "aria-hidden": "true" });
    // A slider, because the arrow keys choose the minute whose values the legend shows.
    this.element = el("div", { class: "plot", role: "slider", tabindex: 0, "aria-label": options.label, "aria-valuemin": 0 }, this.drawing);
    this.legend = el("ul", { class: "legend" });
    host.append(this.element, this.legend);
    this.element.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.onKey(event));
    this.element.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.choose(this.minuteAt(event)));
    this.element.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => this.choose(this.minuteAt(event)));
    this.element.addEventListener("pointerleave", () => this.choose(null));
    this.element.addEventListener("blur", () => this.choose(null));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  /** @param {Date[]} times the minutes' beginnings @param {Series[]} series */
  update(times, series) {
    // A chosen minute stays the same minute while time goes on.
    const minute = this.chosen === null ? null : Number(this.times[this.chosen]);
    const index = times.findIndex((time) => Number(time) === minute);
    this.times = times;
    this.series = series;
    this.choose(index < 0 ? null : index);
  }

  /** @param {number | null} minute */
  choose(minute) {
    this.chosen = minute;
    this.draw();
  }

  get last() {
    return this.times.length - 1;
  }

  get step() {
    return (this.width - LEFT - RIGHT) / Math.max(this.times.length, 1);
  }

  /** @param {PointerEvent} event */
  minuteAt(event) {
    const x = event.clientX - this.element.getBoundingClientRect().left - LEFT;
    return Math.max(0, Math.min(this.last, Math.floor(x / this.step)));
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const at = this.chosen ?? this.last;
    const goal = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: this.last }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.last, goal)));
  }

  draw() {
    this.width = this.element.clientWidth;
    this.height = this.drawing.clientHeight || 200;
    if (!this.times.length || !this.width) return;
    const minute = this.chosen ?? this.last;
    this.tell(minute);
    const highest = this.highest();
    const top = this.options.tops.find((each) => each >= highest) ?? highest;
    const y = (/** @type {number} */ value) => TOP + (this.height - TOP - BOTTOM) * (1 - value / top);
    const marks = this.options.isStacked ? this.bars(y) : this.lines(y);
    const cursor = svg("rect", { class: "cursor", x: this.x(minute), y: TOP, width: this.step, height: this.height - TOP - BOTTOM });
    this.drawing.replaceChildren(cursor, ...this.axes(top, y), ...marks);
  }

  /** The left edge of a minute. @param {number} minute */
  x(minute) {
    return LEFT + minute * this.step;
  }

  highest() {
    const sums = this.times.map((_, index) => {
      const values = this.series.map((each) => each.values[index] ?? 0);
      return this.options.isStacked ? values.reduce((sum, value) => sum + value, 0) : Math.max(...values);
    });
    return Math.max(...sums);
  }

  /** @param {number} top @param {(value: number) => number} y */
  axes(top, y) {
    const across = [0, top / 2, top].flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, this.options.format(value)),
    ]);
    const ticks = this.times.flatMap((time, index) => {
      const isTick = time.getMinutes() % TICK_MINUTES === 0;
      const centre = Math.max(LEFT, Math.min(this.x(index) + this.step / 2, this.width - RIGHT - 16));
      return isTick ? [svg("text", { x: centre, y: this.height - 4, "text-anchor": "middle" }, clockTime(time))] : [];
    });
    return [...across, ...ticks];
  }

  /** @param {(value: number) => number} y */
  bars(y) {
    const gap = Math.min(2, this.step / 4);
    return this.times.flatMap((_, index) => {
      let below = 0;
      return this.series.flatMap(({ name, values }) => {
        const value = values[index] ?? 0;
        below += value;
        const box = { x: this.x(index) + gap / 2, y: y(below), width: this.step - gap, height: y(below - value) - y(below) };
        return value ? [svg("rect", { class: name, ...box })] : [];
      });
    });
  }

  /** Minutes without jobs part a line; a minute between two such is a dot. @param {(value: number) => number} y */
  lines(y) {
    return this.series.flatMap(({ name, values }) => {
      /** @type {[number, number][]} */
      const points = values.flatMap((value, index) => (value === null ? [] : [[index, value]]));
      const place = (/** @type {[number, number]} */ [index, value]) => [this.x(index) + this.step / 2, y(value)];
      const path = points.map((point) => {
        const isNext = (values[point[0] - 1] ?? null) !== null;
        return `${isNext ? "L" : "M"}${place(point).map((each) => each.toFixed(1)).join(" ")}`;
      });
      const lonely = points.filter(([index]) => (values[index - 1] ?? values[index + 1] ?? null) === null);
      const dots = lonely.map((point) => svg("circle", { class: name, cx: place(point)[0], cy: place(point)[1] }));
      return [svg("path", { class: name, d: path.join("") || "M0 0" }), ...dots];
    });
  }

  /** Say in words what a minute holds. @param {number} minute */
  tell(minute) {
    const time = `${clockTime(this.times[minute])}${minute === this.last ? " (now)" : ""}`;
    const told = this.series.map(({ name, text, values }) => {
      const value = values[minute];
      return { name, text, value: value === null ? "–" : this.options.format(value) };
    });
    this.legend.replaceChildren(
      el("li", { class: "minute" }, time),
      ...told.map(({ name, text, value }) => el("li", { class: name }, `${text} `, el("b", {}, value))),
    );
    this.element.setAttribute("aria-valuemax", String(this.last));
    this.element.setAttribute("aria-valuenow", String(minute));
    this.element.setAttribute("aria-valuetext", `${time}: ${told.map(({ text, value }) => `${text} ${value}`).join(", ")}`);
  }
}
