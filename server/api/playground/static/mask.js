// @ts-check
// The mask as a list of operations on one bitmap. Opaque is repainted, transparent is kept.
// Undo replays from the last snapshot, so that fifty steps cost fifty paths and not fifty bitmaps.

import { newCanvas, toBlob } from "./dom.js";

/**
 * @typedef {[number, number]} Point in pixels of the mask
 * @typedef {{kind: "stroke", erase: boolean, points: Point[], size: number, hardness: number}
 *   | {kind: "box", erase: boolean, points: Point[]}
 *   | {kind: "lasso", erase: boolean, points: Point[]}
 *   | {kind: "image", image: HTMLCanvasElement, isSoft?: boolean}
 *   | {kind: "invert"} | {kind: "clear"}} Operation
 */

const SNAPSHOT_EVERY = 10;
const MAX_OPERATIONS = 200;

/**
 * Draw an operation.
 * @param {CanvasRenderingContext2D} context its transform maps pixels of the mask to its own
 * @param {Operation} operation
 * @param {number} scale pixels of the context per pixel of the mask; shadows ignore the transform
 */
export function draw(context, operation, scale = 1) {
  context.save();
  if ("erase" in operation && operation.erase) context.globalCompositeOperation = "destination-out";
  context.fillStyle = context.strokeStyle = "#fff";
  if (operation.kind === "stroke") drawStroke(context, operation, scale);
  if (operation.kind === "box") {
    const [[left, top], [right, bottom]] = operation.points;
    context.fillRect(Math.min(left, right), Math.min(top, bottom), Math.abs(right - left), Math.abs(bottom - top));
  }
  if (operation.kind === "lasso") {
    trace(context, operation.points);
    context.fill("evenodd");
  }
  const { width, height } = context.canvas;
  if (operation.kind === "invert") {
    context.globalCompositeOperation = "xor";
    context.fillRect(0, 0, width, height);
  }
  if (operation.kind === "clear") context.clearRect(0, 0, width, height);
  if (operation.kind === "image") {
    context.clearRect(0, 0, width, height);
    context.drawImage(operation.image, 0, 0, width, height);
  }
  context.restore();
}

/**
 * A soft edge is the shadow of a stroke far outside: unlike filters, every browser draws it, and
 * the overlaps of one stroke do not add up.
 * @param {CanvasRenderingContext2D} context
 * @param {{points: Point[], size: number, hardness: number}} stroke
 * @param {number} scale
 */
function drawStroke(context, { points, size, hardness }, scale) {
  // Of the Gaussian. A third of the radius at most, so that the middle of a dot stays nearly white.
  const deviation = (size * (1 - hardness)) / 6;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = Math.max(1, size - 2 * deviation);
  if (deviation >= 0.25) {
    const far = 2 * (context.canvas.width + context.canvas.height);
    context.shadowColor = "#fff";
    context.shadowBlur = 2 * deviation * scale;
    context.shadowOffsetX = far;
    context.translate(-far / scale, 0);
  }
  trace(context, points);
  context.stroke();
}

/** @param {CanvasRenderingContext2D} context @param {Point[]} points */
function trace(context, points) {
  context.beginPath();
  context.moveTo(...points[0]);
  // A path of one point is drawn as a dot, with its shadow, only if it has some length.
  context.lineTo(points[0][0] + 0.01, points[0][1]);
  for (const point of points.slice(1)) context.lineTo(...point);
}

export class Mask {
  /** @param {number} width @param {number} height */
  constructor(width, height) {
    const [canvas, context] = newCanvas(width, height);
    this.canvas = canvas;
    this.context = context;
    /** @type {Operation[]} */
    this.operations = [];
    /** How many of the operations are applied; those after it can be redone. */
    this.applied = 0;
    /** The mask after 0, 10, 20, … operations. @type {HTMLCanvasElement[]} */
    this.snapshots = [newCanvas(width, height)[0]];
  }

  get width() {
    return this.canvas.width;
  }

  get height() {
    return this.canvas.height;
  }

  /** @param {Operation} operation */
  apply(operation) {
    this.operations.length = this.applied;
    this.snapshots.length = Math.floor(this.applied / SNAPSHOT_EVERY) + 1;
    this.operations.push(operation);
    this._step();
    if (this.operations.length > MAX_OPERATIONS) {
      this.operations.splice(0, SNAPSHOT_EVERY);
      this.snapshots.shift();
      this.applied -= SNAPSHOT_EVERY;
    }
  }

  /** @returns {boolean} whether there was something to undo */
  undo() {
    if (!this.applied) return false;
    const wanted = this.applied - 1;
    const snapshot = Math.floor(wanted / SNAPSHOT_EVERY);
    draw(this.context, { kind: "image", image: this.snapshots[snapshot] });
    this.applied = snapshot * SNAPSHOT_EVERY;
    while (this.applied < wanted) this._step();
    return true;
  }

  /** @returns {boolean} */
  redo() {
    if (this.applied === this.operations.length) return false;
    this._step();
    return true;
  }

  _step() {
    draw(this.context, this.operations[this.applied]);
    this.applied += 1;
    if (this.applied % SNAPSHOT_EVERY) return;
    const [copy, context] = newCanvas(this.width, this.height);
    context.drawImage(this.canvas, 0, 0);
    this.snapshots[this.applied / SNAPSHOT_EVERY] = copy;
  }

  /** Share that is repainted, 0 to 1, looked up on a small copy; and whether soft edges were meant. */
  measure() {
    const scale = Math.min(1, 256 / Math.max(this.width, this.height));
    const [small, context] = newCanvas(Math.ceil(this.width * scale), Math.ceil(this.height * scale));
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, small.width, small.height);
    const { data } = context.getImageData(0, 0, small.width, small.height);
    let painted = 0;
    for (let index = 3; index < data.length; index += 4) if (data[index] >= 128) painted += 1;
    const isSoft = this.operations.slice(0, this.applied).some((each) =>
      each.kind === "stroke" ? each.hardness < 1 && !each.erase : each.kind === "image" && each.isSoft);
    return { coverage: painted / (data.length / 4), isSoft };
  }

  /** A PNG: white is repainted, black is kept. */
  async toPng() {
    const [canvas, context] = newCanvas(this.width, this.height);
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.canvas, 0, 0);
    return toBlob(canvas);
  }
}

/**
 * A picture of a mask as an operation: light is repainted, or what is transparent where it has alpha.
 * @param {CanvasImageSource} source
 * @param {number} width
 * @param {number} height
 * @param {"light"|"transparent"} meaning
 * @returns {Operation}
 */
export function maskFromPicture(source, width, height, meaning) {
  const [image, context] = newCanvas(width, height);
  context.drawImage(source, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  let grey = 0;
  for (let index = 0; index < data.length; index += 4) {
    const luma = 0.299 * data[index] + 0.587 * data[index + 1] + 0.114 * data[index + 2];
    data[index + 3] = meaning === "light" ? (luma * data[index + 3]) / 255 : 255 - data[index + 3];
    data[index] = data[index + 1] = data[index + 2] = 255;
    if (data[index + 3] > 32 && data[index + 3] < 224) grey += 1;
  }
  context.putImageData(pixels, 0, 0);
  // The edges of a hard mask that was scaled are grey too, but few.
  return { kind: "image", image, isSoft: grey > data.length / 4 / 20 };
}
