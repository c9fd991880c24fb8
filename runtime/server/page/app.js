// The page: choosing an image and models, asking, and showing the answers one after the other.

import { Failure, ask, listModels } from "./api.js";
import { Card, duration } from "./card.js";

const find = (id) => document.getElementById(id);
const [form, keyForm, question, preview, samples] = ["ask-form", "key-form", "question", "preview", "samples"].map(find);
const selects = ["model", "other"].map(find);
const cards = [new Card(), new Card()];
const state = { models: [], image: "", key: "", running: null };

/** Ask the chosen models, one after the other, so that neither slows the other down. */
async function askAll() {
  if (state.running || !(await isReady())) return;
  const running = (state.running = new AbortController());
  const asked = cards.filter((card) => card.model);
  showRunning(true);
  asked.forEach((card) => card.wait());
  scrollToAnswers();
  try {
    for (const card of asked) await answer(card, running.signal);
    compare(asked);
  } catch (error) {
    asked.forEach((card) => card.root.dataset.state === "empty" && card.reset());
    if (error.name !== "AbortError") say(error);
  } finally {
    state.running = null;
    showRunning(false);
  }
}

/** Show one answer as it streams; raises what concerns the other answers too. */
async function answer(card, signal) {
  card.begin();
  try {
    for await (const event of ask(card.model, state.image, question.value.trim(), state.key, signal)) card.show(event);
    card.end();
  } catch (error) {
    const isStopped = error.name === "AbortError";
    card.end(isStopped ? "Stopped." : "");
    if (isStopped || error.concernsAll) throw error;
    card.setError(textOf(error));
  } finally {
    drawTimings();
  }
}

async function isReady() {
  say("");
  if (!state.models.length && !(await loadModels())) return false;
  if (!state.image) return say("Choose an image first: drop or paste one, or take a sample.") ?? false;
  if (!question.value.trim()) {
    question.focus();
    return say("Type a question first.") ?? false;
  }
  return true;
}

function showRunning(isRunning) {
  find("ask").setAttribute("aria-disabled", String(isRunning));
  if (!isRunning && document.activeElement === find("stop")) find("ask").focus();
  find("stop").hidden = !isRunning;
  if (isRunning) find("comparison").textContent = "";
}

/** Tell what went wrong; nothing for an empty text. */
function say(error) {
  if (error.status === 401) return askForKey();
  find("alert").textContent = error && textOf(error);
  find("alert").scrollIntoView({ block: "nearest" });
}

function textOf(error) {
  if (typeof error === "string" || error instanceof Failure) return error.message ?? error;
  console.error(error);
  return "The page failed. Reload it, and try again.";
}

// ---------------------------------------------------------------------------------------------------- comparing

function drawTimings() {
  const longest_ms = Math.max(...cards.map((card) => card.timings?.first_token_ms ?? 0));
  cards.forEach((card) => card.drawTimings(longest_ms));
}

function compare(asked) {
  const [fewer, more] = asked.filter((card) => card.timings).sort((a, b) => a.image.kept_tokens - b.image.kept_tokens);
  if (!more || fewer.image.kept_tokens === more.image.kept_tokens) return;
  const [soon, late] = [fewer, more].map((card) => duration(card.timings.first_token_ms).join(" "));
  const same = fewer.text.trim() === more.text.trim() ? "the answers are the same" : "the answers differ";
  find("comparison").textContent =
    `With ${fewer.image.kept_tokens} instead of ${more.image.kept_tokens} visual tokens, the first token came after ` +
    `${soon} instead of ${late}, and ${same}.`;
}

// ---------------------------------------------------------------------------------------------------- models

/** Load the models, offer them, and return whether there are any. */
async function loadModels() {
  try {
    state.models = await listModels(state.key);
  } catch (error) {
    say(error);
    return false;
  }
  keyForm.hidden = true;
  offer(selects[0], state.models, preferred(ratiosOf(state.models[0].id), 0.12).id);
  offerComparison();
  return true;
}

/** Offer the other ratios of the chosen model: by default the one that was chosen before, or else the highest. */
function offerComparison() {
  const others = ratiosOf(selects[0].value).filter(({ id }) => id !== selects[0].value);
  const before = others.find(({ id }) => id === selects[1].value);
  offer(selects[1], others, (before ?? others.at(-1))?.id ?? "");
  selects[1].append(new Option("No comparison", ""));
  find("other-field").hidden = !others.length;
  showChoice();
}

