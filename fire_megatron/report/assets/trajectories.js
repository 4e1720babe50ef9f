/** Lightest and darkest shade of a quantity; of a signed one the darkest below 0 too. Text stays readable on all. */
const SHADES = {
  light: { weight: "#ffb347", confidence: "#7cc7ee", confusion: "#dba6f2", other: "#8fd3a8", above: "#86b6f2", below: "#f49a93", base: "#ffffff" },
  dark: { weight: "#8a5200", confidence: "#0b5f8a", confusion: "#6f3391", other: "#1f6b3d", above: "#1d5597", below: "#8c302b", base: "#171b22" },
};

const channels = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

function mix(from, to, share) {
  const a = channels(from), b = channels(to);
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(" ")})`;
}

/** Background of a value, null where there is none. */
function shade(quantity, value) {
  if (!isNumber(value)) return null;
  const colours = SHADES[dark.matches ? "dark" : "light"];
  const clamp = (share) => Math.min(Math.max(share, 0), 1);
  if (quantity.signed) return mix(colours.base, value < 0 ? colours.below : colours.above, clamp(Math.abs(value) / quantity.high));
  const darkest = colours[quantity.key] || colours.other;
  return mix(colours.base, darkest, clamp((value - quantity.low) / (quantity.high - quantity.low)));
}

function legend(quantity) {
  const at = (share) => quantity.low + share * (quantity.high - quantity.low);
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) => shade(quantity, at(share)));
  const bounded = quantity.low === 0 && quantity.high === 1;
  return [
    el("span", {}, `${quantity.title}:`),
    el("span", {}, `${bounded ? "" : "≤ "}${show(quantity.low, 3)}`),
    el("span", { class: "ramp", role: "img", "aria-label": `from light to dark`, style: { background: `linear-gradient(to right, ${stops.join(", ")})` } }),
    el("span", {}, `${bounded ? "" : "≥ "}${show(quantity.high, 3)}`),
    el("span", { class: "muted" }, "the same scale for all trajectories; ∅ a token without text of its own (special, or a part of a character)"),
  ];
}

function facts(report, item) {
  const list = [
    el("span", { class: "teacher" }, dot(report, item.teacher), item.teacher),
    item.kept === null ? null : el("span", { class: `badge ${item.kept ? "kept" : "dropped"}` }, item.kept ? "kept" : `dropped: ${item.reason}`),
    item.truncated ? el("span", { class: "badge truncated" }, "truncated") : null,
  ];
  if (isNumber(item.mean_log_prob)) {
    const limit = isNumber(item.threshold) ? `, threshold ${show(item.threshold)}` : "";
    list.push(el("span", { title: "mean of the teacher's log-prob over the response, and the filter's threshold" },
      `score ${show(item.mean_log_prob)}${limit} nats a token`));
  }
  if (isNumber(item.reverse_kl) && item.tokens) list.push(el("span", {}, `reverse KL ${show(item.reverse_kl / item.tokens)} nats a token`));
  list.push(el("span", { class: "muted" }, `${item.tokens} tokens`), el("span", { class: "muted" }, `row ${item.row}`));
  return el("div", { class: "facts" }, ...list);
}

const tip = {
  show(report, body, place, box) {
    const node = document.getElementById("tip");
    const named = new Map(report.quantities.map((quantity) => [quantity.key, quantity.title]));
    const rows = [["token", JSON.stringify(body.texts[place])], ["place", `${place + 1} of ${body.texts.length}`]];
    for (const [key, title] of named) if (key in body.numbers) rows.push([title, show(body.numbers[key][place])]);
    node.replaceChildren(el("table", {}, ...rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, value)))));
    node.hidden = false;
    const left = Math.min(box.left, innerWidth - node.offsetWidth - 8);
    const below = box.bottom + 6 + node.offsetHeight < innerHeight;
    node.style.left = `${Math.max(left, 8)}px`;
    node.style.top = `${below ? box.bottom + 6 : Math.max(box.top - node.offsetHeight - 6, 8)}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};

/** The response's tokens, with numbers under the pointer, or by the arrow keys. */
function tokens(report, body) {
  const box = el("div", { class: "response", tabindex: 0, role: "group", "aria-label": "response; arrow keys move from token to token" });
  body.texts.forEach((text, place) => {
    const kind = text === "" ? "silent" : /^\s*\n\s*$/.test(text) ? "newline" : null;
    box.append(el("span", { class: kind, "data-place": place }, text));
  });
  let here = null;
  const go = (span) => {
    here?.classList.remove("here");
    here = span;
    if (!span) return tip.hide();
    span.classList.add("here");
    tip.show(report, body, Number(span.dataset.place), span.getBoundingClientRect());
  };
  box.addEventListener("pointerover", (event) => go(event.target.closest("span")));
  box.addEventListener("pointerleave", () => go(null));
  box.addEventListener("blur", () => go(null));
  box.addEventListener("keydown", (event) => {
    const next = { ArrowRight: here?.nextElementSibling, ArrowLeft: here?.previousElementSibling, Escape: null }[event.key];
    if (next === undefined && !(event.key.startsWith("Arrow") && !here)) return;
    event.preventDefault();
    const span = event.key === "Escape" ? null : next || here || box.firstElementChild;
    span?.scrollIntoView({ block: "nearest" });
    go(span);
  });
  return box;
}

