// The page: what is shown, the box below it, keys.

import { post } from "./api.js";
import { showChat } from "./chat.js";
import * as conversations from "./conversations.js";
import { ask, byId, focus, grow, hasKeyboard } from "./dom.js";
import * as scroll from "./scroll.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import { onChanged, remember, remembered } from "./store.js";
import { showText } from "./text.js";

let shown = null; // the conversation
let view = null; // of it
const isText = () => shown.kind === "text";

function show(conversation) {
  shown = conversation;
  byId("messages").hidden = byId("input").hidden = isText();
  byId("text-view").hidden = !isText();
  byId("title").textContent = conversation.title || (isText() ? "New text" : "New chat");
  byId("speed").textContent = "";
  byId("gauge").hidden = true;
  view = (isText() ? showText : showChat)(conversation, onState);
  remember("shown", conversation.id, "sessionStorage");
  onState(conversation);
  scroll.follow(true);
  sidebar.closeDrawer();
  focus(byId(isText() ? "text" : "input"));
}

/** An answer begins or ends, or the conversation has changed; `figures` of one that has ended. */
function onState(conversation, figures) {
  sidebar.draw(show, () => shown);
  if (conversation !== shown) {
    return;
  }
  const isRunning = conversations.isRunning(conversation);
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("title").textContent = conversation.title || byId("title").textContent;
  byId("empty").hidden = isText() || conversation.messages.length > 0;
  byId("send").textContent = isText() ? "Go on" : "Send";
  byId("send").hidden = isRunning;
  byId("send").disabled = !isText() && server.isBase();
  byId("stop").hidden = !isRunning;
  byId("take-back").hidden = !view.canTakeBack;
  if (hadFocus) {
    byId(isRunning ? "stop" : "send").focus();
  }
  byId("input").placeholder = server.isBase() ? "A base model has no chats: begin a new text" : "Message";
  if (figures?.speed) {
    byId("speed").textContent = `${figures.speed.toFixed(1)} tokens/s`;
  }
  if (figures?.usage) {
    gauge(figures.usage.total_tokens);
  } else if (!isRunning) {
    count(conversation);
  }
}

/** Ask the server how much of its context the conversation takes. */
async function count(conversation) {
  if (!server.props) {
    return;
  }
  let n_tokens = null;
  try {
    if (isText()) {
      const special = Boolean(conversation.settings.parse_special);
      n_tokens = (await post("tokenize", { content: conversation.text, add_special: true, parse_special: special })).tokens.length;
    } else if (view.history().length && !server.isBase()) {
      n_tokens = (await post("apply-template", { messages: view.history(), add_generation_prompt: false })).tokens.length;
    }
  } catch {
    // The answer will tell what is wrong.
  }
  if (conversation === shown && !conversations.isRunning(conversation)) {
    gauge(n_tokens);
  }
}

function gauge(n_tokens) {
  byId("gauge").hidden = n_tokens === null || !server.props;
  if (byId("gauge").hidden) {
    return;
  }
  const { n_ctx } = server.props.default_generation_settings;
  byId("gauge-bar").max = n_ctx;
  byId("gauge-bar").value = Math.min(n_tokens, n_ctx);
  byId("gauge").classList.toggle("full", n_tokens > 0.9 * n_ctx);
  byId("gauge-text").textContent = `${n_tokens.toLocaleString("en")} of ${n_ctx.toLocaleString("en")} tokens`;
}

async function submit() {
  if (conversations.isRunning(shown) || byId("send").disabled) {
    return;
  }
  if (isText()) {
    await view.goOn();
    return;
  }
  const input = byId("input");
  const text = input.value.trim();
  if (text) {
    input.value = "";
    grow(input);
    await view.send(text);
  }
}

function stop() {
  conversations.stop(shown);
}

const create = (kind) => show(conversations.create(kind));

async function openSettings() {
  if (await settings.edit(shown)) {
    if (conversations.all.includes(shown)) {
      await conversations.save(shown);
    }
    onState(shown);
  }
}

function onKey(event) {
  const command = event.ctrlKey || event.metaKey;
  const act = {
    O: event.shiftKey && (() => create(server.isBase() ? "text" : "chat")),
    B: !event.shiftKey && (() => sidebar.toggle()),
    ",": openSettings,
    "/": () => ask(byId("help")),
    ENTER: submit,
  }[event.key.toUpperCase()];
  if (document.querySelector("dialog[open]")) {
    return;
  }
  if (command && act) {
    event.preventDefault();
    act();
  } else if (event.key === "Escape") {
    stop();
  }
}

function onInputKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing && hasKeyboard()) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !event.target.value && !conversations.isRunning(shown)) {
    event.preventDefault();
    view.editLast();
  }
}

function connect() {
  byId("new-chat").onclick = () => create("chat");
  byId("new-text").onclick = () => create("text");
  byId("settings-open").onclick = openSettings;
  byId("help-open").onclick = () => ask(byId("help"));
  byId("stop").onclick = stop;
  byId("take-back").onclick = () => view.takeBack();
  byId("input").onkeydown = onInputKey;
  byId("input").oninput = () => grow(byId("input"));
  byId("composer").onsubmit = (event) => {
    event.preventDefault();
    submit();
  };
  document.addEventListener("keydown", onKey);
  byId("theme").value = remembered("theme") ?? "";
  byId("theme").onchange = ({ target }) => {
    document.documentElement.dataset.theme = target.value;
    remember("theme", target.value);
  };
  addEventListener("pagehide", () => view.flush?.());
  onChanged(async (id) => {
    await conversations.load();
    const found = conversations.all.find((each) => each.id === shown.id);
    if (id === shown.id && found && found !== shown && !conversations.isRunning(shown)) {
      show(found);
    } else {
      sidebar.draw(show, () => shown);
    }
  });
}

function onProps() {
  byId("model").textContent = server.props.model;
  document.title = `${server.props.model} – gemmart`;
  byId("new-chat").disabled = server.isBase();
  const isEmpty = !shown.messages.length && !shown.text;
  if (isEmpty && server.isBase() && !isText()) {
    create("text");
  } else {
    onState(shown);
  }
}

connect();
scroll.start();
sidebar.start(show, () => shown);
await conversations.load();
const last = remembered("shown", "sessionStorage");
show(conversations.all.find(({ id }) => id === last) ?? conversations.create("chat"));
server.start(onProps);
