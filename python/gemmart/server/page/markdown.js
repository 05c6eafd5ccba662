// Text of the model as HTML: Markdown, in which HTML stays text, and nothing is fetched or run.

import { Marked } from "./vendor/marked/marked.esm.js";
import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import { button, copy, element } from "./dom.js";

const INLINE = /^<\/?(br|sub|sup|kbd|b|i|u|s|mark)\s*\/?>$/i;
const ALLOWED = {
  ALLOWED_TAGS: [
    ..."h1 h2 h3 h4 h5 h6 p br hr blockquote ul ol li pre code table thead tbody tr th td".split(" "),
    ..."a strong em del b i u s mark sub sup kbd span".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (found) => `&#${found.charCodeAt(0)};`);

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    html({ text, block }) {
      if (INLINE.test(text)) {
        return text;
      }
      return block ? `<p>${escaped(text.trimEnd()).replace(/\n/g, "<br>")}</p>` : escaped(text);
    },
    // A link to it; only the reader may fetch it.
    image({ href, text }) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A" && node.hasAttribute("href")) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  const name = node.getAttribute?.("class");
  if (name && !/^(language-[\w+#.-]+|hljs-[\w -]+)$/.test(name)) {
    node.removeAttribute("class"); // the page's own are not for the model
  }
});

const clean = (html) => DOMPurify.sanitize(html, ALLOWED);

/** Markdown as a document fragment. */
export const render = (source) => fragment(marked.lexer(source));

function fragment(tokens) {
  const found = clean(marked.parser(tokens));
  for (const pre of found.querySelectorAll("pre")) {
    dressCode(pre);
  }
  for (const table of found.querySelectorAll("table")) {
    wrap(table, element("div", { className: "table", tabIndex: 0 }));
  }
  return found;
}

/** Put a box around what may be wider than the page, so that it scrolls by itself. It gets the focus, or no key moves it. */
function wrap(node, box) {
  node.replaceWith(box);
  box.append(node);
}

/** A heading with a button, and colours. */
function dressCode(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const pressed = button("Copy", () => copy(code.textContent.replace(/\n$/, ""), pressed), { title: "Copy the code" });
  pre.tabIndex = 0;
  wrap(pre, element("div", { className: "code" }, element("div", { className: "code-head" }, language || "code", pressed)));
  if (language) {
    colour(code, language);
  }
}

const COLOURED = 100_000; // characters; a longer text stays plain
let highlighter;

async function colour(code, language) {
  if (code.textContent.length > COLOURED) {
    return;
  }
  highlighter ??= import("./vendor/highlight.js/highlight.min.js").then((module) => module.default);
  const hljs = await highlighter;
  if (hljs.getLanguage(language)) {
    code.replaceChildren(clean(hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value));
  }
}

/** An answer as it grows. What is complete stays as it is; each update renders the last block only. */
export class Growing {
  #container;
  #open; // nodes of the last block
  #settled = 0; // characters before it
  #onBlock;

  /** `onBlock` gets the text of each block that is complete. */
  constructor(container, onBlock) {
    this.#container = container;
    this.#onBlock = onBlock;
    this.#open = element("div", { className: "open" });
    container.replaceChildren(this.#open);
  }

  update(source) {
    const tokens = marked.lexer(source.replaceAll("\r\n", "\n").slice(this.#settled)); // as it counts itself
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const complete = tokens.slice(0, Math.max(last, 0));
    if (complete.length) {
      const nodes = fragment(complete);
      this.#onBlock(nodes.textContent);
      this.#open.before(nodes);
      this.#settled += complete.reduce((sum, token) => sum + token.raw.length, 0);
    }
    this.#open.replaceChildren(fragment(tokens.slice(complete.length)));
  }

  /** The whole text, with what later blocks say of earlier ones. */
  end(source) {
    this.update(source);
    this.#onBlock(this.#open.textContent);
    this.#container.replaceChildren(render(source));
  }
}
