"use strict";
// DATA: a list of sweeps. All text goes into the page as text, never as HTML.
const byId = id => document.getElementById(id);
const PANES = ["left", "right"];
const LABELS = {
  samples: ["samples", "generations in this cell"],
  coherent: ["coherent", "share with a low enough sober perplexity and no loop"],
  loops: ["loops", "share that ends in a loop"],
  ended: ["ended", "share that the model ended by itself"],
  tokens: ["tokens", "mean length"],
  perplexity: ["sober perplexity", "of the text under the sober model, geometric mean"],
  rep_4: ["rep-4", "share of 4-grams that occurred before in the same text"],
  unique: ["unique", "different samples for each sample"],
  distinct_2: ["distinct-2", "different pairs of words for each pair"],
  self_bleu: ["self-BLEU", "of each sample against the others; lower is more diverse"],
  shared_prefix: ["shared prefix", "first words two samples have in common, mean"],
  leaves_sober: ["leaves sober at", "first token that differs from the sober text, mean"],
  vendi: ["Vendi", "effective number of different samples"],
  fair_vendi: ["fair Vendi", "of coherent samples, equal length and number"],
  fair_samples: ["fair samples", "how many samples fair metrics are made of"],
};
const SHARES = new Set(["coherent", "loops", "ended"]);
const state = {model: 0, prompt: 0, left: null, right: null};  // a pane: {family, level, seed}

function sweep() { return DATA[state.model]; }

function levels(family) {  // [{level, condition}] ascending, the sober one first
  const found = [];
  sweep().conditions.forEach((condition, i) => {
    if (condition.family === "sober" || condition.family === family) found.push({level: condition.level, condition: i});
  });
  return found.sort((a, b) => a.level - b.level);
}

function samples(condition) {
  return sweep().samples.filter(sample => sample.p === state.prompt && sample.c === condition);
}

function nearest(values, wanted) {
  return values.reduce((best, value) => Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best, values[0]);
}

// What is chosen, made valid: an unknown family becomes the first, a level or a seed the nearest there is.
function settle(choice) {
  const families = sweep().families;
  const family = families.includes(choice.family) ? choice.family : families[0] ?? "sober";
  const there = levels(family).filter(each => samples(each.condition).length);
  const level = there.length ? nearest(there.map(each => each.level), choice.level) : 0;
  const condition = there.find(each => each.level === level)?.condition;
  const seeds = condition === undefined ? [] : samples(condition).map(sample => sample.seed);
  const seed = seeds.length ? nearest(seeds, choice.seed) : 0;
  return {family, level, seed, wanted: choice.seed, condition, seeds, there};
}

function chosen(side) {
  const now = settle(state[side]);
  const sample = now.condition === undefined ? null : samples(now.condition).find(each => each.seed === now.seed);
  return {...now, sample};
}

// --- families: a site and a law, or one name ---------------------------------------------------------------
function split(family) {
  const drug = sweep().conditions.find(each => each.family === family)?.drug ?? "sober";
  const [site, ...law] = family.split(" ");
  return drug !== "sober" && drug.startsWith(site + ":") ? [site, law.join(" ")] : [family, ""];
}

function fill(select, values, value) {
  select.replaceChildren(...values.map(each => new Option(each === "" ? "–" : each, each)));
  select.value = value;
  select.disabled = values.length < 2;
}

function shownLevel(now) {
  const condition = sweep().conditions[now.condition];
  if (!condition || condition.family === "sober") return "sober";
  if (condition.sampling.temperature !== undefined) return "T = " + now.level;
  if (condition.drug === "sober") return String(now.level);
  const kl = condition.kl == null ? "" : `, KL ${number(condition.kl)}`;
  return condition.drug.includes("kl=") ? `KL = ${now.level}` : `θ = ${now.level} rad${kl}`;
}

// --- drawing ------------------------------------------------------------------------------------------------
function draw() {
  const now = {left: chosen("left"), right: chosen("right")};
  byId("prompt").value = state.prompt;
  const prompt = sweep().prompts[state.prompt];
  byId("question").textContent = (prompt.system ? `(${prompt.system}) ` : "") + prompt.text +
    (prompt.chat ? "" : " …");
  const texts = PANES.map(side => pieces(now[side].sample?.text ?? ""));
  const common = byId("marks").checked ? inCommon(...texts) : texts.map(text => text.map(() => true));
  PANES.forEach((side, i) => drawPane(side, now[side], texts[i], common[i]));
  drawMetrics(now);
  const hash = "#" + new URLSearchParams({m: sweep().name, p: prompt.name, ...Object.fromEntries(
    PANES.map(side => [side[0], [now[side].family, now[side].level, now[side].seed].join(";")]))});
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function drawPane(side, now, text, common) {
  const pane = byId(side), find = name => pane.querySelector("." + name);
  const [site, law] = split(now.family), families = sweep().families.map(split);
  fill(find("site"), [...new Set(families.map(each => each[0]))], site);
  fill(find("law"), families.filter(each => each[0] === site).map(each => each[1]), law);
  fill(find("seed"), now.seeds.map(String), String(now.seed));
  const slider = find("level"), at = now.there.findIndex(each => each.level === now.level);
  slider.max = Math.max(0, now.there.length - 1);
  slider.value = Math.max(0, at);
  slider.setAttribute("aria-valuetext", shownLevel(now));
  find("value").textContent = shownLevel(now);
  const facts = find("facts"), sample = now.sample;
  facts.replaceChildren();
  if (sample) {
    const end = sample.ended ? "ended by itself" : "cut at the limit";
    const perplexity = sample.nll == null ? "unknown" : number(Math.exp(sample.nll));
    facts.append(`sober perplexity ${perplexity} · ${sample.tokens} tokens, ${end} · seed ${sample.seed}`);
    if (sample.loop) facts.append(" · ", Object.assign(document.createElement("b"), {textContent: "ends in a loop"}));
  } else {
    facts.append("no sample: the sweep did not get there");
  }
  const words = text.map((word, i) => {
    if (common[i] || !word.trim()) return document.createTextNode(word);
    return Object.assign(document.createElement("mark"), {textContent: word});
  });
  find("text").replaceChildren(...words);
  const record = sample ? JSON.stringify(recordOf(sample), null, 1) : "";
  find("record").textContent = record;
  const link = find("save");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([record], {type: "application/json"}));
  link.download = `record-${sample ? sweep().conditions[sample.c].name.replace(/[^\w.-]+/g, "_") : "none"}-${now.seed}.json`;
}

