// The conversation, its settings, and the command that does the same.

import { ApiError, ask, chunks, key } from "./client.js";
import { watchRing } from "./ring.js";

const at = (id) => document.getElementById(id);
const talk = at("talk");
const draft = at("draft");
const SETTINGS = ["temperature", "max_tokens", "seed"];

let model = null;
let messages = []; // without the system prompt, which may change between turns
let stopping = null; // AbortController of the answer that is under way

function shown(seconds) {
  return seconds < 10 ? `${seconds.toFixed(2)} s` : `${seconds.toFixed(1)} s`;
}

function requestBody(turns) {
  const system = at("system").value.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of SETTINGS) {
    if (at(name).value !== "") body[name] = at(name).valueAsNumber;
  }
  return body;
}

function checkSettings() {
  const seed = at("seed");
  const isExact = seed.value === "" || Math.abs(seed.valueAsNumber) <= Number.MAX_SAFE_INTEGER;
  seed.setCustomValidity(isExact ? "" : "JavaScript cannot hold this number exactly: give a smaller one.");
  return at("chat-form").reportValidity();
}

function isAtEnd() {
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
}

function addTurn(role, text) {
  const turn = document.createElement("article");
  const name = document.createElement("h3");
  const content = document.createElement("p");
  turn.className = role;
  name.textContent = role === "user" ? "You" : "Model";
  content.className = "content";
  const node = document.createTextNode(text);
  content.append(node);
  turn.append(name, content);
  at("hint").hidden = true;
  talk.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return { turn, node };
}

// What a model thinks before it answers is folded away.
function think(turn, thought) {
  let text = turn.querySelector(".thinking .content");
  if (!text) {
    const folded = document.createElement("details");
    const summary = document.createElement("summary");
    text = document.createElement("p");
    folded.className = "thinking";
    summary.textContent = "Thinking";
    text.className = "content";
    folded.append(summary, text);
    turn.querySelector("h3").after(folded);
  }
  text.append(thought);
}

// How an answer is doing; `usage` has its tokens, which only the end of a stream tells.
class Progress {
  constructor(turn) {
    this.line = document.createElement("p");
    this.line.className = "muted times";
    this.line.setAttribute("aria-live", "off");
    turn.append(this.line);
    this.begun = performance.now();
    this.first = this.last = null;
    this.pieces = 0;
    this.timer = setInterval(() => this.show(), 250);
    this.show();
  }

  piece() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
    this.show();
  }

  show() {
    const since = (performance.now() - this.begun) / 1000;
    this.line.textContent = this.first === null
      ? `waiting for the first token: ${since.toFixed(0)} s`
      : `${this.toFirst()} · ${this.pieces} pieces in ${shown(since)}`;
  }

  toFirst() {
    return `first token after ${shown((this.first - this.begun) / 1000)}`;
  }

  end(how, usage) {
    clearInterval(this.timer);
    const parts = [];
    if (this.first !== null) parts.push(this.toFirst());
    const tokens = usage?.completion_tokens;
    const seconds = (this.last - this.first) / 1000;
    if (tokens !== undefined) parts.push(`${tokens} tokens`);
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    if (tokens === undefined && this.pieces) parts.push(`${this.pieces} pieces in ${shown(seconds)}`);
    if (how) parts.push(how);
    this.line.textContent = parts.join(" · ");
    return this.line.textContent;
  }
}

const REASONS = { length: "cut: no more tokens allowed", tool_calls: "calls a tool" };

