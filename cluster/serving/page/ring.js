// The ring as it runs: asked for once a second while somebody can see it.

import { ask } from "./client.js";

const at = (id) => document.getElementById(id);
const PERIOD = 1000; // ms
const POINTS = 60;

const BOUNDS = {
  nvme: "reading from NVMe",
  pcie: "copying from host RAM",
  compute: "arithmetic",
  hbm: "device memory traffic",
  hops: "hops between stages",
};

const TIMES = [
  ["computing", "computing", "computing"],
  ["weights", "waiting_for_weights", "weights"],
  ["link", "waiting_for_link", "links"],
  ["kv", "waiting_for_kv", "KV"],
  ["between", "between_passes", "between passes"],
];

const PAGES = [
  ["used", "used"],
  ["cached", "cached"],
  ["moving", "moving"],
  ["free", "free"],
];

const percent = (share) => `${Math.round(100 * share)} %`;
const seconds = (s) => (s < 1 ? `${(1000 * s).toFixed(s < 0.1 ? 1 : 0)} ms` : `${s.toFixed(1)} s`);
const number = (n) => (n < 10 ? n.toFixed(1) : n.toFixed(0));

function bytesPerSecond(bytes) {
  const units = ["B/s", "kB/s", "MB/s", "GB/s"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) [bytes, unit] = [bytes / 1000, unit + 1];
  return `${bytes.toFixed(bytes < 10 && unit ? 1 : 0)} ${units[unit]}`;
}

