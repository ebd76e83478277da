// @ts-check
// Words of a POSIX shell.

/** @param {string} text */
export function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
