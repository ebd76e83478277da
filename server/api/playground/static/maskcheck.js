// @ts-check
// The mask doctor: asks the server what it would make of picture and mask, beside the send button.
// It asks by itself when a mask was loaded and after a cure, otherwise when its button is clicked,
// because each check sends the picture.

import { announce, byId, button, el, toDataUri } from "./dom.js";
import { fileToSend } from "./picture.js";
import { callJson, ServerError } from "./server.js";

/** Browsers turn a file by EXIF themselves, and its mask is made here in its proportions. */
const NOT_OF_THIS_PAGE = ["exif_turned", "other_size", "other_proportions"];
/** Proportions that differ by less come from sides of whole pixels. */
const SAME_PROPORTIONS = 0.02;
const ASK = "Check mask";
const FINE = "The mask looks fine.";

/** @typedef {{code: string, level: string, message: string, cure: string, fields: Record<string, boolean>}} Finding */

export class MaskCheck {
  /**
   * @param {import("./editor.js").Editor} editor
   * @param {() => import("./ask.js").Ask | null} ask
   */
  constructor(editor, ask) {
    this.editor = editor;
    this.ask = ask;
    /** What the shown answer is about. */
    this.checked = "";
    /** The operation that loaded the newest mask, and what is to be said if it stretched the file. @type {{operation: any, finding: Finding | null}} */
    this.loading = { operation: null, finding: null };
    this.asking = byId("check-mask");
    this.asking.addEventListener("click", () => this.run(true));
    this.found = byId("mask-findings");
  }

  /** After each change of the page: an answer about another mask is not shown. */
  refresh() {
    const { picture, mask } = this.editor;
    this.asking.hidden = !picture || !mask || !this.ask();
    if (this.found.hasChildNodes() && this.state() !== this.checked) this.found.replaceChildren();
  }

  /** All that an answer depends on. */
  state() {
    const { prompt, negative_prompt: negative, ...fields } = this.ask()?.read() ?? {};
    return `${this.editor.version} ${JSON.stringify(fields)}`;
  }

  /** What there is to say of the stretching of a mask that is still on the stage. */
  get stretched() {
    const { operation, finding } = this.loading;
    const applied = this.editor.mask?.operations.slice(0, this.editor.mask.applied) ?? [];
    const newest = applied.findLast(({ kind }) => kind === "image" || kind === "clear");
    return newest === operation ? finding : null;
  }

  /** A mask was loaded from a file of this size. @param {{width: number, height: number}} file */
  loaded(file) {
    const { mask, picture } = this.editor;
    this.loading = { operation: mask?.operations[mask.applied - 1], finding: stretching(file, picture) };
    this.run(false);
  }

  /** @param {boolean} isAsked by a click, which is answered whatever comes */
  async run(isAsked) {
    const { editor } = this;
    if (!editor.picture || !editor.mask || !this.ask()) return;
    const state = this.state();
    this.asking.textContent = "Checking…";
    try {
      const answer = await callJson("api/masks/check", { method: "POST", body: JSON.stringify(await this.body()) });
      if (state === this.state()) this.show(answer, isAsked);
    } catch (error) {
      // Sending says it too, so only who has asked is told before.
      if (isAsked && state === this.state()) this.refuse(error instanceof ServerError ? error : new ServerError(String(error)));
    } finally {
      this.asking.textContent = ASK;
    }
  }

  /** The request as it would be sent. */
  async body() {
    const { picture, mask } = this.editor;
    if (!picture || !mask) throw new Error("no picture");
    const fields = this.ask()?.read() ?? {};
    const sent = picture.file ? await fileToSend(picture, Boolean(fields.only_masked)) : { file: null, note: "" };
    const image = picture.url && !sent.note ? picture.url : await toDataUri(/** @type {Blob} */ (sent.file));
    return { ...fields, init_image: image, mask_image: await toDataUri(await mask.toPng()) };
  }

