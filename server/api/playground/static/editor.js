// @ts-check
// The editor: which picture and mask are on the stage, and every way that brings a picture there.

import { announce, byId, button, el, save } from "./dom.js";
import { Mask, maskFromPicture } from "./mask.js";
import { extendPicture, maskSize, openPicture, pictureOfUrl } from "./picture.js";
import { Stage } from "./stage.js";

const EXAMPLES = [
  { file: "dots.png", text: "a green square", fields: { prompt: "a green square", strength: 1 } },
  { file: "clouds.png", text: "a red circle", fields: { prompt: "a red circle", strength: 1 } },
  { file: "dusk.png", text: "a white star", fields: { prompt: "a white star", strength: 1 } },
  { file: "mountains.jpg", text: "take the stone away", fields: { prompt: "", strength: 1 } },
];

export class Editor {
  /** @param {{onChange: () => void, onExample: (fields: Record<string, any>) => void, onExtend: () => void, onMaskFile: (file: {width: number, height: number}) => void}} hooks */
  constructor(hooks) {
    this.hooks = hooks;
    this.stage = new Stage(() => this.changed());
    /** @type {import("./picture.js").Picture | null} */
    this.picture = null;
    /** The picture and mask before each extension, which undo goes back to. @type {any[]} */
    this.before = [];
    /** Grows with each change, so that others see whether the user went on painting. */
    this.version = 0;
    this.shownUrl = "";
    /** What the URLs of the server's own pictures begin with. */
    this.publicUrl = "";
    this.showExamples();
    this.listen();
  }

  /** @returns {Mask | null} */
  get mask() {
    return this.stage.mask;
  }

  changed() {
    this.version += 1;
    this.hooks.onChange();
  }

  showExamples() {
    for (const example of EXAMPLES) {
      const image = el("img", { src: `playground/examples/${example.file}`, alt: "", width: 96, height: 96 });
      byId("examples").append(
        el("button", { type: "button", class: "example", onclick: () => this.attempt(() => this.openExample(example)) }, image, example.text),
      );
    }
  }