function paint(box, body, quantity) {
  const values = quantity && body.numbers[quantity.key];
  for (const span of box.children) span.style.background = (values && shade(quantity, values[span.dataset.place])) || "";
}

function choice(label, id, options) {
  const select = el("select", { id }, ...options.map(([value, text]) => el("option", { value }, text)));
  return [el("label", {}, label, select), select];
}

/** Builds the list of a step's trajectories, each unpacked when it comes into view; returns what recolours it. */
function showTrajectories(report) {
  const parent = document.getElementById("trajectory-body");
  const all = report.trajectories.map((item, number) => ({ ...item, number }));
  for (const run of report.runs) {
    const of = report.runs.length > 1 ? ` of ${run.name}` : "";
    const text = run.sampled === 0
      ? `No trajectories${of}: samples.jsonl is missing or empty. metrics.samples in the recipe says how many answers of each step are written.`
      : `${run.shown} of ${run.sampled} sampled trajectories${of}, from the rows of rank 0's replica.`
        + (run.shown < run.sampled ? " The others are left out by --max-samples or --max-tokens, or damaged." : "");
    parent.append(el("p", { class: "muted small" }, text));
  }
  if (all.length === 0) return () => {};

  const runs = [...new Set(all.map((item) => item.run))];
  const names = [...new Set(all.map((item) => item.teacher))];
  const reasons = [...new Set(all.map((item) => item.reason).filter(Boolean))];
  const [runLabel, run] = choice("Run", "run-choice", runs.map((number) => [number, report.runs[number].name]));
  const [stepLabel, step] = choice("Step", "step-choice", []);
  const [teacherLabel, teacher] = choice("Teacher", "teacher-choice", [["", "all"], ...names.map((name) => [name, name])]);
  const [keptLabel, kept] = choice("Show", "kept-choice", [["", "kept and dropped"], ["kept", "kept"], ["dropped", "dropped"], ...reasons.map((reason) => [`=${reason}`, `dropped: ${reason}`])]);
  const [shadeLabel, by] = choice("Shade by", "shade-choice", report.quantities.map((quantity) => [quantity.key, quantity.title]));
  const earlier = el("button", { type: "button", "aria-label": "earlier step", id: "earlier" }, "◀");
  const later = el("button", { type: "button", "aria-label": "later step", id: "later" }, "▶");
  const controls = el("form", { class: "controls" }, runs.length > 1 ? runLabel : null, el("span", {}, earlier, " ", stepLabel, " ", later), teacherLabel, keptLabel, report.quantities.length ? shadeLabel : null);
  const scale = el("div", { class: "legend", id: "scale" }), list = el("div", { id: "list" });
  controls.addEventListener("submit", (event) => event.preventDefault());
  parent.append(controls, scale, list);

  const open = new Map(); // response box -> body
  const quantity = () => report.quantities.find((one) => one.key === by.value);
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) unpack(target);
  }, { rootMargin: "600px" });

  async function unpack(card) {
    observer.unobserve(card);
    const body = JSON.parse(await inflate(`trajectory-${card.dataset.number}`));
    if (!card.isConnected) return;
    const box = tokens(report, body);
    open.set(box, body);
    paint(box, body, quantity());
    card.append(el("div", { class: "prompt" }, body.prompt), box);
    if (card.classList.contains("dropped") && !("weight" in body.numbers)) {
      card.append(el("div", { class: "muted small" }, "Dropped, so no token of it had a weight in the update."));
    }
  }

  const wanted = (item) => String(item.run) === run.value && String(item.step) === step.value
    && (!teacher.value || item.teacher === teacher.value)
    && (!kept.value || (kept.value.startsWith("=") ? item.reason === kept.value.slice(1) : item.kept === (kept.value === "kept")));

  function fill() {
    observer.disconnect();
    open.clear();
    tip.hide();
    const shown = all.filter(wanted);
    list.replaceChildren(...shown.map((item) => el("article", { class: `card trajectory ${item.kept === null ? "" : item.kept ? "kept" : "dropped"}`, "data-number": item.number }, facts(report, item))));
    if (shown.length === 0) list.append(el("p", { class: "muted" }, "No trajectory of this step is like that."));
    for (const card of list.querySelectorAll(".trajectory")) observer.observe(card);
    earlier.disabled = step.selectedIndex <= 0;
    later.disabled = step.selectedIndex >= step.options.length - 1;
  }

  function recolour() {
    scale.replaceChildren(...(quantity() ? legend(quantity()) : []));
    for (const [box, body] of open) paint(box, body, quantity());
  }

  function steps() {
    const before = step.value;
    const there = [...new Set(all.filter((item) => String(item.run) === run.value).map((item) => item.step))];
    step.replaceChildren(...there.map((number) => el("option", { value: number }, String(number))));
    step.value = there.map(String).includes(before) ? before : String(there[there.length - 1]);
    fill();
  }

  const move = (by) => () => {
    step.selectedIndex += by;
    fill();
  };
  earlier.addEventListener("click", move(-1));
  later.addEventListener("click", move(1));
  run.addEventListener("change", steps);
  for (const select of [step, teacher, kept]) select.addEventListener("change", fill);
  by.addEventListener("change", recolour);
  steps();
  recolour();
  return recolour;
}
