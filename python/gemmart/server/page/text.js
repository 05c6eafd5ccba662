// A text that the model goes on with, as it stands: no template, no messages.

import { run, isRunning, save, waitsFor } from "./conversations.js";
import { byId, notice, speak } from "./dom.js";
import { requested } from "./settings.js";

const PATH = "v1/completions";
const KEEP_AFTER = 500; // milliseconds without typing

export class Text {
  /** `onState`: called when the model begins, waits or ends, and when the text has changed. */
  constructor(conversation, onState) {
    this.conversation = conversation;
    this.onState = onState;
    this.isShown = true;
    this.begins = []; // of what the model has written, while it stands at the end
    this.area = byId("text");
    this.area.value = conversation.text;
    this.area.readOnly = isRunning(conversation);
    this.area.oninput = () => this.typed();
  }

  leave() {
    this.isShown = false;
    this.flush();
  }

  typed() {
    this.conversation.text = this.area.value;
    this.begins = [];
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.flush(), KEEP_AFTER);
  }

  flush() {
    if (this.timer) {
      clearTimeout(this.timer);
      this.timer = null;
      save(this.conversation).then(() => this.onState(this.conversation));
    }
  }

  async goOn() {
    const { conversation } = this;
    const begin = conversation.text.length;
    const body = { prompt: conversation.text, ...requested(conversation) };
    const append = (text) => (conversation.text += text);
    let figures;
    try {
      const writing = run(conversation, PATH, body, append, () => this.current?.showGrowth());
      if (this.current) {
        this.current.area.readOnly = true;
      }
      this.onState(conversation);
      const { finish, usage, timings } = await writing;
      figures = { usage, speed: timings?.predicted_per_second };
      if (finish === "length") {
        notice("Cut at max tokens, or where the context is full.");
      }
    } catch (error) {
      notice(error.message, "Try again", () => this.goOn(), true);
    }
    await save(conversation);
    const view = this.current;
    if (view) {
      view.render();
      view.area.readOnly = false;
      view.begins.push(begin);
      speak(conversation.text.slice(begin));
    }
    this.onState(conversation, figures);
  }

  /** The view of this text that is on the page now. */
  get current() {
    return Text.shown?.conversation === this.conversation && Text.shown.isShown ? Text.shown : null;
  }

  get canTakeBack() {
    return this.begins.length > 0 && !isRunning(this.conversation);
  }

  /** Remove what the model has written last. */
  async takeBack() {
    this.conversation.text = this.conversation.text.slice(0, this.begins.pop());
    this.area.value = this.conversation.text;
    await save(this.conversation);
    this.onState(this.conversation);
  }

  showGrowth() {
    if (!this.frame) {
      this.frame = requestAnimationFrame(() => this.render());
    }
  }

  render() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    const { area } = this;
    const wasAtEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 60;
    const { length } = area.value;
    area.setRangeText(this.conversation.text.slice(length), length, length, "preserve");
    area.placeholder = waitsFor(this.conversation);
    if (wasAtEnd) {
      area.scrollTop = area.scrollHeight;
    }
  }
}

/** Show a text. */
export function showText(conversation, onState) {
  Text.shown?.leave();
  Text.shown = new Text(conversation, onState);
  return Text.shown;
}
