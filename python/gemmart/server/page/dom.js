// Small help with the document.

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const found = Object.assign(document.createElement(name), properties);
  found.append(...children);
  return found;
}

export function button(text, onclick, properties = {}) {
  return element("button", { type: "button", textContent: text, onclick, ...properties });
}

/** Copy a text, and say on the button that pressed for it whether that worked. */
export async function copy(text, pressed) {
  const before = pressed.textContent;
  const done = await toClipboard(text);
  pressed.textContent = done ? "Copied" : "Not allowed";
  speak(pressed.textContent);
  setTimeout(() => (pressed.textContent = before), 1500);
}

async function toClipboard(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Over plain HTTP from another machine there is no clipboard object, but still the old command.
  const area = element("textarea", { value: text, className: "hidden" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** A text box as high as its text. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Open a dialog; resolves with the value of the button that closed it, "" where it was left. */
export function ask(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    for (const each of dialog.querySelectorAll("[data-close]")) {
      each.onclick = () => dialog.close();
    }
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}

let timer;

/** Say something for a while, with a button to do something about it; what has gone wrong stays until it is closed. */
export function notice(text, label, act, stays = false) {
  const bar = byId("notice");
  clearTimeout(timer);
  const hide = () => bar.replaceChildren();
  bar.replaceChildren(text);
  if (label) {
    bar.append(button(label, () => (hide(), act())));
  }
  bar.append(button("×", hide, { className: "icon", ariaLabel: "Close" }));
  if (!stays) {
    timer = setTimeout(hide, label ? 15000 : 6000);
  }
}

/** Read a text out for those who listen to the page. */
export function speak(text) {
  if (text.trim()) {
    const said = element("p", { textContent: text });
    byId("spoken").append(said);
    setTimeout(() => said.remove(), 20000); // read by then or queued; it must not be found twice on the page
  }
}

export const hasKeyboard = () => !matchMedia("(pointer: coarse)").matches;

/** Give the focus to what is written in, but on a touch device, which would show its keyboard. */
export function focus(area) {
  if (hasKeyboard()) {
    area.focus({ preventScroll: true });
  }
}
