// The server's API: models, and answers as streams of events. Failures carry a sentence for the reader.

export class Failure extends Error {
  /**
   * @param {string} sentence what went wrong, for the reader
   * @param {number} status HTTP status; 0 if the server does not answer
   */
  constructor(sentence, status = 500) {
    super(sentence);
    this.status = status;
  }

  /** Whether every further request would fail in the same way. */
  get concernsAll() {
    return [0, 401, 421, 503].includes(this.status);
  }
}

/** Return the models of the server, as GET /v1/models describes them. */
export async function listModels(key) {
  const response = await send("v1/models", {}, key);
  return (await response.json()).data;
}

/** Ask one question about one image (a data URL), and yield the events of the answer. */
export async function* ask(model, image, question, key, signal) {
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: question }];
  const messages = [{ role: "user", content }];
  const body = JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true }, promprune: { views: true } });
  const headers = { "content-type": "application/json" };
  const response = await send("v1/chat/completions", { method: "POST", body, headers, signal }, key);
  for await (const data of serverSentEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Failure(sentence(event.error.message));
    yield event;
  }
  throw new Failure("The connection broke before the answer was complete.");
}

async function send(address, options, key) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw await connectionFailure(options.body?.length ?? 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** A server that refuses a large body early closes the connection, which the browser reports like a missing server. */
async function connectionFailure(bytes) {
  const isUp = await fetch("healthz").then((response) => response.ok, () => false);
  if (!isUp) return new Failure("The server does not answer. Check that promprune-serve is running, then try again.", 0);
  return new Failure(`The server closed the connection. The image may be too large for it: ${megabytes(bytes)} were sent.`, 413);
}

async function refusal(response) {
  const error = await response.json().then((body) => body.error ?? {}, () => ({}));
  return new Failure(explain(response, error), response.status);
}

function explain(response, error) {
  const seconds = Number(response.headers.get("retry-after"));
  switch (response.status) {
    case 413:
      return "The image is too large for this server. Choose a smaller one.";
    case 429:
      return `The server is busy. Try again in ${seconds === 1 || !seconds ? "1 second" : `${seconds} seconds`}.`;
    case 503:
      return "The server is shutting down and takes no new questions.";
    case 504:
      return "The answer took longer than this server allows.";
    default:
      return sentence(error.message ?? `The server answered with status ${response.status}.`);
  }
}

/** Yield the data of each event of a stream. */
async function* serverSentEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        signal.throwIfAborted();
        yield event.replace(/^data: /, "");
      }
    }
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Failure("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
