// What the browser keeps: conversations in IndexedDB, small things in localStorage, the key for the session.

const CHANNEL = "BroadcastChannel" in window ? new BroadcastChannel("gemmart") : null;

let opened; // a promise of the database; null in it where the browser keeps nothing

function open() {
  opened ??= new Promise((resolve) => {
    let asked;
    try {
      asked = indexedDB.open("gemmart", 1);
    } catch {
      return resolve(null);
    }
    asked.onupgradeneeded = () => asked.result.createObjectStore("conversations", { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  });
  return opened;
}

async function transact(mode, act) {
  const database = await open();
  if (!database) {
    throw new Error("this browser keeps nothing for this page");
  }
  return new Promise((resolve, reject) => {
    const transaction = database.transaction("conversations", mode);
    const request = act(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error ?? new Error("it was not kept"));
  });
}

function tell(id) {
  CHANNEL?.postMessage(id);
}

/** All conversations, the one changed last first. */
export async function conversations() {
  const found = await transact("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

export async function keep(conversation) {
  await transact("readwrite", (store) => store.put(structuredClone(conversation)));
  tell(conversation.id);
}

export async function forget(id) {
  await transact("readwrite", (store) => store.delete(id));
  tell(id);
}

/** Call `act` with the id of a conversation that another tab has changed. */
export function onChanged(act) {
  if (CHANNEL) {
    CHANNEL.onmessage = (event) => act(event.data);
  }
}

/** A value under a name that outlives the page: null where there is none. */
export function remembered(name, storage = "localStorage") {
  try {
    return JSON.parse(window[storage].getItem(`gemmart.${name}`));
  } catch {
    return null;
  }
}

export function remember(name, value, storage = "localStorage") {
  try {
    window[storage].setItem(`gemmart.${name}`, JSON.stringify(value));
  } catch {
    // It holds until the page is left.
  }
}

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID is not there over plain HTTP
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
