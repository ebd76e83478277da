// @ts-check
// An ended job: before and after, its samples, their difference, and what can be done with them.

import { announce, byId, button, el, newCanvas, save } from "./dom.js";
import { buildDetails } from "./details.js";
import { sentenceOf } from "./jobs.js";
import { call, ownPath } from "./server.js";

/** Differences are multiplied by this, because most could not be seen. */
const AMPLIFY = 4;

/** @typedef {{url: string, blob: Blob, output: any}} Sample */

export class ResultView {
  /**
   * @param {{openapi: any, onClose: () => void, onNext: (file: Blob, name: string) => void,
   *   onEdit: (entry: any) => void, onAgain: (entry: any, changes: Record<string, any>) => void}} hooks
   */
  constructor(hooks) {
    this.hooks = hooks;
    this.element = byId("result");
    /** @type {string[]} */
    this.urls = [];
    /** @type {any} */
    this.entry = null;
  }

  get isOpen() {
    return !this.element.hidden;
  }

  close() {
    this.element.hidden = true;
    for (const url of this.urls) URL.revokeObjectURL(url);
    this.urls = [];
    this.entry = null;
    this.hooks.onClose();
  }

  /** @param {Blob} blob */
  urlOf(blob) {
    const url = URL.createObjectURL(blob);
    this.urls.push(url);
    return url;
  }

  /** @param {any} entry */
  async open(entry) {
    this.entry = entry;
    const head = el("div", { class: "bar" }, el("h2", {}, `Job ${entry.id}`), el("span", { class: "hint" }, sentenceOf(entry)),
      button("Edit this request", () => this.hooks.onEdit(entry)), button("Back to painting", () => this.close()));
    this.body = el("div", { class: "result-body" }, el("p", { class: "hint" }, "Loading the pictures…"));
    this.element.replaceChildren(head, this.body, buildDetails(entry, this.hooks.openapi));
    byId("editor").hidden = true;
    this.element.hidden = false;
    const samples = await this.samplesOf(entry);
    if (this.entry !== entry) return;
    this.before = entry.picture ? this.urlOf(entry.picture) : null;
    this.body.replaceChildren();
    if (!samples.length) this.body.append(el("p", { class: "nothing" }, explainNothing(entry)));
    else this.showSamples(samples);
    this.body.append(...this.warnings());
  }

  /** @param {any} entry @returns {Promise<Sample[]>} pictures that the server still has */
  async samplesOf(entry) {
    const outputs = entry.answer?.outputs ?? [];
    const blobs = await Promise.all(
      outputs.map((/** @type {any} */ each) => call(ownPath(each.url)).then((answer) => answer.blob()).catch(() => null)),
    );
    return blobs.flatMap((blob, index) => (blob ? [{ url: this.urlOf(blob), blob, output: outputs[index] }] : []));
  }

  /** @param {Sample[]} samples */
  showSamples(samples) {
    this.figure = el("div", { class: "compare" });
    this.facts = el("p", { class: "facts" });
    this.actions = el("div", { class: "row" });
    const strip = el("div", { class: "strip", role: "group", "aria-label": "Samples" });
    const choose = (/** @type {number} */ index) => {
      strip.querySelectorAll("button").forEach((/** @type {HTMLElement} */ each, /** @type {number} */ at) => each.setAttribute("aria-pressed", String(at === index)));
      this.choose(samples[index]);
    };
    samples.forEach((sample, index) =>
      strip.append(el("button", { type: "button", "aria-label": `Sample ${index + 1}, seed ${sample.output.seed}`, onclick: () => choose(index) },
        el("img", { src: sample.url, alt: "", width: 88, height: 88 }), el("span", {}, `seed ${sample.output.seed}`))));
    strip.hidden = samples.length < 2;
    this.body.append(this.figure, this.facts, strip, this.actions);
    choose(0);
  }

  /** @param {Sample} sample */
  choose(sample) {
    this.sample = sample;
    this.showSlider(sample);
    this.facts.replaceChildren(...factsOf(sample.output, this.entry));
    const { output, blob } = sample;
    const suffix = output.url.split(".").pop();
    const entry = this.entry;
    this.actions.replaceChildren(
      button("Use as next picture", () => this.hooks.onNext(blob, `job-${entry.id}.${suffix}`), { class: "primary" }),
      button("Again with this seed", () => this.hooks.onAgain(entry, { seed: output.seed, samples: 1 })),
      button("Variations", () => this.hooks.onAgain(entry, { seed: null, samples: 4 })),
      button("Download", () => save(blob, `job-${entry.id}-seed-${output.seed}.${suffix}`)),
    );
    if (this.before) this.actions.append(this.differenceButton());
  }

