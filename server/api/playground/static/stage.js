// @ts-check
// The stage: shows picture and mask, zooms and pans, and turns pointers into operations on the mask.
// While a stroke is drawn only a canvas of the window's size changes, whatever the picture's size.

import { byId, newCanvas } from "./dom.js";
import { draw } from "./mask.js";

const MIN_SCALE = 0.02;
const MAX_SCALE = 32;
/** A wheel that has panned goes on panning for so long; a trackpad's two fingers never move straight. */
const PANNING_MS = 300;

/** @typedef {"brush"|"eraser"|"rectangle"|"lasso"} Tool */

export class Stage {
  /** @param {() => void} onChange after each operation on the mask */
  constructor(onChange) {
    this.onChange = onChange;
    this.element = byId("stage");
    this.picture = byId("picture");
    this.world = byId("world");
    this.ring = byId("ring");
    this.canvas = byId("paint");
    this.context = this.canvas.getContext("2d");
    const [base, baseContext] = newCanvas(1, 1);
    this.base = base;
    this.baseContext = baseContext;
    this.isFitted = false;
    /** @type {import("./mask.js").Mask | null} */
    this.mask = null;
    this.view = { x: 0, y: 0, scale: 1 };
    /** @type {Tool} */
    this.tool = "brush";
    this.size = 64;
    this.hardness = 1;
    this.colour = "#e11d48";
    this.isPanKeyDown = false;
    /** The operation that is being drawn. @type {any} */
    this.live = null;
    /** @type {Map<number, {x: number, y: number}>} */
    this.pointers = new Map();
    this.isPanning = false;
    this.isPaintDue = false;
    /** How many points of the live operation the canvas shows. */
    this.shownPoints = 0;
    this.pannedAt = -Infinity;
    this.cursor = { x: 0, y: 0 };
    this.listen();
  }

  /** @param {string} url @param {import("./mask.js").Mask} mask */
  show(url, mask) {
    this.mask = mask;
    this.picture.src = url;
    this.world.style.width = `${mask.width}px`;
    this.world.style.height = `${mask.height}px`;
    this.resize();
    this.fit();
  }

