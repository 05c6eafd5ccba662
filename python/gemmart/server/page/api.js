// Requests to the server, and what can go wrong with them.

import { remember, remembered } from "./store.js";

export class ApiError extends Error {
  /** `status` 0: the server was not reached, or was lost on the way. */
  constructor(message, status = 0, code = "unreachable", retryAfter = 1) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

const UNREACHABLE = "The server cannot be reached.";

let key = remembered("key", "sessionStorage");

export const hasKey = () => key !== null;

export function useKey(given) {
  key = given;
  remember("key", key, "sessionStorage");
}

/** The answer to a GET, or to a POST where there is a body, as a Response. Raises ApiError, AbortError. */
async function send(path, body, signal) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(new URL(path, document.baseURI), { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) {
      throw error;
    }
    throw new ApiError(UNREACHABLE);
  }
  if (!response.ok) {
    throw await refusal(response);
  }
  return response;
}

async function refusal(response) {
  let told;
  try {
    told = (await response.json()).error;
  } catch {
    // A proxy's page, or nothing.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || 1;
  const message = sentence(told?.message ?? `The server answered ${response.status} ${response.statusText}`);
  return new ApiError(message, response.status, told?.code ?? "", retryAfter);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export async function get(path, signal) {
  return (await send(path, null, signal)).json();
}

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

/** The events of a stream, each parsed. Raises ApiError for one that is an error, or where the stream breaks off. */
export async function* stream(path, body, signal) {
  const response = await send(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        throw new ApiError("The connection was lost.");
      }
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events.filter((each) => each.startsWith("data: "))) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") {
          return;
        }
        const found = JSON.parse(data);
        if (found.error) {
          throw new ApiError(sentence(found.error.message), 200, found.error.code);
        }
        yield found;
      }
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ApiError) {
      throw error;
    }
    throw new ApiError("The connection was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
