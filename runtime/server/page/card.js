// One model's answer: the image with its kept tokens, the text as it streams, and the figures.

import { drawView, keptFor, swatch } from "./view.js";

export class Card {
  constructor() {
    this.root = document.getElementById("card").content.cloneNode(true).firstElementChild;
    this.svg = this.root.querySelector("svg");
    this.answer = this.root.querySelector(".answer");
    this.caption = this.root.querySelector(".caption");
    this.facts = this.root.querySelector(".facts");
    this.root.querySelector(".quiet").addEventListener("click", () => this.enlarge());
    this.setModel(null);
  }

  /** Name the model that answers; hide the card if there is none. */
  setModel(model) {
    this.model = model?.id ?? "";
    this.root.querySelector("h2").textContent = model?.id ?? "Model";
    this.root.querySelector(".kept").textContent = model ? keeps(model.promprune) : "";
    this.reset();
  }

  /** Forget the last answer. */
  reset() {
    this.image = this.timings = null;
    this.text = "";
    this.root.dataset.state = "empty";
    this.answer.removeAttribute("aria-busy");
    this.svg.setAttribute("hidden", "");
    this.svg.replaceChildren();
    this.caption.hidden = this.facts.hidden = true;
    this.answer.textContent = "";
    this.setNote("");
    this.setError("");
  }

  /** Say that another answer comes first. */
  wait() {
    this.reset();
    this.setNote("Waits for the other answer, so that neither slows the other down.");
  }

  begin() {
    this.reset();
    this.root.dataset.state = "running";
    this.answer.setAttribute("aria-busy", "true");
  }

  /** Show one event of the answer. */
  show(event) {
    const { images, timings } = event.promprune ?? {};
    const { delta, finish_reason: reason } = event.choices[0] ?? {};
    if (images) this.showImage(images[0]);
    this.text += delta?.content ?? "";
    this.answer.textContent = this.text;
    if (timings) this.showTimings(timings);
    if (event.usage) this.showUsage(event.usage);
    if (reason === "length") this.setNote("The answer reached the limit on its length.");
  }

  /** End the answer, with a note if that is not the answer's own end; nothing if it was forgotten before. */
  end(note = "") {
    if (this.root.dataset.state !== "running") return;
    this.answer.removeAttribute("aria-busy");
    this.root.dataset.state = "done";
    if (note) this.setNote(note);
    else if (!this.text && this.timings) this.setNote("The answer is empty.");
  }

  showImage(image) {
    this.image = image;
    drawView(this.svg, image);
    this.svg.removeAttribute("hidden");
    const entries = keptFor(image).map(({ reason, label, tokens }) => {
      const entry = document.createElement("span");
      entry.append(swatch(reason), `${tokens.length} ${label}`);
      return entry;
    });
    this.root.querySelector(".legend").replaceChildren(...(entries.length ? entries : [`All ${image.visual_tokens} tokens are kept`]));
    this.caption.hidden = this.facts.hidden = false;
    const { visual_tokens: all, kept_tokens: kept, spectral_entropy: entropy } = image;
    this.setFact("tokens", kept === all ? `${all}` : `${all} \u2192 ${kept}`);
    this.setFact("entropy", entropy === null ? "\u2013" : entropy.toFixed(3));
    for (const name of ["prompt", "first", "speed", "answer"]) this.setFact(name, "\u2013");
    this.setFact("parts", "");
  }

  enlarge() {
    const dialog = document.getElementById("enlarged");
    dialog.firstElementChild.replaceChildren(this.svg.cloneNode(true));
    dialog.showModal();
  }

  showTimings(timings) {
    this.timings = timings;
    const { first_token_ms: first, decode_tokens_per_second: speed } = timings;
    this.setFact("first", ...duration(first));
    this.setFact("speed", ...(speed === null ? ["\u2013"] : [number(speed), "tokens/s"]));
  }

  showUsage({ prompt_tokens: prompt, completion_tokens: answer }) {
    this.setFact("prompt", `${prompt}`, "tokens");
    this.setFact("answer", `${answer}`, answer === 1 ? "token" : "tokens");
  }

  /** Draw the parts of the time to first token, on a scale that cards share. */
  drawTimings(scale_ms) {
    if (!this.timings) return;
    const { first_token_ms: first, vision_ms: vision, prefill_ms: prefill } = this.timings;
    const parts = { vision, prefill, other: Math.max(0, first - vision - prefill) };
    const bar = document.createElement("span");
    bar.className = "bar";
    const labels = document.createElement("span");
    labels.className = "bar-labels";
    for (const [name, time_ms] of Object.entries(parts)) {
      const segment = document.createElement("i");
      segment.className = name;
      segment.style.inlineSize = `${(100 * time_ms) / scale_ms}%`;
      bar.append(segment);
      const label = document.createElement("span");
      label.className = name;
      label.textContent = `${name} ${duration(time_ms).join(" ")}`;
      labels.append(label);
    }
    this.root.querySelector("[data-fact=parts]").replaceChildren(bar, labels);
  }

  setFact(name, value, unit = "") {
    const small = document.createElement("small");
    small.textContent = unit;
    this.root.querySelector(`[data-fact=${name}]`).replaceChildren(...(unit ? [value, " ", small] : [value]));
  }

  setNote(text) {
    const note = this.root.querySelector(".note");
    note.textContent = text;
    note.hidden = !text;
  }

  setError(text) {
    this.root.querySelector(".error").textContent = text;
  }
}

function keeps({ kept_tokens: kept, visual_tokens: all }) {
  return kept === all ? `keeps all ${all} tokens` : `keeps ${kept} of ${all} tokens`;
}

/** Return a time as a number and its unit. */
export function duration(time_ms) {
  return time_ms < 1000 ? [number(time_ms), "ms"] : [(time_ms / 1000).toFixed(1), "s"];
}

function number(value) {
  return value < 10 ? value.toFixed(1) : value.toFixed(0);
}