  listen() {
    const { element } = this;
    element.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => this.down(event));
    element.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, (/** @type {PointerEvent} */ event) => this.up(event));
    }
    element.addEventListener("pointerleave", () => this.showRing(false));
    element.addEventListener("contextmenu", (/** @type {Event} */ event) => event.preventDefault());
    element.addEventListener("wheel", (/** @type {WheelEvent} */ event) => this.wheel(event), { passive: false });
    new ResizeObserver(() => this.resize()).observe(element);
    // A key that is released while another window has the focus is never reported.
    window.addEventListener("blur", () => this.releasePan());
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.element.clientWidth * ratio));
    const height = Math.max(1, Math.round(this.element.clientHeight * ratio));
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = this.base.width = width;
      this.canvas.height = this.base.height = height;
      if (this.isFitted) this.fit();
    }
    this.refresh();
  }

  fit() {
    if (!this.mask) return;
    const { clientWidth, clientHeight } = this.element;
    const scale = Math.min(clientWidth / this.mask.width, clientHeight / this.mask.height, 4) * 0.96;
    this.view = {
      scale,
      x: (clientWidth - this.mask.width * scale) / 2,
      y: (clientHeight - this.mask.height * scale) / 2,
    };
    this.isFitted = true;
    this.refresh();
  }

  /** @param {number} factor @param {number} [x] of the element, in CSS pixels; the middle by default @param {number} [y] */
  zoom(factor, x = this.element.clientWidth / 2, y = this.element.clientHeight / 2) {
    const scale = Math.min(MAX_SCALE, Math.max(MIN_SCALE, this.view.scale * factor));
    const change = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * change, y: y - (y - this.view.y) * change };
    this.isFitted = false;
    this.refresh();
  }

  /** @param {number} dx @param {number} dy */
  pan(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.isFitted = false;
    this.refresh();
  }

  /** Redraw after a change of the view or of the mask. */
  refresh() {
    if (!this.mask) return;
    const { x, y, scale } = this.view;
    this.world.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    this.world.classList.toggle("pixels", scale > 3);
    this.baseContext.setTransform(1, 0, 0, 1, 0, 0);
    this.baseContext.clearRect(0, 0, this.base.width, this.base.height);
    this.toMaskPixels(this.baseContext);
    this.baseContext.imageSmoothingEnabled = scale < 3;
    this.baseContext.drawImage(this.mask.canvas, 0, 0);
    this.paint();
    this.showRing(!this.ring.hidden);
  }

  /** @param {CanvasRenderingContext2D} context */
  toMaskPixels(context) {
    const ratio = this.canvas.width / Math.max(1, this.element.clientWidth);
    const { x, y, scale } = this.view;
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    return scale * ratio;
  }

  /**
   * The mask and the operation that is being drawn, in the overlay's colour.
   * @param {number} [from] where the canvas shows a stroke's points before this one, only what the others change
   */
  paint(from = 0) {
    const { context, canvas, mask, live } = this;
    if (!mask) return;
    const isGrowing = from > 0 && live?.kind === "stroke";
    const [x, y, width, height] = isGrowing ? this.boxOf(live.points.slice(from - 1)) : [0, 0, canvas.width, canvas.height];
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip();
    context.globalCompositeOperation = "copy";
    context.drawImage(this.base, 0, 0);
    context.globalCompositeOperation = "source-over";
    if (live) this.paintLive(live, mask);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = this.colour;
    context.fillRect(x, y, width, height);
    context.restore();
    this.shownPoints = live ? live.points.length : 0;
  }

  /** @param {any} live @param {import("./mask.js").Mask} mask */
  paintLive(live, mask) {
    const { context } = this;
    context.save();
    const scale = this.toMaskPixels(context);
    context.beginPath();
    context.rect(0, 0, mask.width, mask.height);
    context.clip();
    draw(context, live, scale);
    context.restore();
  }

  /** Left, top, width, height of what a stroke through these points covers, in pixels of the canvas. @param {[number, number][]} points */
  boxOf(points) {
    const scale = (this.view.scale * this.canvas.width) / Math.max(1, this.element.clientWidth);
    // A soft edge reaches beyond the brush.
    const reach = this.live.size * scale * (this.live.hardness < 1 ? 0.9 : 0.5) + 2;
    const across = points.map(([x]) => (x + this.view.x / this.view.scale) * scale);
    const down = points.map(([, y]) => (y + this.view.y / this.view.scale) * scale);
    const left = Math.floor(Math.min(...across) - reach), top = Math.floor(Math.min(...down) - reach);
    return [left, top, Math.ceil(Math.max(...across) + reach) - left, Math.ceil(Math.max(...down) + reach) - top];
  }

  /** @param {{clientX: number, clientY: number}} event @returns {{x: number, y: number}} */
  local(event) {
    const box = this.element.getBoundingClientRect();
    return { x: event.clientX - box.left - this.element.clientLeft, y: event.clientY - box.top - this.element.clientTop };
  }

  /** @param {{x: number, y: number}} at in CSS pixels of the element @returns {[number, number]} */
  toMask({ x, y }) {
    return [(x - this.view.x) / this.view.scale, (y - this.view.y) / this.view.scale];
  }

  /** @param {PointerEvent} event */
  down(event) {
    if (!this.mask) return;
    this.element.focus({ preventScroll: true });
    this.element.setPointerCapture(event.pointerId);
    event.preventDefault();
    this.pointers.set(event.pointerId, this.local(event));
    if (this.pointers.size > 1) {
      this.cancel(); // a pinch is no stroke
      return;
    }
    this.isPanning = event.button === 1 || this.isPanKeyDown;
    if (!this.isPanning) this.begin(this.local(event), event.button === 2 || event.ctrlKey || event.metaKey);
  }

  /** @param {{x: number, y: number}} at @param {boolean} isErasing as the right button and Ctrl do; it turns the eraser into a brush */
  begin(at, isErasing) {
    const point = this.toMask(at);
    const erase = isErasing !== (this.tool === "eraser");
    const kind = { brush: "stroke", eraser: "stroke", rectangle: "box", lasso: "lasso" }[this.tool];
    this.live = { kind, erase, size: this.size, hardness: this.hardness, points: kind === "box" ? [point, point] : [point] };
    this.paint();
  }

  /** @param {PointerEvent} event */
  move(event) {
    const at = this.local(event);
    const before = this.pointers.get(event.pointerId);
    this.cursor = at;
    this.showRing(event.pointerType !== "touch");
    if (!before) return;
    // The space bar pans in the middle of a stroke too, which goes on afterwards.
    const isPan = this.isPanning || this.isPanKeyDown;
    if (this.pointers.size === 2) this.pinch(event.pointerId, before, at);
    else if (isPan) this.pan(at.x - before.x, at.y - before.y);
    this.pointers.set(event.pointerId, at);
    if (!this.live || isPan) return;
    const moves = event.getCoalescedEvents?.() ?? [];
    const points = (moves.length ? moves : [event]).map((each) => this.toMask(this.local(each)));
    if (this.live.kind === "box") this.live.points[1] = points[points.length - 1];
    else this.live.points.push(...points);
    this.paintSoon();
  }

  /** Paint with the next frame, once, however many moves come before it. */
  paintSoon() {
    if (this.isPaintDue) return;
    this.isPaintDue = true;
    requestAnimationFrame(() => {
      this.isPaintDue = false;
      this.paint(this.shownPoints);
    });
  }

  /** @param {number} id @param {{x: number, y: number}} before @param {{x: number, y: number}} at */
  pinch(id, before, at) {
    const other = [...this.pointers].find(([each]) => each !== id)?.[1];
    if (!other) return;
    const distance = (/** @type {{x: number, y: number}} */ point) => Math.hypot(point.x - other.x, point.y - other.y);
    this.pan((at.x - before.x) / 2, (at.y - before.y) / 2);
    if (distance(before) > 0) this.zoom(distance(at) / distance(before), (at.x + other.x) / 2, (at.y + other.y) / 2);
  }

  /** @param {PointerEvent} event */
  up(event) {
    this.pointers.delete(event.pointerId);
    if (event.type === "pointercancel") this.cancel();
    else this.commit();
    if (!this.pointers.size) this.isPanning = false;
  }

  commit() {
    const operation = this.live;
    this.live = null;
    if (!operation || !this.mask) return;
    this.apply(operation);
  }

  /** @param {import("./mask.js").Operation} operation */
  apply(operation) {
    this.mask?.apply(operation);
    this.refresh();
    this.onChange();
  }

  /** @returns {boolean} whether a stroke was given up */
  cancel() {
    const was = this.live !== null;
    this.live = null;
    this.paint();
    return was;
  }

  /** A dot at the brush, for the keyboard. */
  dab() {
    this.begin(this.cursor, false);
    this.commit();
  }

  /** @param {number} dx @param {number} dy */
  moveCursor(dx, dy) {
    const { clientWidth, clientHeight } = this.element;
    if (this.ring.hidden) this.cursor = { x: clientWidth / 2, y: clientHeight / 2 };
    this.cursor.x = Math.min(clientWidth, Math.max(0, this.cursor.x + dx));
    this.cursor.y = Math.min(clientHeight, Math.max(0, this.cursor.y + dy));
    this.showRing(true);
  }

  releasePan() {
    this.isPanKeyDown = false;
    this.element.classList.remove("panning");
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    event.preventDefault();
    const at = this.local(event);
    const isTwoFingers = event.deltaX !== 0 || event.timeStamp - this.pannedAt < PANNING_MS;
    if (event.shiftKey) this.setSize(this.size * (event.deltaX + event.deltaY < 0 ? 1.15 : 1 / 1.15));
    else if (isTwoFingers && !event.ctrlKey) {
      this.pannedAt = event.timeStamp;
      this.pan(-event.deltaX, -event.deltaY);
    }
    // A trackpad's pinch comes as a wheel with Ctrl, in small steps.
    else this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), at.x, at.y);
  }

  /** @param {number} size in pixels of the mask */
  setSize(size) {
    this.size = Math.round(Math.min(1024, Math.max(1, size)));
    this.showRing(!this.ring.hidden);
    this.element.dispatchEvent(new CustomEvent("brush"));
  }

  /** @param {boolean} isShown */
  showRing(isShown) {
    const isBrush = this.tool === "brush" || this.tool === "eraser";
    this.ring.hidden = !isShown;
    const size = isBrush ? Math.max(4, this.size * this.view.scale) : 10;
    this.ring.style.width = this.ring.style.height = `${size}px`;
    this.ring.style.transform = `translate(${this.cursor.x - size / 2}px, ${this.cursor.y - size / 2}px)`;
  }
}
