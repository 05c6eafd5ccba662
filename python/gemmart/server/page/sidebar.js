// The list of conversations, which on a narrow page is a drawer.

import * as conversations from "./conversations.js";
import { ask, button, byId, element, notice } from "./dom.js";

const narrow = matchMedia("(max-width: 52rem)");

/** `show` gets the conversation that is chosen; `shown` says which one is on the page. */
export function start(show, shown) {
  byId("menu").onclick = () => toggle();
  byId("shade").onclick = byId("sidebar-close").onclick = leave;
  narrow.addEventListener("change", () => toggle(!narrow.matches));
  toggle(!narrow.matches);
  byId("sidebar").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && narrow.matches) {
      event.stopPropagation();
      leave();
    }
  });
  byId("export").onclick = download;
  byId("import").onclick = () => byId("import-file").click();
  byId("import-file").onchange = async ({ target }) => {
    try {
      const n = await conversations.imported(await target.files[0].text());
      notice(`${n} new conversation${n === 1 ? "" : "s"}.`);
    } catch (error) {
      notice(`Nothing was taken in: ${error.message}.`);
    }
    target.value = "";
    draw(show, shown);
  };
}

export function toggle(open = byId("sidebar").inert) {
  byId("sidebar").inert = !open;
  byId("menu").ariaExpanded = String(open);
  const covers = open && narrow.matches;
  byId("shade").hidden = !covers;
  byId("page").inert = covers;
  if (covers) {
    byId("sidebar-close").focus();
  }
}

function leave() {
  toggle(false);
  byId("menu").focus();
}

/** A conversation has been chosen: make room for it. */
export function closeDrawer() {
  if (narrow.matches) {
    toggle(false);
  }
}

export function draw(show, shown) {
  const rows = conversations.all.map((each) => {
    const title = each.title || "Without a name";
    const isShown = each.id === shown().id;
    const open = button(conversations.isRunning(each) ? `${title} …` : title, () => show(each), { className: "grow title", title });
    if (isShown) {
      open.ariaCurrent = "true";
    }
    const rename = button("✎", () => renamed(each, show, shown), { className: "icon", ariaLabel: `Rename ${title}`, title: "Rename" });
    const remove = button("×", () => removed(each, show, shown), { className: "icon", ariaLabel: `Delete ${title}`, title: "Delete" });
    for (const [what, found] of Object.entries({ open, rename, remove })) {
      found.dataset.is = `${what} ${each.id}`;
    }
    return element("li", {}, open, rename, remove);
  });
  const focused = document.activeElement?.dataset.is;
  byId("conversations").replaceChildren(...rows);
  if (focused) {
    byId("conversations").querySelector(`[data-is="${focused}"]`)?.focus();
  }
}

async function renamed(conversation, show, shown) {
  const input = byId("rename-input");
  input.value = conversation.title;
  const asked = ask(byId("rename"));
  input.select();
  if ((await asked) === "save" && input.value.trim()) {
    conversation.title = input.value.trim();
    await conversations.save(conversation);
    if (conversation === shown()) {
      byId("title").textContent = conversation.title;
    }
    draw(show, shown);
  }
}

async function removed(conversation, show, shown) {
  const wasShown = conversation === shown();
  await conversations.remove(conversation);
  if (wasShown) {
    show(conversations.create(conversation.kind));
  } else {
    draw(show, shown);
  }
  byId("new-chat").focus();
  notice("Conversation deleted.", "Undo", async () => {
    await conversations.restore(conversation);
    show(conversation);
  });
}

function download() {
  const file = new Blob([conversations.exported()], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(file), download: "gemmart-conversations.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
