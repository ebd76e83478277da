// @ts-check
// The server's state in the header of each page.

import { announce, byId } from "./dom.js";

/** @param {{level: string, text: string}} found as `readiness` finds it */
export function showServerState({ level, text }) {
  const state = byId("server-state");
  if (state.textContent !== text && state.dataset.level) announce(`Server: ${text}`);
  state.textContent = text;
  state.dataset.level = level;
}
