// A chat: its messages, and what can be done with each.

import { run, isRunning, save, waitsFor } from "./conversations.js";
import { button, byId, copy, element, focus, grow, hasKeyboard, notice, speak } from "./dom.js";
import { Growing, render } from "./markdown.js";
import { follow } from "./scroll.js";
import { requested } from "./settings.js";

const PATH = "v1/chat/completions";
const SHARE = 3; // rendering may take one part in four of the time

export class Chat {
  /** `onState`: called when an answer begins, waits or ends. */
  constructor(conversation, onState) {
    this.conversation = conversation;
    this.onState = onState;
    this.column = byId("messages");
    this.isShown = true;
    this.draw();
  }

  /** Another conversation takes its place; what is being written goes on. */
  leave() {
    this.isShown = false;
  }

  draw() {
    const { messages } = this.conversation;
    this.growing = null;
    this.column.replaceChildren(...messages.map((message) => this.article(message)));
    if (isRunning(this.conversation)) {
      this.grow(messages.at(-1));
    }
  }

  /** The messages of a request; those of answers that never came are left out. */
  history(messages = this.conversation.messages) {
    const { system } = this.conversation.settings;
    const told = messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
    return system ? [{ role: "system", content: system }, ...told] : told;
  }

  send(text) {
    this.conversation.messages.push({ role: "user", content: text });
    return this.answer();
  }

  /** Have the last message answered. */
  answer() {
    const message = { role: "assistant", content: "" };
    const asked = this.history();
    this.conversation.messages.push(message);
    return this.write(message, { messages: asked });
  }

  /** Have an answer that was cut go on. */
  goOn(message) {
    delete message.error;
    return this.write(message, { messages: this.history(), continue_final_message: true });
  }

  async write(message, body) {
    delete message.finish;
    const { conversation } = this;
    const before = message.n_tokens ?? 0;
    const changed = () => this.current?.showGrowth(message);
    const append = (text) => (message.content += text);
    try {
      const writing = run(conversation, PATH, { ...body, ...requested(conversation) }, append, changed);
      this.draw();
      follow(true);
      this.onState(conversation);
      const { finish, usage, timings } = await writing;
      message.finish = finish;
      message.n_tokens = usage && before + usage.completion_tokens;
      message.speed = timings?.predicted_per_second;
      this.onState(conversation, { usage, speed: message.speed });
    } catch (error) {
      message.error = error.message;
      this.onState(conversation);
    }
    await save(conversation);
    this.current?.end(message);
  }

  /** The view of this conversation that is on the page now, which need not be this one. */
  get current() {
    return Chat.shown?.conversation === this.conversation && Chat.shown.isShown ? Chat.shown : null;
  }

  article(message) {
    const isUser = message.role === "user";
    const body = element("div", { className: "body" });
    if (isUser) {
      body.textContent = message.content;
    } else {
      body.replaceChildren(render(message.content));
    }
    const name = element("h2", { className: "hidden", textContent: isUser ? "You" : "Model" });
    const found = element("article", { className: `message ${message.role}` }, name, body);
    found.append(...this.below(message));
    return found;
  }

  /** Errors, figures and buttons of a message. */
  below(message) {
    const found = [];
    if (message.error) {
      const again = button("Try again", () => this.again(message));
      found.push(element("p", { className: "error", role: "alert" }, message.error, again));
    } else if (message.role === "assistant" && !message.content) {
      found.push(element("p", { className: "note", textContent: "No answer." }));
    }
    const figures = [];
    if (message.finish === "length") {
      figures.push("cut at max tokens, or where the context is full");
    } else if (message.role === "assistant" && message.finish !== "stop" && !message.error) {
      figures.push("stopped");
    }
    if (message.n_tokens) {
      figures.push(`${message.n_tokens.toLocaleString("en")} tokens`);
    }
    if (message.speed) {
      figures.push(`${message.speed.toFixed(1)} tokens/s`);
    }
    const line = element("p", { className: "note", textContent: figures.join(" · ") });
    found.push(element("div", { className: "below" }, element("div", { className: "actions" }, ...this.actions(message)), line));
    return found;
  }

