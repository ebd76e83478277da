// @ts-check
// Elements, and the one place where screen readers hear of changes.

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, any>} [properties] those with a dash, `class`, `for`, `role` and `tabindex` become attributes
 * @param {...(Node|string|null)} children
 * @returns {any}
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(class|for|role|tabindex|data-|aria-)/.test(name)) {
      if (value !== null) element.setAttribute(name, String(value));
    } else if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else {
      /** @type {any} */ (element)[name] = value;
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** @param {string} id @returns {any} */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`no element #${id}`);
  return element;
}

/**
 * A button with a text.
 * @param {string} text
 * @param {(event: Event) => unknown} onclick
 * @param {Record<string, any>} [more]
 */
export function button(text, onclick, more = {}) {
  return el("button", { type: "button", onclick, ...more }, text);
}

/** Tell screen readers of a change. @param {string} text */
export function announce(text) {
  byId("live").textContent = text;
}

/** Let the browser save a file. @param {Blob} blob @param {string} name */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {Blob} blob @returns {Promise<string>} */
export function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/**
 * An empty canvas.
 * @param {number} width
 * @param {number} height
 * @returns {[HTMLCanvasElement, CanvasRenderingContext2D]}
 */
export function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (!context) throw new Error("no canvas in this browser");
  return [canvas, context];
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {string} [type]
 * @param {number} [quality]
 * @returns {Promise<Blob>}
 */
export function toBlob(canvas, type = "image/png", quality = undefined) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The picture is too large for this browser."))), type, quality);
  });
}