  listen() {
    const file = byId("file");
    byId("pick").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      if (file.files[0]) this.attempt(() => this.openFile(file.files[0]));
      file.value = "";
    });
    byId("url-form").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.attempt(() => this.openUrl(byId("url").value.trim()));
    });
    this.listenToDrops(byId("editor"));
    document.addEventListener("paste", (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      const hasFile = event.clipboardData?.files.length;
      if (!hasFile && /^(INPUT|TEXTAREA)$/.test(target.tagName)) return;
      this.attempt(() => this.take(event.clipboardData));
    });
  }

  /** Files dropped on the mask's zone, which shows once there is a picture, become the mask. @param {HTMLElement} element */
  listenToDrops(element) {
    const zone = byId("mask-zone");
    const show = (/** @type {boolean} */ isDropping) => {
      element.classList.toggle("dropping", isDropping);
      zone.hidden = !isDropping || !this.mask;
    };
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      show(true);
    });
    element.addEventListener("dragleave", (event) => {
      if (!element.contains(/** @type {Node | null} */ (event.relatedTarget))) show(false);
    });
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      const file = zone.contains(/** @type {Node} */ (event.target)) ? event.dataTransfer?.files[0] : undefined;
      show(false);
      this.attempt(() => (file ? this.loadMask(file, "light") : this.take(event.dataTransfer)));
    });
  }

  /** What was dropped or pasted: a file, or the URL of a picture. @param {DataTransfer | null} data */
  async take(data) {
    const file = data?.files[0];
    if (file) return this.openFile(file);
    const text = (data?.getData("text/uri-list") || data?.getData("text/plain") || "").trim();
    if (/^https?:\/\/\S+$/.test(text)) return this.openUrl(text);
  }

  /** Do what may fail, and show why it failed. @param {() => Promise<unknown> | undefined} action */
  async attempt(action) {
    const error = byId("empty-error");
    error.textContent = "";
    try {
      await action();
    } catch (problem) {
      const text = problem instanceof Error ? problem.message : String(problem);
      (this.picture ? byId("hint") : error).textContent = text;
      announce(text);
    }
  }

  /** @param {File} file */
  async openFile(file) {
    this.show(await openPicture(file, file.name));
  }

  /** @param {string} url */
  async openUrl(url) {
    this.show(await pictureOfUrl(url, this.publicUrl));
  }

  /** @param {{file: string, fields: Record<string, any>}} example */
  async openExample({ file, fields }) {
    const maskFile = file.replace(/\.\w+$/, "_mask.png");
    const [picture, mask] = await Promise.all(
      [file, maskFile].map(async (each) => (await fetch(`playground/examples/${each}`)).blob()),
    );
    this.show(await openPicture(picture, file));
    await this.loadMask(mask, "light");
    this.hooks.onExample(fields);
  }

  /** @param {import("./picture.js").Picture} picture */
  show(picture) {
    this.before = [];
    this.place(picture, new Mask(...maskSize(picture)));
    byId("empty").hidden = true;
    byId("stage").hidden = byId("tools").hidden = false;
    byId("hint").textContent = picture.file
      ? ""
      : "This page shows pictures of its own server only; the server fetches this one when you send. " +
        "Paint on a sheet that is stretched to the picture, or load a mask.";
    this.stage.resize();
    this.stage.fit();
    announce(`Picture ${picture.name} loaded, ${picture.width} by ${picture.height} pixels.`);
  }

  /** @param {import("./picture.js").Picture} picture @param {Mask} mask */
  place(picture, mask) {
    this.picture = picture;
    URL.revokeObjectURL(this.shownUrl);
    this.shownUrl = picture.file ? URL.createObjectURL(picture.file) : "playground/sheet.svg";
    this.stage.size = Math.max(8, Math.round(Math.max(mask.width, mask.height) / 10));
    this.stage.setSize(this.stage.size);
    this.stage.show(this.shownUrl, mask);
    this.changed();
  }

  close() {
    this.picture = null;
    this.stage.mask = null;
    this.before = [];
    byId("empty").hidden = false;
    byId("stage").hidden = byId("tools").hidden = true;
    byId("hint").textContent = "";
    this.changed();
  }

  /** @param {Blob} file @param {"light" | "transparent"} meaning */
  async loadMask(file, meaning) {
    if (!this.mask) return null;
    const bitmap = await createImageBitmap(file).catch(() => null);
    if (!bitmap) throw new Error("This mask is not a picture that your browser can read.");
    if (this.picture && !this.picture.file) {
      // The sheet takes the proportions that the mask was drawn with.
      this.place({ ...this.picture, width: bitmap.width, height: bitmap.height }, new Mask(...maskSize(bitmap)));
    }
    this.stage.apply(maskFromPicture(bitmap, this.mask.width, this.mask.height, meaning));
    return bitmap;
  }

  /** A mask of the user's own. @param {Blob} file @param {"light" | "transparent"} meaning */
  async useMask(file, meaning) {
    const loaded = await this.loadMask(file, meaning);
    if (loaded) this.hooks.onMaskFile(loaded);
  }

  async maskFromAlpha() {
    if (this.picture?.file) await this.useMask(this.picture.file, "transparent");
  }

  async saveMask() {
    if (this.mask) save(await this.mask.toPng(), "mask.png");
  }

  /** @param {{left: number, top: number, right: number, bottom: number}} sides in pixels of the picture */
  async extend(sides) {
    const { picture, mask } = this;
    if (!picture?.file || !mask) return;
    const larger = await extendPicture(picture, sides);
    const wider = new Mask(...maskSize(larger));
    const scale = wider.width / larger.width;
    const box = [sides.left * scale, sides.top * scale, picture.width * scale, picture.height * scale];
    const whole = new Mask(wider.width, wider.height);
    // A border of a few pixels is painted too, which hides the seam.
    const seam = Math.min(8, box[2] / 8, box[3] / 8);
    const edge = (/** @type {number} */ side) => (side ? seam : 0);
    whole.context.fillStyle = "#fff";
    whole.context.fillRect(0, 0, whole.width, whole.height);
    whole.context.clearRect(
      box[0] + edge(sides.left), box[1] + edge(sides.top),
      box[2] - edge(sides.left) - edge(sides.right), box[3] - edge(sides.top) - edge(sides.bottom),
    );
    whole.context.drawImage(mask.canvas, box[0], box[1], box[2], box[3]);
    // The first snapshot is what undo cannot go behind.
    wider.context.drawImage(whole.canvas, 0, 0);
    wider.snapshots[0] = whole.canvas;
    this.before.push({ picture, mask });
    this.place(larger, wider);
    this.hooks.onExtend();
    announce(`Canvas extended to ${larger.width} by ${larger.height} pixels.`);
  }

  undo() {
    if (this.mask?.undo()) {
      this.stage.refresh();
      this.changed();
    } else if (this.before.length) {
      const { picture, mask } = this.before.pop();
      this.place(picture, mask);
    }
  }

  redo() {
    if (!this.mask?.redo()) return;
    this.stage.refresh();
    this.changed();
  }

  /** The picture without the mask while a key is held. @param {boolean} isHidden */
  hideMask(isHidden) {
    byId("paint").classList.toggle("unseen", isHidden);
  }
}

/** A dialog that asks for new pixels on each side. @param {Editor} editor */
export function extendForm(editor) {
  const inputs = Object.fromEntries(
    ["left", "top", "right", "bottom"].map((side) => [
      side,
      el("input", { type: "number", min: 0, max: 2048, step: 8, value: "0", "aria-label": `Pixels ${side}` }),
    ]),
  );
  const dialog = el(
    "dialog",
    { class: "extend", "aria-label": "Extend the canvas" },
    el("h2", {}, "Extend the canvas"),
    el("p", { class: "hint" }, "New pixels on each side; they are marked to be painted."),
    el("div", { class: "cross" }, ...["top", "left", "right", "bottom"].map((side) => el("label", { class: side }, side, inputs[side]))),
  );
  const apply = () => {
    const sides = Object.fromEntries(Object.entries(inputs).map(([side, input]) => [side, Math.max(0, Math.round(+input.value || 0))]));
    dialog.close();
    const isAny = Object.values(sides).some(Boolean);
    if (isAny) editor.attempt(() => editor.extend(/** @type {any} */ (sides)));
  };
  dialog.append(el("p", { class: "row" }, button("Extend", apply, { class: "primary" }), button("Cancel", () => dialog.close())));
  document.body.append(dialog);
  return dialog;
}
