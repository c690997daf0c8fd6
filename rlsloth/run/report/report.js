"use strict";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const element = (tag, kind, text) => {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
};

// Diagrams: one cursor over all of them, at the same step.
const charts = read("charts-data");
const figures = [...document.querySelectorAll(".chart")];

function nearest(places, at) {
  let best = 0;
  places.forEach((place, i) => {
    if (Math.abs(place - at) < Math.abs(places[best] - at)) best = i;
  });
  return best;
}

function mark(figure, index) {
  const data = charts[figure.dataset.chart];
  const cursor = figure.querySelector(".cursor");
  cursor.style.left = data.at[index] + "%";
  cursor.hidden = false;
}

function tell(figure, index) {
  const data = charts[figure.dataset.chart];
  const tip = figure.querySelector(".tip");
  const lines = data.lines.filter((line) => line.values[index] !== "").map((line) => {
    const row = element("div");
    if (data.lines.length > 1) row.append(element("span", "", line.name));
    row.append(element("span", "", line.values[index]));
    return row;
  });
  tip.replaceChildren(element("b", "", "step " + data.steps[index]), ...lines);
  tip.hidden = false;
  // Kept inside the frame, so that the page never scrolls sideways.
  const width = figure.querySelector(".frame").clientWidth;
  const half = tip.offsetWidth / 2;
  const left = Math.min(Math.max((data.at[index] / 100) * width, half - 40), width - half + 10);
  tip.style.left = left + "px";
}

function point(figure, index) {
  clear();
  const step = charts[figure.dataset.chart].steps[index];
  for (const other of figures) {
    const there = charts[other.dataset.chart].steps.indexOf(step);
    if (there >= 0) mark(other, there);
  }
  tell(figure, index);
}

function clear() {
  document.querySelectorAll(".cursor, .tip").forEach((shown) => { shown.hidden = true; });
}

for (const figure of figures) {
  const frame = figure.querySelector(".frame");
  const data = charts[figure.dataset.chart];
  let current = data.steps.length - 1;
  const follow = (event) => {
    const box = frame.getBoundingClientRect();
    current = nearest(data.at, (100 * (event.clientX - box.left)) / box.width);
    point(figure, current);
  };
  frame.tabIndex = 0;
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("pointerleave", clear);
  frame.addEventListener("blur", clear);
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    current = Math.min(Math.max(current + move, 0), data.steps.length - 1);
    point(figure, current);
  });
}

// Samples. Their text comes from models and datasets: it is set as text, never as markup.
const samples = read("samples-data");
const control = (id) => document.getElementById(id);
const number = (value) => {
  if (value === null) return "none";
  return (Math.round(value * 1000) / 1000).toString().replace("-", "\u2212");
};

const rewardFilters = {
  all: () => true,
  positive: (row) => row.reward !== null && row.reward > 0,
  zero: (row) => row.reward !== null && row.reward <= 0,
  none: (row) => row.reward === null,
};

function chosen(step) {
  const wanted = rewardFilters[control("reward").value];
  const finish = control("finish").value;
  const search = control("search").value.toLowerCase();
  return step.rows.filter((row) => wanted(row)
    && (finish === "all" || row.finish === finish)
    && (row.prompt + "\n" + row.completion).toLowerCase().includes(search));
}

function marked(label, value, kind) {
  const made = element("span", kind, label + " ");
  made.append(element("b", "", value));
  return made;
}

function card(row, names) {
  const made = element("article", "card");
  const marks = element("div", "marks");
  marks.append(marked("reward", number(row.reward), row.reward > 0 ? "reward up" : "reward"));
  if (names.length > 1) names.forEach((name, i) => marks.append(marked(name, number(row.scores[i]))));
  marks.append(marked("advantage", number(row.advantage)));
  marks.append(marked("tokens", String(row.tokens)));
  if (row.finish === "length") marks.append(element("span", "cut", "cut off"));
  if (row.finish === "error") marks.append(element("span", "cut", "environment error"));
  marks.append(element("span", "", "prompt " + row.index));
  made.append(marks, element("div", "text prompt", row.prompt), element("div", "text", row.completion));
  row.extras.forEach((text) => made.append(element("div", "text", text)));
  if (row.failure) made.append(element("div", "failure", row.failure));
  return made;
}

function show() {
  const step = samples.steps[control("step").value];
  const rows = chosen(step);
  const kept = samples.steps.length < samples.steps_total
    ? `${samples.steps.length} of ${samples.steps_total} steps, evenly spaced` : "Every step";
  control("step-name").textContent = step.step;
  control("samples-note").textContent =
    `${rows.length} of ${step.rows.length} shown. This page holds ${kept.toLowerCase()}, and of this step `
    + `${step.rows.length} of ${step.total} completions, evenly spaced whatever their reward; `
    + "all are in samples/*.parquet.";
  const cards = rows.map((row) => card(row, step.rewards));
  control("cards").replaceChildren(...cards);
}

function walk(by) {
  const slider = control("step");
  slider.value = Number(slider.value) + by;
  show();
}

if (samples.steps.length) {
  control("samples").hidden = false;
  control("step").max = samples.steps.length - 1;
  control("step").value = samples.steps.length - 1;
  for (const id of ["step", "reward", "finish", "search"]) control(id).addEventListener("input", show);
  control("earlier").addEventListener("click", () => walk(-1));
  control("later").addEventListener("click", () => walk(1));
  show();
}