  /** @param {any} answer @param {boolean} isAsked */
  show(answer, isAsked) {
    this.checked = this.state();
    const isShown = Boolean(this.editor.picture?.file);
    const own = answer.findings.filter((/** @type {Finding} */ each) => !isShown || !NOT_OF_THIS_PAGE.includes(each.code));
    /** @type {Finding[]} */
    const findings = [...(this.stretched ? [this.stretched] : []), ...own];
    const list = findings.length ? el("ul", {}, ...findings.map((each) => this.item(each))) : el("p", {}, FINE);
    this.found.replaceChildren(list, el("p", { class: "hint" }, estimate(answer)), overlay(answer));
    if (isAsked || findings.length) announce(findings[0]?.message ?? FINE);
  }

  /** @param {ServerError} error */
  refuse(error) {
    this.checked = this.state();
    const others = error.errors.map(({ field, message }) => `${field} ${message}.`);
    const text = ["The mask could not be checked.", error.message, ...others].join(" ");
    this.found.replaceChildren(el("p", { class: "hint" }, text));
    announce(text);
  }

  /** @param {Finding} finding */
  item(finding) {
    const cure = this.cure(finding);
    return el("li", { class: `finding ${finding.level}`, "data-code": finding.code },
      el("p", {}, el("b", {}, `${inWords(finding.code)}: `), finding.message, cure ? null : ` ${finding.cure}`), cure);
  }

  /** A button where one click is enough. @param {Finding} finding */
  cure({ code, fields, cure }) {
    const { stage } = this.editor;
    if (code === "probably_inverted") return button("Invert the mask", () => this.apply(() => stage.apply({ kind: "invert" })), { title: cure });
    if (code === "full") return button("Clear the mask", () => this.apply(() => stage.apply({ kind: "clear" })), { title: cure });
    const [field] = Object.keys(fields);
    const input = field && this.ask()?.input(field);
    if (!input) return null;
    const label = field === "soft_mask" ? "Use a soft mask" : "Only masked";
    return button(label, () => this.apply(() => {
      input.checked = fields[field];
      input.dispatchEvent(new Event("input", { bubbles: true }));
    }), { title: cure });
  }

  /** @param {() => void} act */
  apply(act) {
    act();
    this.asking.focus({ preventScroll: true }); // the button that was clicked is gone
    this.run(true);
  }
}

/** @param {{width: number, height: number}} file @param {import("./picture.js").Picture | null} picture @returns {Finding | null} */
function stretching(file, picture) {
  if (!picture?.file) return null;
  const ratio = (file.width * picture.height) / (file.height * picture.width);
  if (Math.abs(Math.log(ratio)) < SAME_PROPORTIONS) return null;
  return {
    code: "other_proportions", level: "warning", fields: {},
    message: `The mask has ${file.width} × ${file.height} pixels and the picture ${picture.width} × ${picture.height}: it is stretched.`,
    cure: "Load a mask of the same proportions, or undo and paint one.",
  };
}

/** @param {string} code */
function inWords(code) {
  return `${code[0].toUpperCase()}${code.slice(1).replaceAll("_", " ")}`;
}

/** @param {any} answer */
function estimate({ eta_s: seconds, position, canvas }) {
  const time = seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
  const queue = position > 1 ? `, ${position - 1} ${position === 2 ? "job" : "jobs"} before it` : "";
  return `About ${time} for ${canvas.width} × ${canvas.height} pixels${queue}.`;
}

/** The picture with mask and crop, folded away. @param {any} answer */
function overlay({ overlay: source, crop: [left, top, right, bottom], mask, result }) {
  const share = `${(mask.coverage * 100).toFixed(1)} % in ${mask.regions} ${mask.regions === 1 ? "area" : "areas"}`;
  const isWhole = right - left === result.width && bottom - top === result.height;
  const crop = isWhole ? "The model works on the whole picture." : `The model works on the box of ${right - left} × ${bottom - top} pixels.`;
  return el("details", { class: "overlay" }, el("summary", {}, "What the server sees"),
    el("img", { src: source, alt: "The picture with the mask in colour, and a box around what the model works on" }),
    el("p", { class: "hint" }, `Repainted: ${share}. ${crop}`));
}
