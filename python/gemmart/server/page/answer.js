// One answer: asked for again while the server is busy or loading, stopped by a signal.

import { ApiError, stream } from "./api.js";
import { askKey, reason, watch } from "./server.js";

const WAITING = ["model_loading", "queue_full", "too_many_connections"]; // they pass; nothing has been computed yet

/**
 * Stream an answer. `onText` gets each piece, `onWait` why nothing comes yet ("" when it comes).
 * Resolves with { finish, usage, timings }; what is not known of a stopped answer is missing. Raises ApiError.
 */
export async function answer(path, body, { signal, onText, onWait }) {
  const found = { finish: "stopped" };
  try {
    for (;;) {
      try {
        await once(path, body, found, { signal, onText, onWait });
        return found;
      } catch (error) {
        if (error.status === 401 && (await askKey())) {
          continue;
        }
        if (!WAITING.includes(error.code)) {
          throw error;
        }
        onWait(reason(error));
        await sleep(1000 * error.retryAfter, signal);
      }
    }
  } catch (error) {
    if (signal.aborted) {
      return found;
    }
    if (error.code === "unreachable") {
      watch();
    }
    throw error instanceof ApiError ? error : new ApiError(String(error));
  }
}

async function once(path, body, found, { signal, onText, onWait }) {
  for await (const event of stream(path, body, signal)) {
    onWait("");
    const choice = event.choices[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) {
      onText(text);
    }
    found.finish = choice?.finish_reason ?? found.finish;
    found.usage = event.usage ?? found.usage;
    found.timings = event.timings ?? found.timings;
  }
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
