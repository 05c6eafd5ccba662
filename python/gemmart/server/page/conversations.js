// The conversations of this browser, and the answers that are being written in them.
//
// { id, title, kind: "chat" | "text", changed (milliseconds), settings,
//   messages: [{ role, content, finish?, error?, n_tokens?, speed? }],  of a chat
//   text }                                                              of a text

import { answer } from "./answer.js";
import { notice } from "./dom.js";
import * as store from "./store.js";

const KEEP_EVERY = 1000; // milliseconds, while an answer is being written

/** The one changed last first. */
export let all = [];
/** Ids of those in which an answer is being written, with how to stop it and why nothing comes yet. */
const jobs = new Map();

export const isRunning = (conversation) => jobs.has(conversation.id);
export const waitsFor = (conversation) => jobs.get(conversation.id)?.why ?? "";
export const stop = (conversation) => jobs.get(conversation.id)?.controller.abort();

let complained = false;

function complain(error) {
  if (!complained) {
    complained = true;
    notice(`Conversations are not kept: ${error.message}. Export what you need.`);
  }
}

export async function load() {
  try {
    const found = await store.conversations();
    const isSame = (mine, each) => mine.id === each.id && (isRunning(mine) || mine.changed === each.changed);
    all = found.map((each) => all.find((mine) => isSame(mine, each)) ?? each);
  } catch (error) {
    complain(error);
  }
}

export function create(kind) {
  const settings = store.remembered("settings") ?? {};
  return { id: store.newId(), title: "", kind, changed: Date.now(), settings, messages: [], text: "" };
}

const deleted = new Set(); // ids: what was still being written or typed there is not kept

/** Keep it, as the one changed last; not where it has been deleted. */
export async function save(conversation) {
  if (deleted.has(conversation.id)) {
    return;
  }
  conversation.changed = Date.now();
  conversation.title ||= titleOf(conversation);
  all = [conversation, ...all.filter(({ id }) => id !== conversation.id)];
  await store.keep(conversation).catch(complain);
}

export async function remove(conversation) {
  deleted.add(conversation.id);
  stop(conversation);
  all = all.filter(({ id }) => id !== conversation.id);
  await store.forget(conversation.id).catch(complain);
}

/** Take a deletion back. */
export function restore(conversation) {
  deleted.delete(conversation.id);
  return save(conversation);
}

function titleOf({ kind, text, messages }) {
  const first = (kind === "text" ? text : (messages[0]?.content ?? "")).trim().split("\n", 1)[0];
  return first.length > 60 ? `${first.slice(0, 59)}…` : first;
}

/**
 * Have the server go on in a conversation: `append` gets each piece of text, `changed` is called after each, and when
 * the state has changed. Resolves with what answer() found. Raises ApiError.
 */
export async function run(conversation, path, body, append, changed) {
  const job = { controller: new AbortController(), why: "" };
  jobs.set(conversation.id, job);
  changed();
  await save(conversation);
  let kept = performance.now();
  const onText = (text) => {
    append(text);
    changed();
    if (performance.now() - kept > KEEP_EVERY) {
      kept = performance.now();
      if (!deleted.has(conversation.id)) {
        store.keep(conversation).catch(complain);
      }
    }
  };
  const onWait = (why) => {
    if (job.why !== why) {
      job.why = why;
      changed();
    }
  };
  try {
    return await answer(path, body, { signal: job.controller.signal, onText, onWait });
  } finally {
    jobs.delete(conversation.id);
  }
}

const FORMAT = "gemmart-conversations";

export const exported = () => JSON.stringify({ format: FORMAT, version: 1, conversations: all }, null, 1);

/** Take in an exported file; returns how many conversations were new. Raises Error for another file. */
export async function imported(json) {
  let found;
  try {
    found = JSON.parse(json);
  } catch {
    throw new Error("the file is no JSON");
  }
  if (found?.format !== FORMAT || found.version !== 1 || !found.conversations?.every?.(isConversation)) {
    throw new Error("the file holds no conversations of this page");
  }
  const added = found.conversations.filter((each) => !all.some((mine) => mine.id === each.id));
  for (const each of added) {
    deleted.delete(each.id);
    await store.keep(each);
  }
  await load();
  return added.length;
}

function isConversation(found) {
  return (
    typeof found?.id === "string" &&
    typeof found.title === "string" &&
    ["chat", "text"].includes(found.kind) &&
    typeof found.changed === "number" &&
    typeof found.settings === "object" &&
    found.settings !== null &&
    typeof found.text === "string" &&
    Array.isArray(found.messages) &&
    found.messages.every((each) => ["user", "assistant"].includes(each?.role) && typeof each.content === "string")
  );
}
