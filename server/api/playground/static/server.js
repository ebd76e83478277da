// @ts-check
// Calls of this server's own API, with the key, and its errors as plain sentences.

const KEY_ITEM = "inpaint-key";

export class ServerError extends Error {
  /**
   * @param {string} sentence
   * @param {{status?: number, code?: string, retryAfter?: number, errors?: {field: string, message: string}[]}} [facts]
   *   status: 0 where the server did not answer
   */
  constructor(sentence, { status = 0, code = "", retryAfter = 0, errors = [] } = {}) {
    super(sentence);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
    this.errors = errors;
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY_ITEM) ?? "";
}

/** @param {string} key */
export function storeKey(key) {
  sessionStorage.setItem(KEY_ITEM, key);
}

/** Called when the server refuses the key. */
export const onKeyRefused = { call: () => {} };

/**
 * @param {string} path relative to the page, so that a proxy may add a prefix
 * @param {RequestInit & {headers?: Record<string, string>}} [options]
 * @returns {Promise<Response>}
 * @throws {ServerError} unless the status is 2xx
 */
export async function call(path, options = {}) {
  const key = storedKey();
  const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error instanceof DOMException) throw error;
    throw new ServerError("The server does not answer. Is it running?");
  }
  if (answer.ok) return answer;
  const problem = await readProblem(answer);
  if (problem.status === 401) onKeyRefused.call();
  throw problem;
}

/** @param {string} path @param {RequestInit & {headers?: Record<string, string>}} [options] @returns {Promise<any>} */
export async function callJson(path, options) {
  return (await call(path, options)).json();
}

/** @param {Response} answer @returns {Promise<ServerError>} */
async function readProblem(answer) {
  const body = await answer.json().catch(() => ({}));
  const sentence = body.title ?? body.reason ?? `The server answered with status ${answer.status}.`;
  return new ServerError(sentence.replace(/([^.?!])$/, "$1."), {
    status: answer.status,
    code: body.code ?? "",
    retryAfter: Number(answer.headers.get("Retry-After") ?? 0),
    errors: body.errors ?? [],
  });
}

/**
 * The server's state in a sentence.
 * @returns {Promise<{level: "ok" | "wait" | "bad", text: string}>}
 */
export async function readiness() {
  let answer;
  try {
    answer = await fetch("readyz", { signal: AbortSignal.timeout(10_000) });
  } catch {
    return { level: "bad", text: "The server does not answer. Trying again…" };
  }
  const body = await answer.json().catch(() => ({ reason: "", workers: {} }));
  if (/draining/.test(body.reason)) return { level: "bad", text: "The server is stopping and takes no new jobs." };
  if (!answer.ok) return { level: "bad", text: `The server takes no jobs now: ${body.reason ?? answer.status}.` };
  if (!body.workers?.ready) return { level: "wait", text: `Jobs wait: ${body.reason}.` };
  return { level: "ok", text: "Ready" };
}

/**
 * Server-sent events of an answer. `EventSource` cannot send a key.
 * @param {Response} answer
 * @returns {AsyncGenerator<{name: string, data: any}>}
 */
export async function* readEvents(answer) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + decoder.decode(value, { stream: true }).replaceAll("\r", "")).split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) {
        const name = /^event: ?(.*)$/m.exec(block)?.[1];
        const data = /^data: ?(.*)$/m.exec(block)?.[1];
        if (name && data) yield { name, data: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A picture of ours, whichever public address its URL names. @param {string} url */
export function ownPath(url) {
  const at = url.lastIndexOf("/generations/");
  return at < 0 ? url : url.slice(at + 1);
}
