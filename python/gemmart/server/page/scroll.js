// The page follows an answer as long as the reader is at its end.

import { byId } from "./dom.js";

const NEAR = 60; // pixels from the end that still count as the end
let atEnd = true;

/** Stay at the end; `force`: go there, wherever the reader is. */
export function follow(force = false) {
  const main = byId("main");
  atEnd ||= force;
  if (atEnd) {
    main.scrollTop = main.scrollHeight;
  }
}

export function start() {
  const main = byId("main");
  const look = () => {
    atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < NEAR;
    byId("to-end").hidden = atEnd;
  };
  main.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(() => follow()).observe(main); // the box below has grown, or a keyboard has opened
  byId("to-end").onclick = () => follow(true);
}