function made(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// A bar of parts, each as wide as its share: made once, and told in words to those who do not see it.
class Bar {
  constructor(names) {
    this.element = made("div", "bar");
    this.element.setAttribute("role", "img");
    this.parts = names.map((name) => this.element.appendChild(made("span", name)));
  }

  show(values, words) {
    this.parts.forEach((part, i) => (part.style.flexGrow = values[i]));
    this.element.setAttribute("aria-label", words);
    this.element.title = words;
  }
}

class StageRow {
  constructor(stage) {
    this.element = made("li", "stage");
    const line = made("p", "spread");
    this.rates = made("span", "muted");
    line.append(made("strong", "", `Stage ${stage.stage}`), this.rates);
    this.bar = new Bar(TIMES.map(([name]) => name));
    const resident = stage.resident_layers;
    const count = stage.layers.length;
    const row = made("div", "spread");
    const layers = made("div", "layers");
    layers.setAttribute("role", "img");
    const told = `${count} layers: ${resident} resident, ${count - resident} streamed`;
    layers.setAttribute("aria-label", told);
    for (const { layer, tier } of stage.layers) {
      layers.append(made("span", tier));
      layers.lastChild.title = `layer ${layer}: ${tier}`;
    }
    row.append(layers, made("span", "muted", `${resident} of ${count} layers resident`));
    this.waits = made("p", "muted");
    this.element.append(line, row, this.bar.element, this.waits);
  }

  show(times) {
    const shares = TIMES.map(([, field]) => times?.[field] ?? 0);
    const told = TIMES.map(([, , text], i) => [text, shares[i]])
      .filter(([, share]) => share >= 0.005)
      .map(([text, share]) => `${text} ${percent(share)}`);
    this.bar.show(shares, told.join(", ") || "no pass yet");
    this.waits.textContent = told.join(" · ");
    this.rates.textContent = times ? rates(times) : "";
  }
}

function rates(times) {
  const named = [
    ["NVMe", times.nvme_bytes_per_second],
    ["host RAM", times.host_bytes_per_second],
    ["KV from NVMe", times.kv_nvme_bytes_per_second],
    ["KV host RAM", times.kv_host_bytes_per_second],
  ].filter(([, rate]) => rate > 0);
  const told = named.map(([name, rate]) => `${name} ${bytesPerSecond(rate)}`);
  if (times.experts_on_device !== null) {
    told.push(`experts on the device ${percent(times.experts_on_device)}`);
  }
  return told.join(" · ") || "nothing streamed";
}

class PagesRow {
  constructor(name) {
    this.element = made("li", "");
    const line = made("p", "spread");
    this.text = made("span", "muted");
    line.append(made("span", "", name), this.text);
    this.bar = new Bar(PAGES.map(([name]) => name));
    this.element.append(line, this.bar.element);
  }

  show(counts) {
    const values = {
      ...counts,
      moving: (counts.coming ?? 0) + (counts.leaving ?? 0),
      free: counts.free ?? 0,
    };
    const words = PAGES.filter(([name]) => values[name])
      .map(([name, text]) => `${values[name]} ${text}`)
      .join(", ");
    this.bar.show(PAGES.map(([name]) => values[name]), words);
    this.text.textContent = words || "none";
    this.element.hidden = !words;
  }
}

class Ring {
  constructor() {
    this.rows = [];
    this.pages = { device: "device", host: "host RAM", nvme: "NVMe" };
    for (const tier of Object.keys(this.pages)) {
      this.pages[tier] = new PagesRow(this.pages[tier]);
      at("pages").append(this.pages[tier].element);
    }
    this.history = [];
  }

  show(state) {
    if (this.rows.length !== state.stages.length) {
      this.rows = state.stages.map((stage) => new StageRow(stage));
      at("stages").replaceChildren(...this.rows.map((row) => row.element));
    }
    at("ring-body").hidden = false;
    this.showPasses(state);
    state.stages.forEach((stage, i) => this.rows[i].show(stage.times));
    for (const [tier, row] of Object.entries(this.pages)) row.show(state.kv[tier]);
    for (const kind of ["interactive", "batch"]) {
      for (const what of ["running", "waiting"]) {
        at(`${kind}-${what}`).textContent = state.sequences[kind][what];
      }
    }
    at("most").textContent = `At most ${state.sequences.max_running} run at once.`;
  }

  showPasses({ passes, plan, sequences, seconds_since_pass: since }) {
    const { interactive, batch } = sequences;
    const works = interactive.running + batch.running + interactive.waiting + batch.waiting > 0;
    const idle = since === null ? "no pass yet" : `idle for ${since.toFixed(0)} s`;
    say(works ? "running" : idle, works ? "running" : "idle");
    at("ring").classList.toggle("is-idle", !works);
    // What came and went between two looks is shown, too.
    const rate = passes && (works || since < PERIOD / 1000) ? passes.tokens_per_second : 0;
    at("rate").textContent = number(rate);
    at("pass").textContent = passes ? seconds(passes.pass_seconds) : "–";
    at("share").textContent = passes?.share_of_bound == null ? "–" : percent(passes.share_of_bound);
    this.history = [...this.history, rate].slice(-POINTS);
    this.showHistory();
    const many = `${plan.sequences} sequence${plan.sequences === 1 ? "" : "s"}`;
    const full = `${number(plan.tokens_per_second)} tokens/s with ${many}`;
    at("planned").textContent = `Planned: ${full}, bound by ${BOUNDS[plan.bound_by]}.`;
  }

  showHistory() {
    const peak = Math.max(...this.history);
    const most = Math.max(peak, 1);
    const left = POINTS - this.history.length;
    const points = this.history.map(
      (rate, i) => `${(300 * (left + i)) / (POINTS - 1)},${(42 - 38 * (rate / most)).toFixed(1)}`,
    );
    const line = `M${points.join("L")}`;
    const start = (300 * left) / (POINTS - 1);
    at("spark").querySelector(".line").setAttribute("d", line);
    at("spark").querySelector(".area").setAttribute("d", `${line}V44H${start}Z`);
    at("peak").textContent = `at most ${number(peak)}`;
  }
}

function say(text, kind) {
  at("ring-state").textContent = text;
  at("ring-state").className = `chip ${kind}`;
}

// Asks until the key is refused; `start` asks again.
export function watchRing() {
  const ring = new Ring();
  let timer = null;
  let isOn = false;

  async function look() {
    timer = null;
    try {
      const answer = await ask("ring", { signal: AbortSignal.timeout(10 * PERIOD) });
      ring.show(await answer.json());
    } catch (error) {
      isOn = error.status !== 401;
      say(error.status ? error.message : "the server does not answer", "lost");
    }
    next(PERIOD);
  }

  function next(delay) {
    if (isOn && timer === null && !document.hidden) timer = setTimeout(look, delay);
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    if (document.hidden) timer = null;
    else next(0);
  });
  return {
    start() {
      isOn = true;
      next(0);
    },
  };
}
