// @ts-check
// The tool strip and the keyboard's shortcuts. Keys are compared by what they write, not by where
// they are, because layouts differ.

import { announce, byId, button, el } from "./dom.js";
import { extendForm } from "./editor.js";

const TOOLS = [
  { tool: "brush", text: "Brush", key: "b" },
  { tool: "eraser", text: "Eraser", key: "e" },
  { tool: "rectangle", text: "Rectangle", key: "u" },
  { tool: "lasso", text: "Lasso", key: "l" },
];
const COLOURS = ["#e11d48", "#2563eb", "#16a34a", "#facc15", "#ffffff", "#000000"];

/** @param {import("./editor.js").Editor} editor */
export function buildTools(editor) {
  const { stage } = editor;
  const radios = TOOLS.map(({ tool, text, key }) =>
    button(text, () => choose(tool), { "aria-pressed": String(tool === stage.tool), title: `${text} (${key.toUpperCase()})`, "data-tool": tool }),
  );
  /** @param {any} tool */
  function choose(tool) {
    stage.tool = tool;
    stage.showRing(!stage.ring.hidden);
    for (const each of radios) each.setAttribute("aria-pressed", String(each.dataset.tool === tool));
    announce(`${tool} chosen`);
  }
  const size = range("Size", { min: 1, max: 256, value: stage.size }, (value) => stage.setSize(value));
  stage.element.addEventListener("brush", () => {
    size.input.max = String(Math.max(256, stage.size));
    size.input.value = String(stage.size);
    size.output.textContent = String(stage.size);
  });
  const hardness = range("Hardness", { min: 0, max: 100, value: 100 }, (value) => (stage.hardness = value / 100));
  const opacity = range("Opacity", { min: 10, max: 100, value: 60 }, (value) => (byId("paint").style.opacity = String(value / 100)));
  const colour = el("select", { "aria-label": "Overlay colour", title: "Overlay colour" },
    ...COLOURS.map((each, index) => el("option", { value: each }, ["Red", "Blue", "Green", "Yellow", "White", "Black"][index])));
  colour.addEventListener("change", () => {
    stage.colour = colour.value;
    stage.paint();
  });
  const maskFile = el("input", { type: "file", accept: "image/*", hidden: true, id: "mask-file", "aria-label": "Mask file" });
  maskFile.addEventListener("change", () => {
    const file = maskFile.files[0];
    if (file) editor.attempt(() => editor.useMask(file, "light"));
    maskFile.value = "";
  });
  const dialog = extendForm(editor);
  const undo = button("↶", () => editor.undo(), { title: "Undo (Ctrl+Z)", "aria-label": "Undo", "data-edit": "undo" });
  const redo = button("↷", () => editor.redo(), { title: "Redo (Ctrl+Shift+Z)", "aria-label": "Redo", "data-edit": "redo" });
  byId("tools").append(
    group("Tool", ...radios),
    group("Undo", undo, redo),
    group("Brush", size.label, hardness.label),
    group("Edit", button("Invert", () => stage.apply({ kind: "invert" }), { title: "Invert (Shift+V)" }),
      button("Clear", () => stage.apply({ kind: "clear" }), { title: "Clear (Shift+C)" })),
    group("View", button("−", () => stage.zoom(1 / 1.25), { "aria-label": "Zoom out", title: "Zoom out (-)" }),
      button("+", () => stage.zoom(1.25), { "aria-label": "Zoom in", title: "Zoom in (+)" }),
      button("Fit", () => stage.fit(), { title: "Fit (0)" })),
    more("Mask", button("Load a mask", () => maskFile.click()), maskFile, button("Save the mask", () => editor.saveMask()),
      button("From transparency", () => editor.attempt(() => editor.maskFromAlpha())), opacity.label, el("label", {}, "Colour ", colour)),
    more("Picture", button("Extend the canvas", () => dialog.showModal()), button("Another picture", () => editor.close())),
  );
  listenToKeys(editor, choose);
}

/** @param {string} label @param {...Node} children */
function group(label, ...children) {
  return el("div", { class: "group", role: "group", "aria-label": label }, ...children);
}

/** A group that unfolds. @param {string} label @param {...Node} children */
function more(label, ...children) {
  const details = el("details", { class: "menu" }, el("summary", {}, label), el("div", { class: "menu-items" }, ...children));
  details.addEventListener("click", (/** @type {Event} */ event) => {
    if (/** @type {HTMLElement} */ (event.target).tagName === "BUTTON") details.open = false;
  });
  document.addEventListener("pointerdown", (event) => {
    if (!details.contains(event.target)) details.open = false;
  });
  return details;
}

/** @param {string} name @param {object} bounds @param {(value: number) => void} onChange */
function range(name, bounds, onChange) {
  const input = el("input", { type: "range", ...bounds });
  const output = el("output", {}, String(input.value));
  input.addEventListener("input", () => {
    output.textContent = input.value;
    onChange(Number(input.value));
  });
  return { input, output, label: el("label", { class: "range" }, el("span", {}, name), output, input) };
}

