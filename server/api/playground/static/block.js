// @ts-check
// A text that is shown shortened and copied whole.

import { announce, button, el } from "./dom.js";

/** Long base64 is cut to its beginning and its size. @param {string} text */
export function shortened(text) {
  return text.replace(/([A-Za-z0-9+/]{60})[A-Za-z0-9+/=]{200,}/g, (all, start) => `${start}… ${Math.round(all.length / 1024)} kB`);
}

/** @param {string} text @returns {HTMLElement} */
export function block(text) {
  const copy = button("Copy", async () => {
    const isCopied = await copyText(text);
    copy.textContent = isCopied ? "Copied" : "Not allowed here";
    announce(isCopied ? "Copied." : "The browser did not allow copying.");
  }, { class: "copy" });
  return el("div", { class: "block" }, copy, el("pre", { tabindex: 0 }, el("code", {}, shortened(text))));
}

/** Pages without https have no clipboard but that of a selection. @param {string} text */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { value: text, class: "hidden", "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}