function recordOf(sample) {
  const {format, made_by, model, prompts} = sweep();
  return {format, made_by, model, prompt_ids: prompts[sample.p].ids, ...sample.record, ids: sample.ids, text: sample.text};
}

function drawMetrics(now) {
  const cells = PANES.map(side => sweep().cells[`${state.prompt}/${now[side].condition}`]);
  const names = PANES.map(side => sweep().conditions[now[side].condition]?.name ?? "–");
  const rows = [row("th", "", ...names)];
  sweep().metrics.forEach((key, i) => {
    const [label, meaning] = LABELS[key] ?? [key, ""];
    const line = row("td", label, ...cells.map(cell => shown(key, cell?.[i])), meaning);
    rows.push(line);
  });
  byId("metrics").replaceChildren(...rows);
}

function row(kind, ...cells) {
  const line = document.createElement("tr");
  line.append(...cells.map((text, i) => {
    const cell = document.createElement(kind);
    cell.textContent = text;
    if (i === 3) { cell.className = "soft"; cell.style.textAlign = "left"; }
    return cell;
  }));
  return line;
}

function shown(key, value) {
  if (value == null) return "–";
  return SHARES.has(key) ? Math.round(100 * value) + " %" : number(value);
}

function number(value) { return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3))); }

// --- differences: words of a longest common subsequence are the same -----------------------------------------
function pieces(text) { return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []; }

function inCommon(one, other) {
  const n = one.length, m = other.length, width = m + 1, length = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      length[i * width + j] = one[i] === other[j] ? length[(i + 1) * width + j + 1] + 1 :
        Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const same = [new Array(n).fill(false), new Array(m).fill(false)];
  for (let i = 0, j = 0; i < n && j < m;) {
    if (one[i] === other[j]) { same[0][i++] = same[1][j++] = true; }
    else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
    else j++;
  }
  return same;
}

// --- choices ------------------------------------------------------------------------------------------------
function choose(side, change) {
  const now = chosen(side);
  state[side] = {family: now.family, level: now.level, seed: now.wanted, ...change};
  draw();
}

function connect(side) {
  const pane = byId(side);
  pane.append(byId("pane").content.cloneNode(true));
  const find = name => pane.querySelector("." + name), on = (name, event, act) => find(name).addEventListener(event, act);
  const family = (site, law) => {
    const laws = sweep().families.filter(each => split(each)[0] === site);
    return laws.find(each => split(each)[1] === law) ?? laws[0];
  };
  on("site", "change", () => choose(side, {family: family(find("site").value, find("law").value)}));
  on("law", "change", () => choose(side, {family: family(find("site").value, find("law").value)}));
  on("seed", "change", () => choose(side, {seed: Number(find("seed").value)}));
  on("level", "input", () => choose(side, {level: chosen(side).there[find("level").value]?.level ?? 0}));
  on("copy", "click", async () => {
    const text = find("record").textContent;
    try { await navigator.clipboard.writeText(text); }
    catch { getSelection().selectAllChildren(find("record")); document.execCommand("copy"); }
    find("copy").textContent = "copied";
    setTimeout(() => { find("copy").textContent = "copy"; }, 1500);
  });
}

function listPrompts() {
  byId("prompt").replaceChildren(...sweep().prompts.map((prompt, i) => new Option(prompt.name, i)));
}

function first() {  // the first family: sober on the left, its middle dose on the right
  const family = sweep().families[0] ?? "sober", doses = levels(family).map(each => each.level);
  const seeds = sweep().samples.map(sample => sample.seed);
  state.left = {family, level: 0, seed: seeds[0] ?? 0};
  state.right = {family, level: doses[Math.floor(doses.length / 2)], seed: seeds[0] ?? 0};
}

function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.model = Math.max(0, DATA.findIndex(each => each.name === given.get("m")));
  listPrompts();
  first();
  state.prompt = Math.max(0, sweep().prompts.findIndex(each => each.name === given.get("p")));
  for (const side of PANES) {
    const [family, level, seed] = (given.get(side[0]) ?? "").split(";");
    if (seed !== undefined) state[side] = {family, level: Number(level) || 0, seed: Number(seed) || 0};
  }
  byId("model").value = state.model;
  draw();
}

byId("model").replaceChildren(...DATA.map((each, i) => new Option(each.name, i)));
byId("model").disabled = DATA.length < 2;
byId("model").addEventListener("change", event => {
  state.model = Number(event.target.value);
  state.prompt = Math.min(state.prompt, sweep().prompts.length - 1);
  listPrompts();
  draw();
});
byId("prompt").addEventListener("change", event => { state.prompt = Number(event.target.value); draw(); });
byId("marks").addEventListener("change", draw);
byId("swap").addEventListener("click", () => { [state.left, state.right] = [state.right, state.left]; draw(); });
PANES.forEach(connect);
window.addEventListener("hashchange", fromHash);
fromHash();