  actions(message) {
    const isLast = message === this.conversation.messages.at(-1);
    const found = [];
    if (message.content) {
      const pressed = button("Copy", () => copy(message.content, pressed));
      found.push(pressed, button("Edit", () => this.edit(message)));
    }
    if (message.role === "assistant") {
      found.push(button("Regenerate", () => this.again(message)));
    } else if (isLast) {
      found.push(button("Answer", () => this.free() && this.answer()));
    }
    if (isLast && message.role === "assistant" && message.content && message.finish !== "stop") {
      found.push(button("Continue", () => this.free() && this.goOn(message)));
    }
    found.push(button("Delete", () => this.cut(message, "Deleted.") && this.draw()));
    return found;
  }

  /** Whether nothing is being written; else say so. */
  free() {
    if (isRunning(this.conversation)) {
      notice("An answer is being written; stop it first.");
      return false;
    }
    return true;
  }

  /** Answer anew; what followed goes. */
  again(message) {
    return this.cut(message, "Answered anew.", message.content || message !== this.conversation.messages.at(-1)) && this.answer();
  }

  /** Take away a message and what follows it, and offer to put all back. */
  cut(message, said, isLoss = true) {
    if (!this.free()) {
      return false;
    }
    const { conversation } = this;
    const before = structuredClone(conversation.messages);
    conversation.messages.splice(conversation.messages.indexOf(message));
    save(conversation).then(() => this.onState(conversation));
    if (isLoss) {
      notice(said, "Undo", () => this.restore(before));
    }
    focus(byId("input"));
    return true;
  }

  restore(messages) {
    if (this.free()) {
      this.conversation.messages = messages;
      save(this.conversation).then(() => this.onState(this.conversation));
      this.current?.draw();
    }
  }

  /** Change a message where it stands. A question is asked anew then; an answer is only changed. */
  edit(message) {
    if (!this.free()) {
      return;
    }
    const { messages } = this.conversation;
    const isUser = message.role === "user";
    const area = element("textarea", { value: message.content, ariaLabel: isUser ? "Your message" : "The answer" });
    const done = () => {
      if (!area.value.trim() || !this.free()) {
        return;
      }
      if (isUser) {
        this.cut(message, "Asked anew.");
        this.send(area.value);
      } else {
        message.content = area.value;
        save(this.conversation).then(() => this.onState(this.conversation));
        this.draw();
      }
      focus(byId("input"));
    };
    const leave = () => {
      this.draw();
      focus(byId("input"));
    };
    area.oninput = () => grow(area);
    area.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (isUser && event.key === "Enter" && !event.shiftKey && !event.isComposing && hasKeyboard()) {
        event.preventDefault();
        done();
      }
    };
    const row = element("div", { className: "row end" }, button("Cancel", leave), button(isUser ? "Send" : "Save", done, { className: "primary" }));
    this.draw();
    const article = this.column.children[messages.indexOf(message)];
    article.classList.add("edited");
    article.replaceChildren(area, row);
    grow(area);
    area.focus();
  }

  editLast() {
    const last = this.conversation.messages.findLast(({ role }) => role === "user");
    if (last) {
      this.edit(last);
    }
  }

  /** Show an answer from now on as it grows. */
  grow(message) {
    const article = this.column.lastElementChild;
    const body = article.querySelector(".body");
    article.setAttribute("aria-busy", "true");
    article.querySelector(".below").remove();
    article.querySelector(".error, .body + .note")?.remove();
    this.waiting = element("p", { className: "note waiting" });
    article.append(this.waiting);
    this.growing = new Growing(body, speak);
    this.showGrowth(message);
  }

  showGrowth(message) {
    if (!this.growing || this.frame) {
      return;
    }
    const pause = Math.max(0, (this.notBefore ?? 0) - performance.now());
    this.frame = true;
    setTimeout(() => requestAnimationFrame(() => this.render(message)), pause);
  }

  render(message) {
    this.frame = false;
    if (!this.growing || !this.isShown) {
      return;
    }
    const began = performance.now();
    this.growing.update(message.content);
    this.waiting.textContent = message.content ? "" : waitsFor(this.conversation) || "…";
    follow();
    this.notBefore = performance.now() + SHARE * (performance.now() - began);
  }

  end(message) {
    const article = this.column.lastElementChild;
    this.growing?.end(message.content);
    this.growing = null;
    this.waiting?.remove();
    article?.removeAttribute("aria-busy");
    article?.append(...this.below(message));
    follow();
  }
}

/** Show a conversation. */
export function showChat(conversation, onState) {
  Chat.shown?.leave();
  Chat.shown = new Chat(conversation, onState);
  return Chat.shown;
}
