// @ts-check
// A call of the reference as a request and as a curl command, and the pictures in a JSON value.

import { quoted } from "./shell.js";

const BASE64_PICTURE = /^(iVBORw0KGgo|\/9j\/|UklGR)[A-Za-z0-9+/=\s]{60,}$/;
const TYPES = { i: "png", "/": "jpeg", U: "webp" };
const OWN_PICTURE = /\/((?:generations|uploads)\/[\w.-]+\.(?:png|jpg|webp))$/;

/** @param {string} text */
export function isDataUri(text) {
  return /^data:image\/[a-z]+;base64,/.test(text);
}

/**
 * The pictures in a value: data URIs, base64, and those that this server serves.
 * @param {any} value
 * @param {(string | number)[]} path
 * @returns {{path: (string | number)[], src: string}[]}
 */
export function findPictures(value, path = []) {
  if (typeof value === "string") {
    const own = OWN_PICTURE.exec(value);
    if (isDataUri(value)) return [{ path, src: value }];
    if (own) return [{ path, src: own[1] }];
    if (BASE64_PICTURE.test(value)) return [{ path, src: `data:image/${TYPES[/** @type {"i"} */ (value[0])]};base64,${value}` }];
    return [];
  }
  if (value === null || typeof value !== "object") return [];
  const found = Object.entries(value).flatMap(([name, each]) => findPictures(each, [...path, Array.isArray(value) ? Number(name) : name]));
  // An answer may have the same picture as a URL twice.
  return found.filter(({ src }, index) => found.findIndex((each) => each.src === src) === index);
}

/** @param {any} value @param {(string | number)[]} path @param {string} uri */
export function withPicture(value, path, uri) {
  const inner = path.slice(0, -1).reduce((at, name) => at[name], value);
  inner[path[path.length - 1]] = uri;
  return value;
}

/**
 * @param {import("./schema.js").Call} call
 * @param {{name: string, in: string, value: string}[]} parameters
 * @param {string} mediaType
 * @param {any} media
 * @param {any} value of the body
 * @returns {{url: string, method: string, headers: Record<string, string>, body: any, value: any, mediaType: string}}
 */
export function requestOf(call, parameters, mediaType, media, value) {
  let url = call.path.slice(1);
  const query = new URLSearchParams();
  /** @type {Record<string, string>} */
  const headers = {};
  for (const each of parameters) {
    if (each.in === "path") url = url.replace(`{${each.name}}`, encodeURIComponent(each.value));
    else if (each.value && each.in === "query") query.append(each.name, each.value);
    else if (each.value && each.in === "header") headers[each.name] = each.value;
  }
  if (query.size) url += `?${query}`;
  const request = { url, method: call.method.toUpperCase(), headers, body: undefined, value, mediaType: media ? mediaType : "" };
  return media ? withBody(request, Object.keys(media.encoding ?? {})) : request;
}

/** @param {any} request @param {string[]} files fields that are files in a form */
function withBody(request, files) {
  const { value, mediaType } = request;
  if (mediaType === "application/json") {
    request.headers["Content-Type"] = mediaType;
    request.body = JSON.stringify(value);
  } else {
    request.body = mediaType === "multipart/form-data" ? new FormData() : new URLSearchParams();
    for (const [name, each] of Object.entries(value)) {
      const isFile = mediaType === "multipart/form-data" && files.includes(name) && isDataUri(String(each));
      if (isFile) request.body.append(name, toFile(each), fileName(name, each));
      else request.body.append(name, textOf(each));
    }
  }
  return request;
}

/** @param {any} value */
function textOf(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** @param {string} uri */
function toFile(uri) {
  const [head, text] = uri.split(",");
  return new Blob([Uint8Array.from(atob(text), (each) => each.charCodeAt(0))], { type: head.slice(5).split(";")[0] });
}

/** @param {string} name @param {string} uri */
function fileName(name, uri) {
  return `${name}.${/^data:image\/([a-z]+)/.exec(uri)?.[1]}`;
}

/** @param {ReturnType<requestOf>} request @returns {string} */
export function curlOf({ url, method, headers, body, value, mediaType }) {
  const lines = [`curl ${quoted(new URL(url, document.baseURI).href.replaceAll("%7B", "{").replaceAll("%7D", "}"))}`];
  if (method !== "GET" && !mediaType) lines.push(`-X ${method}`);
  lines.push('-H "X-API-Key: $INPAINT_KEY"', ...Object.entries(headers).map(([name, each]) => `-H ${quoted(`${name}: ${each}`)}`));
  if (mediaType === "application/json") lines.push(`--data-binary @- <<'JSON'\n${JSON.stringify(value, null, 2)}\nJSON`);
  else if (mediaType) {
    const isForm = mediaType === "multipart/form-data";
    for (const [name, each] of body.entries()) {
      if (each instanceof File) lines.push(`-F ${quoted(`${name}=@${each.name}`)}`);
      else lines.push(`${isForm ? "--form-string" : "--data-urlencode"} ${quoted(`${name}=${each}`)}`);
    }
  }
  return `${lines.join(" \\\n  ")}\n`;
}