function offer(select, models, chosen) {
  select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
}

/** Name the cards after the chosen models; a card whose model is another one than before forgets its answer. */
function showChoice() {
  const chosen = selects.map((select) => state.models.find(({ id }) => id === select.value));
  const changed = cards.map((card, i) => card.model !== (chosen[i]?.id ?? ""));
  if (changed.includes(true)) state.running?.abort();
  cards.forEach((card, i) => changed[i] && card.setModel(chosen[i]));
  find("cards").dataset.count = cards.filter((card) => card.model).length;
  find("comparison").textContent = "";
}

/** Return the models that differ from one only in their ratio, the lowest first. */
function ratiosOf(id) {
  const name = id.slice(0, id.lastIndexOf("@"));
  const same = state.models.filter((model) => model.id.slice(0, model.id.lastIndexOf("@")) === name);
  return same.sort((a, b) => a.promprune.ratio - b.promprune.ratio);
}

function preferred(models, ratio) {
  return models.find((model) => model.promprune.ratio === ratio) ?? models[0];
}

function askForKey() {
  find("key-alert").textContent = state.key && "The server does not accept this key.";
  keyForm.hidden = false;
  find("key").focus();
}

// ---------------------------------------------------------------------------------------------------- the image

/** Take an image, as a file or a blob. */
async function takeImage(blob, sample = null) {
  say("");
  if (!blob.type.startsWith("image/")) return say("This is not an image. Choose a PNG, JPEG, WebP or similar file.");
  state.image = await dataUrl(blob);
  preview.src = state.image;
  preview.hidden = false;
  preview.alt = sample ? sample.querySelector("img").alt : `Chosen image: ${blob.name ?? "pasted"}`;
  find("drop-hint").textContent = sample ? "" : (blob.name ?? "Pasted image");
  for (const button of samples.children) button.setAttribute("aria-pressed", String(button === sample));
  suggest(sample ? JSON.parse(sample.dataset.questions) : []);
  state.running?.abort();
  cards.forEach((card) => card.reset());
  find("comparison").textContent = "";
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Failure("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

async function takeSample(button) {
  try {
    const response = await fetch(button.querySelector("img").src);
    await takeImage(await response.blob(), button);
  } catch {
    say("The server does not answer. Check that promprune-serve is running, then try again.");
  }
}

/** Offer questions, and type the first one unless the reader typed another. */
function suggest(questions) {
  const offered = [...find("suggestions").children].map((button) => button.textContent);
  if (questions.length && (!question.value.trim() || offered.includes(question.value))) question.value = questions[0];
  const buttons = questions.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    return button;
  });
  find("suggestions").replaceChildren(...buttons);
  find("suggestions").hidden = !questions.length;
}

// ---------------------------------------------------------------------------------------------------- events

function scrollToAnswers() {
  const box = find("cards").getBoundingClientRect();
  if (box.top < innerHeight * 0.6) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  find("cards").scrollIntoView({ behavior });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});

keyForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  state.key = find("key").value.trim();
  say("");
  if (await loadModels()) question.focus();
});

question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

find("stop").addEventListener("click", () => state.running?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !find("enlarged").open) state.running?.abort();
});

find("enlarged").addEventListener("click", () => find("enlarged").close());

find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) takeImage(file);
  event.target.value = ""; // so that the same file can be chosen again
});

samples.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) takeSample(button);
});

find("suggestions").addEventListener("click", (event) => {
  if (!event.target.matches("button")) return;
  question.value = event.target.textContent;
  question.focus();
});

addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) takeImage(file);
});

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return; // text that is dragged into the question
    event.preventDefault();
    document.body.classList.toggle("dragging", name === "dragenter" || name === "dragover");
    const [file] = name === "drop" ? event.dataTransfer.files : [];
    if (file) takeImage(file);
  });
}

selects[0].addEventListener("change", offerComparison);
selects[1].addEventListener("change", showChoice);

find("cards").append(...cards.map((card) => card.root));
loadModels();
