const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MARKED_BELOW = 60; // points of a curve, so that single ones can be seen
const BARS_BELOW = 200; // of more steps, areas
const PLOT_HEIGHT = 270, LEGEND_LINE = 17, LEGEND_CURVES = 4; // pixels; curves whose names leave the plot its room

/** Exponential moving average that begins at the first value; gaps stay gaps. */
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return Number((sum / norm).toPrecision(6)); // so that what does not change stays a straight line
  });
}

/** plotly reads a little markup in names; ours have none. */
const literally = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

function curveName(report, chart, curve) {
  if (report.runs.length === 1) return curve.label;
  const run = report.runs[curve.run].name;
  return chart.curves.every((other) => other.label === curve.label) ? run : `${run}: ${curve.label}`;
}

function curveColour(report, chart, curve) {
  if (curve.name !== null && !chart.bars) return nameColour(report, curve.name);
  const own = chart.curves.filter((other) => other.run === curve.run && (chart.bars || other.name === null));
  const alone = own.length === 1 && chart.curves.every((other) => other.name === null);
  return pick(PLAIN, alone ? curve.run : own.indexOf(curve) + (chart.bars ? 1 : 0));
}

function traces(report, chart, weight) {
  return chart.curves.flatMap((curve) => {
    const steps = report.runs[curve.run].steps;
    const x = curve.at === null ? steps : curve.at.map((place) => steps[place]);
    const colour = curveColour(report, chart, curve);
    const name = literally(curveName(report, chart, curve));
    if (chart.bars && x.length > BARS_BELOW) {
      return [{ type: "scatter", mode: "lines", x, y: curve.y, name, stackgroup: String(curve.run), line: { color: colour, width: 1 } }];
    }
    if (chart.bars) {
      return [{ type: "bar", x, y: curve.y, name, offsetgroup: String(curve.run), marker: { color: colour, line: { width: 0 } } }];
    }
    const line = { color: colour, width: 1.8, dash: DASHES[curve.run % DASHES.length] };
    const mode = x.length <= MARKED_BELOW ? "lines+markers" : "lines";
    const drawn = { type: "scatter", mode, x, y: curve.y, name, line, marker: { size: 4, color: colour } };
    if (weight === 0 || chart.section === "Evaluation") return [drawn]; // which has few points, each a measurement
    const faint = { ...drawn, mode: "lines", opacity: 0.25, hoverinfo: "skip", showlegend: false, line: { ...line, width: 1 } };
    return [faint, { ...drawn, mode: "lines", y: smoothed(curve.y, weight) }];
  });
}

function layout(chart, logarithmic, several) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const values = chart.curves.flatMap((curve) => curve.y).filter(isNumber);
  const positive = values.every((value) => value > 0);
  const large = values.some((value) => Math.abs(value) >= 1e4);
  const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
  const log = logarithmic && positive && !chart.bars;
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 48, r: 12, t: 8, b: 34 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
    barmode: several ? "group" : "stack",
    bargap: 0.15,
    showlegend: chart.curves.length > 1,
    legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { size: 12 } },
    xaxis: { ...axis, title: { text: "step", standoff: 4, font: { size: 11 } }, tickformat: ",d", minallowed: 0 },
    yaxis: { ...axis, type: log ? "log" : "linear", exponentformat: large ? "SI" : "e", rangemode: chart.bars ? "tozero" : values.every((value) => value >= 0) ? "nonnegative" : "normal" },
  };
}

/** A chart whose curves never change. */
function inWords(chart) {
  const values = [...new Set(chart.curves.map((curve) => show(curve.y[0])))];
  const told = values.length === 1 ? values[0] : chart.curves.map((curve) => `${curve.label} ${show(curve.y[0])}`).join(", ");
  return `${chart.title.toLowerCase()}: ${told}${/ a /.test(chart.unit) ? ` ${chart.unit}` : ""}`;
}

const CONFIG = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };

function chartCard(chart) {
  const height = `${PLOT_HEIGHT + LEGEND_LINE * Math.max(chart.curves.length - LEGEND_CURVES, 0)}px`;
  const plot = el("div", { class: "plot", style: { height }, role: "img", "aria-label": `${chart.title}, ${chart.unit || "no unit"}, over steps` });
  const head = el("div", { class: "chart-head", title: chart.keys.join("\n") }, el("h3", {}, chart.title),
    el("span", { class: "muted small" }, chart.unit));
  return [el("article", { class: "card chart" }, head, plot), plot];
}

/** Builds the charts, which are drawn when they come into view; returns what redraws those in view. */
async function showCharts(report) {
  const parent = document.getElementById("curves");
  const script = el("script");
  script.nonce = document.querySelector("script[nonce]").nonce;
  const plots = new Map();
  for (const section of report.sections) {
    const charts = report.charts.filter((chart) => chart.section === section);
    if (charts.length === 0) continue;
    const grid = el("div", { class: "charts" });
    parent.append(el("h2", { id: sectionId(section) }, section), grid);
    const quiet = charts.filter((chart) => chart.quiet).map(inWords);
    if (quiet.length) parent.append(el("p", { class: "muted small quiet" }, `The same at every step – ${quiet.join("; ")}.`));
    for (const chart of charts.filter((chart) => !chart.quiet)) {
      const [card, plot] = chartCard(chart);
      plots.set(plot, { chart, seen: false, stale: true });
      grid.append(card);
    }
  }
  document.getElementById("curve-controls").hidden = plots.size === 0;
  if (plots.size === 0) return () => {};
  script.textContent = await inflate("library");
  document.head.append(script);

  const slider = document.getElementById("smoothing"), logarithmic = document.getElementById("log-scale");
  const draw = (plot, state) => {
    state.stale = false;
    const several = report.runs.length > 1;
    Plotly.react(plot, traces(report, state.chart, Number(slider.value)), layout(state.chart, logarithmic.checked, several), CONFIG);
  };
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const state = plots.get(target);
      state.seen = isIntersecting;
      if (isIntersecting && state.stale) draw(target, state);
    }
  }, { rootMargin: "400px" });
  for (const plot of plots.keys()) observer.observe(plot);

  let waiting = 0;
  const redraw = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      for (const [plot, state] of plots) {
        state.stale = true;
        if (state.seen) draw(plot, state);
      }
    });
  };
  slider.addEventListener("input", () => {
    document.getElementById("smoothing-value").value = Number(slider.value) ? Number(slider.value).toFixed(2) : "off";
    redraw();
  });
  logarithmic.addEventListener("change", redraw);
  document.getElementById("curve-controls").addEventListener("submit", (event) => event.preventDefault());
  return redraw;
}