  differenceButton() {
    const toggle = button("Difference", async () => {
      const isOn = toggle.getAttribute("aria-pressed") === "true";
      toggle.setAttribute("aria-pressed", String(!isOn));
      if (isOn) this.showSlider(/** @type {Sample} */ (this.sample));
      else await this.showDifference(/** @type {Sample} */ (this.sample));
    }, { "aria-pressed": "false" });
    return toggle;
  }

  /** @param {Sample} sample */
  showSlider({ url, output }) {
    const after = el("img", { src: url, alt: `Result with seed ${output.seed}` });
    if (!this.before) {
      this.figure.replaceChildren(el("div", { class: "layers" }, after));
      return;
    }
    const before = el("img", { class: "before", src: this.before, alt: "Picture before" });
    const line = el("div", { class: "split", "aria-hidden": "true" });
    const slider = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Before and after" });
    const move = () => {
      before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
      line.style.left = `${slider.value}%`;
    };
    slider.addEventListener("input", move);
    move();
    after.addEventListener("load", () => {
      const box = this.entry?.answer.mask?.box;
      if (!box) return;
      // In the middle of what was repainted, so that both sides show some of it.
      slider.value = (50 * (box[0] + box[2])) / after.naturalWidth;
      move();
    });
    this.figure.replaceChildren(
      el("div", { class: "layers" }, after, before, line, el("span", { class: "tag left" }, "Before"), el("span", { class: "tag right" }, "After")),
      slider,
    );
  }

  /** @param {Sample} sample */
  async showDifference({ blob, output }) {
    const [after, before] = await Promise.all([createImageBitmap(blob), createImageBitmap(this.entry.picture)]);
    const isScaled = after.width !== before.width || after.height !== before.height;
    const canvas = differenceOf(before, after);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "Difference picture: the lighter, the more a pixel has changed");
    const words = isScaled ? "The picture was scaled in this page to compare them, so fine edges differ everywhere." : "Black pixels have not changed.";
    this.figure.replaceChildren(el("div", { class: "layers" }, canvas), el("p", { class: "hint" }, `Differences, ${AMPLIFY} times as strong. ${words}`));
    announce(fidelityOf(output) ?? "Difference shown.");
  }

  /** @returns {HTMLElement[]} */
  warnings() {
    const sentences = (this.entry.answer?.warnings ?? []).map((/** @type {any} */ each) => each.message);
    if (this.entry.note) sentences.push(this.entry.note);
    return sentences.map((/** @type {string} */ text) => el("p", { class: "warning" }, text));
  }
}

/** @param {ImageBitmap} before @param {ImageBitmap} after @returns {HTMLCanvasElement} */
function differenceOf(before, after) {
  const { width, height } = after;
  const [canvas, context] = newCanvas(width, height);
  context.drawImage(before, 0, 0, width, height);
  context.globalCompositeOperation = "difference";
  context.drawImage(after, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let index = 0; index < data.length; index += 4) {
    const most = Math.max(data[index], data[index + 1], data[index + 2]) * AMPLIFY;
    data[index] = data[index + 1] = data[index + 2] = most;
    data[index + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** @param {any} output @returns {string | null} */
function fidelityOf({ changed_outside: changed, largest_difference_outside: most }) {
  if (changed === null || changed === undefined) return null;
  if (changed === 0) return "0 pixels changed outside the mask";
  return `${changed} pixels changed outside the mask, by ${most} of 255 at most`;
}

/** @param {any} output @param {any} entry @returns {HTMLElement[]} */
function factsOf(output, { answer }) {
  const { params, timings_ms: times } = answer;
  const facts = [
    fidelityOf(output),
    `seed ${output.seed}`,
    params.width && !params.only_masked ? `${params.width}×${params.height}` : null,
    times.total ? `${(times.total / 1000).toFixed(1)} s` : null,
    output.is_flagged ? "flagged by the safety checker and replaced" : null,
  ];
  return facts.filter((each) => each !== null).map((each, index) => el("span", { class: index === 0 && output.changed_outside === 0 ? "good" : "" }, each));
}

/** @param {any} entry */
function explainNothing(entry) {
  if (entry.state === "finished") return "The server has removed the pictures of this job. “Edit this request” brings the request back.";
  if (entry.state === "cancelled") return "This job was cancelled before it had pictures.";
  return sentenceOf(entry) + ".";
}
