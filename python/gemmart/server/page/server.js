// How the server is: its settings, and what the banner says while it cannot answer.

import { get, hasKey, useKey } from "./api.js";
import { ask, button, byId } from "./dom.js";

const PATIENCE = 1500; // milliseconds between two looks

/** What /props says; null until it has answered. */
export let props = null;
/** Whether the model has no chat template: it goes on with a text. */
export const isBase = () => props !== null && props.chat_template === null;

let watching = null; // a promise while the server is not there
let onProps = () => {};

/** Find the server and keep its settings; `changed` is called when they are there, and when they have changed. */
export function start(changed) {
  onProps = changed;
  return watch();
}

/** Look until the server answers, and say meanwhile why it does not. */
export function watch() {
  watching ??= look().finally(() => (watching = null));
  return watching;
}

async function look() {
  for (;;) {
    try {
      props = await get("props");
      banner("");
      onProps();
      return;
    } catch (error) {
      if (error.status === 401) {
        if (!(await askKey())) {
          banner("The server asks for a key.", button("Enter the key", () => watch()));
          return;
        }
        continue;
      }
      banner(reason(error));
    }
    await new Promise((resolve) => setTimeout(resolve, PATIENCE));
  }
}

/** What to say of an error that may pass by itself. */
export function reason(error) {
  switch (error.code) {
    case "model_loading":
      return "The model is loading …";
    case "unreachable":
      return "The server cannot be reached; trying again …";
    case "queue_full":
      return "The server is busy; trying again …";
    default:
      return error.message;
  }
}

/** Ask for a key; returns whether one was given. */
export async function askKey() {
  const input = byId("key-input");
  byId("key-why").textContent = hasKey() ? "The server does not take this key." : "The server asks for a key.";
  input.value = "";
  if ((await ask(byId("key"))) !== "save" || !input.value.trim()) {
    return false;
  }
  useKey(input.value.trim());
  return true;
}

function banner(text, ...children) {
  const found = byId("banner");
  if (found.textContent !== text || children.length) {
    found.replaceChildren(text, ...children);
  }
}
