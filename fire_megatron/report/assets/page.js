// Everything that came from a run reaches the page as text (textContent, attributes), never as markup.

const dark = window.matchMedia("(prefers-color-scheme: dark)");

/** An element with attributes and children; strings become text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Text of a gzipped block of this page. */
async function inflate(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A number as people write it: some four digits, no needless zeros. */
function show(value, digits = 4) {
  if (!isNumber(value)) return "–";
  const extreme = value !== 0 && (Math.abs(value) >= 1e7 || Math.abs(value) < 1e-3);
  const text = extreme ? value.toExponential(2).replace("e+", "e")
    : Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
  return text.replaceAll("-", "−");
}

const percent = (value) => (isNumber(value) ? `${show(100 * value, 3)} %` : "–");

function duration(seconds) {
  if (seconds < 60) return `${show(seconds, 3)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

/** Colours of names that stay the same throughout the page, on either background; after eight they begin again. */
const PALETTE = {
  light: ["#0067b1", "#c44e00", "#00835f", "#b0478a", "#7d6500", "#5a45c9", "#a3201d", "#3f7f93"],
  dark: ["#5db4f5", "#ff9c57", "#3ccfa4", "#ef9fcf", "#e3c84a", "#a99bff", "#ff8f8a", "#86cfe0"],
};
/** Of curves that are of no teacher. */
const PLAIN = {
  light: ["#4a5462", "#8a3ffc", "#007d79", "#b28600", "#9f1853", "#24723b"],
  dark: ["#c2cad4", "#be95ff", "#3ddbd9", "#f1c21b", "#ff7eb6", "#6fdc8c"],
};
const pick = (palette, number) => {
  const colours = palette[dark.matches ? "dark" : "light"];
  return colours[number % colours.length];
};

function nameColour(report, name) {
  const others = [...new Set(report.charts.flatMap((c) => c.curves.map((curve) => curve.name)).filter(Boolean))]
    .filter((other) => !report.teachers.includes(other));
  const place = report.teachers.indexOf(name);
  return place >= 0 ? pick(PALETTE, place) : pick(PLAIN, Math.max(others.indexOf(name), 0));
}

function dot(report, teacher) {
  return el("span", { class: "dot", "data-teacher": teacher, style: { background: nameColour(report, teacher) } });
}

/** A named value of a run's header, with what it was at first. */
function tile(label, value, note = null, mark = null) {
  return el("div", { class: "tile" }, el("dt", {}, mark, label), el("dd", {}, value, note ? el("small", {}, note) : null));
}

function tiles(report, run) {
  const { first, last, done, total } = run;
  const state = run.state || (total === null ? "" : done >= total ? "complete" : "not complete");
  const list = [tile("Steps", total === null ? String(done) : `${done} of ${total}`, state)];
  const since = (key, form) => (isNumber(first[key]) ? `step ${first.step}: ${form(first[key])}` : null);
  const add = (key, label, form, mark = null) => {
    if (isNumber(last[key])) list.push(tile(label, form(last[key]), since(key, form), mark));
  };
  add("loss", "Loss", show);
  for (const name of report.teachers) add(`teacher/${name}/reverse_kl`, `Reverse KL, ${name}`, show, dot(report, name));
  add("fire/keep_ratio", "Rows that trained", percent);
  add("rollout/mean_length", "Response tokens a row", show);
  add("rollout/tokens_per_second", "Sampled tokens a second", show);
  add("time/step", "Seconds a step", show);
  if (run.seconds > 0) list.push(tile("Time in steps", duration(run.seconds), "without evaluation and saving"));
  return el("dl", { class: "tiles" }, ...list);
}

function runCard(report, run) {
  const card = el("article", { class: "card run" },
    el("div", { class: "run-head" }, el("h3", {}, run.name), el("span", { class: "muted small mono" }, run.folder)));
  if (run.steps.length === 0) {
    card.append(el("p", { class: "empty" }, "No step has been logged yet: metrics.jsonl is missing or holds no line."));
  }
  card.append(tiles(report, run));
  if (run.error) card.append(el("p", { class: "error" }, run.error));
  const saved = run.checkpoints.length ? `of step ${run.checkpoints.join(", ")}` : "none";
  card.append(el("div", { class: "small" }, `Checkpoints in the folder: ${saved}`));
  for (const note of run.notes) card.append(el("div", { class: "small muted" }, note));
  if (run.recipe) card.append(el("details", {}, el("summary", {}, "Recipe"), el("pre", {}, run.recipe)));
  for (const [step, difference] of run.changes) {
    card.append(el("details", {}, el("summary", {}, `Changes of the recipe after step ${step}`), el("pre", {}, difference)));
  }
  return card;
}

function navigation(report) {
  const titles = report.sections.filter((section) => report.charts.some((chart) => chart.section === section));
  for (const title of [...titles, "Trajectories"]) {
    const target = title === "Trajectories" ? "trajectories" : sectionId(title);
    document.getElementById("sections").append(el("a", { href: `#${target}` }, title));
  }
}

const sectionId = (title) => `curves-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;

async function main() {
  const report = JSON.parse(await inflate("report"));
  navigation(report);
  document.getElementById("runs").append(...report.runs.map((run) => runCard(report, run)));
  document.getElementById("footer").append(`Made ${report.made} by fire_megatron ${report.version}. Keys: docs/metrics.md.`);
  const recolour = [showTrajectories(report), await showCharts(report)];
  dark.addEventListener("change", () => {
    for (const mark of document.querySelectorAll(".dot")) mark.style.background = nameColour(report, mark.dataset.teacher);
    for (const again of recolour) again();
  });
  document.documentElement.dataset.ready = "yes";
}

document.addEventListener("DOMContentLoaded", () => {
  main().catch((error) => {
    const problem = document.getElementById("problem");
    problem.textContent = `The page could not be drawn: ${error}`;
    problem.hidden = false;
    throw error;
  });
});
