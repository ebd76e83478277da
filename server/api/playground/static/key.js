// @ts-check
// The form that asks for an API key, the same on every page.

import { announce, byId } from "./dom.js";
import { onKeyRefused, storedKey, storeKey } from "./server.js";

/** @param {() => unknown} onKey called when a key was entered */
export function setUpKeyForm(onKey) {
  onKeyRefused.call = () => askForKey(true);
  byId("key-change").addEventListener("click", () => askForKey(false));
  byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    storeKey(byId("key").value.trim());
    byId("key").value = "";
    onKey();
  });
}

/** @param {boolean} isRefused whether the server refused the key of this tab, or its absence */
export function askForKey(isRefused) {
  const form = byId("key-form");
  const text = !isRefused ? "The page keeps the key until you close this tab, and sends it with each call."
    : storedKey() ? "This key is unknown, expired or revoked. Enter another one."
      : "This server asks for an API key. The page keeps it until you close this tab.";
  if (byId("key-text").textContent !== text || form.hidden) announce(text);
  byId("key-text").textContent = text;
  byId("key-text").classList.toggle("error", isRefused && Boolean(storedKey()));
  form.hidden = false;
  if (!isRefused) byId("key").focus();
}

/** The server has answered a call. */
export function acceptKey() {
  byId("key-form").hidden = true;
  byId("key-change").hidden = !storedKey();
}