/** @param {import("./editor.js").Editor} editor @param {(tool: string) => void} choose */
function listenToKeys(editor, choose) {
  const { stage } = editor;
  /** What a key does, its text for the list, and the modifiers it needs. @type {[string, string, () => void][]} */
  const plain = [
    ...TOOLS.map(({ tool, text, key }) => /** @type {[string, string, () => void]} */ ([key, text, () => choose(tool)])),
    ["x", "Swap brush and eraser", () => choose(stage.tool === "eraser" ? "brush" : "eraser")],
    ["[", "Smaller brush (also ,)", () => stage.setSize(stage.size - Math.max(1, stage.size * 0.1))],
    ["]", "Larger brush (also .)", () => stage.setSize(stage.size + Math.max(1, stage.size * 0.1))],
    ["Shift+C", "Clear the mask", () => stage.apply({ kind: "clear" })],
    ["Shift+V", "Invert the mask", () => stage.apply({ kind: "invert" })],
    ["+", "Zoom in", () => stage.zoom(1.25)],
    ["-", "Zoom out", () => stage.zoom(1 / 1.25)],
    ["0", "Fit", () => stage.fit()],
    ["h", "Show or hide this list", () => (byId("shortcuts").open = !byId("shortcuts").open)],
  ];
  const described = [
    ...plain.map(([key, text]) => [key.length === 1 ? key.toUpperCase() : key, text]),
    ["O (held)", "Hide the mask"],
    ["Space + drag, middle button", "Pan, also in the middle of a stroke"],
    ["Right button, Ctrl + drag", "Erase with any tool"],
    ["Wheel / Shift + wheel", "Zoom / brush size"],
    ["Trackpad", "Pinch zooms, two fingers sideways pan"],
    ["Ctrl+V", "Paste a picture"],
    ["Shift + [ or ]", "Brush size, ten times as much"],
    ["Ctrl+Z / Ctrl+Shift+Z, Ctrl+Y", "Undo / redo"],
    ["Esc", "Give up the stroke, leave the result"],
    ["Ctrl+Enter", "Send"],
    ["Shift+X", "Cancel the newest job"],
  ];
  byId("shortcut-list").append(...described.flatMap(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)]));
  const actions = new Map(plain.map(([key, , action]) => [key, action]));
  for (const [alias, key] of [[",", "["], [".", "]"], ["=", "+"]]) actions.set(alias, /** @type {() => void} */ (actions.get(key)));
  actions.set("{", () => stage.setSize(stage.size / 2));
  actions.set("}", () => stage.setSize(stage.size * 2));

  document.addEventListener("keydown", (event) => {
    if (!editor.mask || byId("editor").hidden || isTyping(event)) return;
    if ((event.ctrlKey && !event.altKey) || event.metaKey) {
      undoKeys(event, editor);
      return;
    }
    if (event.altKey && !"[]{}".includes(event.key)) return; // AltGr writes brackets
    const onStage = document.activeElement === stage.element;
    const key = event.shiftKey && /^[a-z]$/i.test(event.key) ? `Shift+${event.key.toUpperCase()}` : event.key.toLowerCase();
    if (key === "o") editor.hideMask(true);
    else if (key === " " && (onStage || document.activeElement === document.body)) {
      stage.isPanKeyDown = true;
      stage.element.classList.add("panning");
    } else if (key === "escape") stage.cancel();
    else if (onStage && key.startsWith("arrow")) moveBrush(event, stage);
    else if (onStage && key === "enter") stage.dab();
    else if (actions.has(key)) actions.get(key)?.();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keyup", (event) => {
    if (event.key === " ") stage.releasePan();
    if (event.key.toLowerCase() === "o") editor.hideMask(false);
  });
  window.addEventListener("blur", () => editor.hideMask(false));
}

/** @param {KeyboardEvent} event */
function isTyping(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  if (target.closest("dialog[open]")) return true;
  if (target.tagName === "INPUT") return !["range", "checkbox", "radio"].includes(/** @type {HTMLInputElement} */ (target).type);
  return ["TEXTAREA", "SELECT"].includes(target.tagName);
}

/** @param {KeyboardEvent} event @param {import("./editor.js").Editor} editor */
function undoKeys(event, editor) {
  const key = event.key.toLowerCase();
  if (key === "z" && !event.shiftKey) editor.undo();
  else if (key === "y" || key === "z") editor.redo();
  else return;
  event.preventDefault();
}

/** @param {KeyboardEvent} event @param {import("./stage.js").Stage} stage */
function moveBrush(event, stage) {
  const step = event.shiftKey ? 1 : 12;
  const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  stage.moveCursor(x * step, y * step);
}
