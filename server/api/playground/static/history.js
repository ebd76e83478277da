// @ts-check
// The jobs of this browser in IndexedDB: requests with their pictures, answers, small results.
// Where the browser stores nothing (private windows), the list lives until the page is closed.

const STORE = "jobs";
export const MAX_ENTRIES = 100;

/** @type {Promise<IDBDatabase | null> | undefined} */
let opened;

function open() {
  opened ??= new Promise((resolve) => {
    const request = indexedDB.open("inpaint-playground", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
  return opened;
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} act
 * @returns {Promise<T | undefined>}
 */
async function transact(mode, act) {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve) => {
    const transaction = database.transaction(STORE, mode);
    const request = act(transaction.objectStore(STORE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => resolve(undefined);
  });
}

/** All entries, oldest first. @returns {Promise<any[]>} */
export async function load() {
  return (await transact("readonly", (store) => store.getAll())) ?? [];
}

/** @param {{key: string}} entry */
export async function put(entry) {
  await transact("readwrite", (store) => store.put(entry));
}

/** @param {string} key */
export async function remove(key) {
  await transact("readwrite", (store) => store.delete(key));
}