function told(error) {
  if (!(error instanceof ApiError)) {
    return error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  return `${error.message}${again}`;
}

function setBusy(controller) {
  stopping = controller;
  at("stop").disabled = controller === null;
  at("send").disabled = controller !== null || model === null;
}

async function read(body, controller, { turn, node }) {
  const progress = new Progress(turn);
  let usage, reason, error;
  try {
    for await (const chunk of chunks(body, controller.signal)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const { content, reasoning_content: thought } = choice.delta;
      if (!content && !thought) continue;
      const follow = isAtEnd();
      if (thought) think(turn, thought);
      if (content) node.appendData(content);
      progress.piece();
      if (follow) talk.scrollTop = talk.scrollHeight;
    }
  } catch (failure) {
    error = failure;
  }
  const isStopped = controller.signal.aborted;
  const how = isStopped ? "stopped" : error ? "ended by an error" : REASONS[reason];
  const isLost = !node.data && (isStopped || error !== undefined);
  return { summary: progress.end(how, usage), error: isStopped ? undefined : error, isLost };
}

async function send() {
  const text = draft.value.trim();
  if (!text || stopping || model === null || !checkSettings()) return;
  const turns = [...messages, { role: "user", content: text }];
  const body = requestBody(turns);
  at("error").textContent = "";
  const asked = addTurn("user", text);
  const answer = addTurn("assistant", "");
  answer.turn.setAttribute("aria-busy", "true"); // read out when it is whole
  draft.value = "";
  const controller = new AbortController();
  setBusy(controller);
  at("status").textContent = "Answering";
  const { summary, error, isLost } = await read(body, controller, answer);
  answer.turn.removeAttribute("aria-busy");
  if (stopping !== controller) return; // another conversation has begun
  setBusy(null);
  at("status").textContent = error ? "" : `Answered: ${summary}`;
  if (error) fail(error);
  if (isLost) {
    asked.turn.remove();
    answer.turn.remove();
    at("hint").hidden = messages.length > 0;
    draft.value ||= text; // to be sent again
  } else messages = [...turns, { role: "assistant", content: answer.node.data }];
  showCommand();
}

function fail(error) {
  if (error.status === 401) askForKey(error.message);
  else at("error").textContent = told(error);
}

function stop() {
  if (!stopping) return;
  stopping.abort();
  draft.focus();
}

function startAnew() {
  const under_way = stopping;
  setBusy(null);
  under_way?.abort();
  messages = [];
  for (const turn of talk.querySelectorAll("article")) turn.remove();
  at("hint").hidden = false;
  at("error").textContent = "";
  at("status").textContent = "A new conversation";
  showCommand();
  draft.focus();
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function showCommand() {
  const text = draft.value.trim();
  const last = messages.findLastIndex((message) => message.role === "user");
  let turns = messages.slice(0, last + 1);
  if (text || !turns.length) turns = [...messages, { role: "user", content: text || "Tell me a story." }];
  const lines = [
    `curl -N ${quoted(new URL("v1/chat/completions", document.baseURI).href)}`,
    "  -H 'Content-Type: application/json'",
  ];
  if (key.get()) lines.push('  -H "Authorization: Bearer $HEADRACE_API_KEY"');
  lines.push(`  -d ${quoted(JSON.stringify(requestBody(turns), null, 2))}`);
  at("command").textContent = lines.join(" \\\n");
}

async function copyCommand() {
  const text = at("command");
  let copied = true;
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch { // over plain HTTP from another machine there is no clipboard
    getSelection().selectAllChildren(text);
    copied = document.execCommand("copy");
  }
  at("copy").textContent = copied ? "Copied" : "Press Ctrl+C";
  at("status").textContent = copied ? "The command is copied" : "";
  setTimeout(() => (at("copy").textContent = "Copy"), 2000);
}

function askForKey(why) {
  const had = key.get() !== "";
  key.forget();
  model = null;
  setBusy(null);
  at("key-form").hidden = false;
  at("main").hidden = messages.length === 0;
  at("key-error").textContent = had ? why : "";
  at("key").focus();
}

const ring = watchRing();

async function connect() {
  try {
    const listed = await (await ask("v1/models")).json();
    model = listed.data[0].id;
    at("model").textContent = `${model} · ${listed.data[0].max_model_len} tokens of context`;
    document.title = `${model} · Headrace`;
    at("key-form").hidden = true;
    at("main").hidden = false;
    setBusy(null);
    showCommand();
    ring.start();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else at("error").textContent = told(error);
  }
}

at("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
draft.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
document.addEventListener("input", showCommand);
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", startAnew);
at("copy").addEventListener("click", copyCommand);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  connect().then(() => model && draft.focus());
});

connect();
