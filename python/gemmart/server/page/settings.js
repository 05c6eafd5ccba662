// The settings of a conversation: a dialog for them, and the fields of requests that they become.

import { ask, byId, element } from "./dom.js";
import { props } from "./server.js";
import { remember } from "./store.js";

const number = (min, max, step = "any") => ({ type: "number", min, max, step });
const WHOLE = Number.MAX_SAFE_INTEGER;

/** Name in the request, label, its box, what it does. `kind`: of conversations that have it; null: all. */
const FIELDS = [
  { name: "system", label: "System prompt", kind: "chat", help: "What the model is told before the conversation." },
  { name: "temperature", label: "Temperature", box: number(0, 2), help: "0 always takes the likeliest token." },
  { name: "top_k", label: "Top-k", box: number(0, 2 ** 31 - 1, 1), help: "Chooses among the k likeliest; 0: all." },
  { name: "top_p", label: "Top-p", box: number(0, 1), help: "Chooses among the likeliest that add up to p." },
  { name: "min_p", label: "Min-p", box: number(0, 1), help: "Leaves out what is less likely than p times the likeliest." },
  { name: "repeat_penalty", label: "Repeat penalty", box: number(0.1, 10), help: "Makes recent tokens less likely; 1: off." },
  { name: "seed", label: "Seed", box: number(0, WHOLE, 1), help: "The same seed, the same text. Empty: a random one." },
  { name: "max_tokens", label: "Max tokens", box: number(1, WHOLE, 1), help: "Of an answer. Empty: until it ends." },
  { name: "stop", label: "Stop", help: "One text a line, up to 16; \\n stands for a new line." },
  { name: "parse_special", label: "Control tokens in the text count", kind: "text", box: { type: "checkbox" }, help: "As <start_of_turn>, for a template written by hand." },
];

const fieldsOf = (kind) => FIELDS.filter((field) => (field.kind ?? kind) === kind);

/** What the settings of a conversation add to a request. */
export function requested({ kind, settings }) {
  const found = {};
  for (const { name } of fieldsOf(kind)) {
    const value = settings[name];
    if (name === "stop" && value) {
      const texts = value.split("\n").filter((line) => line);
      found.stop = texts.map((line) => line.replaceAll("\\n", "\n"));
    } else if (name !== "system" && value !== undefined && value !== "") {
      found[name] = value;
    }
  }
  return found;
}

/** Let the user change them; returns whether they did. */
export async function edit(conversation) {
  const fields = fieldsOf(conversation.kind);
  const boxes = fields.map((field) => boxOf(field, conversation.settings[field.name]));
  byId("fields").replaceChildren(...fields.map((field, i) => row(field, boxes[i])));
  byId("settings-reset").onclick = () => {
    for (const box of boxes) {
      box.value = "";
      box.checked = false;
    }
  };
  if ((await ask(byId("settings"))) !== "save") {
    return false;
  }
  const changed = { ...conversation.settings };
  fields.forEach(({ name, box }, i) => {
    const { type, value, checked, valueAsNumber } = boxes[i];
    const found = type === "checkbox" ? checked || "" : box && value ? valueAsNumber : value;
    delete changed[name];
    if (found !== "") {
      changed[name] = found;
    }
  });
  conversation.settings = changed;
  remember("settings", changed);
  return true;
}

function boxOf({ name, box }, value) {
  const id = `setting-${name}`;
  const found = box ? element("input", { ...box, id }) : element("textarea", { id, rows: name === "system" ? 4 : 2 });
  found.setAttribute("aria-describedby", `${id}-help`);
  if (box?.type === "checkbox") {
    found.checked = Boolean(value);
  } else {
    found.value = value ?? "";
  }
  const usual = props?.default_generation_settings.params[name];
  if (usual !== undefined) {
    found.placeholder = `${usual}`;
  }
  return found;
}

function row({ label, help }, box) {
  const name = element("label", { htmlFor: box.id, textContent: label });
  const about = element("p", { className: "note", id: `${box.id}-help`, textContent: help });
  return element("div", { className: box.type === "number" ? "field" : "field wide" }, name, box, about);
}
