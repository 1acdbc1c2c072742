"use strict";
// The data is made by asyncrl/report/*.py. Text of runs only ever becomes text nodes.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, COLORS = ["#2f7ed8", "#e07b00", "#2a9d5c", "#c2408f", "#8a63d2", "#b8a000", "#00a3b5", "#d24b3e"];
const MARKS = { restart: "#d24b3e", error: "#c2408f", end: "#7a8594" };
const STATES = { busy: "#2a9d5c", sync: "#2f7ed8", unaccounted: "#d24b3e", "wait:store": "#e0a100", "wait:start": "#9aa4b0", "wait:weights": "#8a63d2" };
const DEFAULTS = { x: "update", theme: "", hidden: "", sort: "newest", status: "", source: "", text: "", colour: "probability", shown: "6", all: "" };
const state = Object.assign({}, DEFAULTS, Object.fromEntries(new URLSearchParams(location.hash.slice(1))));

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? node.addEventListener(name.slice(2), value) : name === "style" ? node.style.cssText = value : node.setAttribute(name, value);
  node.append(...children.filter(child => child != null));
  return node;
};
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = value => value == null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
const duration = s => s < 120 ? `${+s.toPrecision(3)} s` : s < 7200 ? `${+(s / 60).toPrecision(3)} min` : `${+(s / 3600).toPrecision(3)} h`;
const visible = run => !state.hidden.split(",").includes(String(RUNS.indexOf(run)));

function set(changes, redraw) {
  Object.assign(state, changes);
  const kept = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
  redraw();
}

// ------------------------------------------------------------------------------------------------- plots

const plots = new Map();  // element -> figure, drawn once it is in view
const watcher = new IntersectionObserver(entries => entries.forEach(e => e.isIntersecting && draw(e.target)), { rootMargin: "300px" });

function place(figure) {
  const box = el("div", { class: "plot" });
  plots.set(box, { figure });
  watcher.observe(box);
  return el("div", { class: "card" }, el("h3", {}, figure.title, el("span", { class: "note" }, figure.note)), box);
}

function redraw() {
  for (const [box, kept] of plots) {
    kept.plot?.destroy();
    kept.plot = null;
    box.replaceChildren();
    watcher.unobserve(box);
    watcher.observe(box);
  }
}

function axes() {
  const common = { stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "11px system-ui" };
  const ticks = state.x === "time" ? { values: (u, values) => values.map(duration), incrs: [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 432000] } : {};
  return [{ ...common, ...ticks, space: 70 }, { ...common, size: 58, values: (u, values) => values.map(number) }];
}

function marked(runs) {
  return u => runs.forEach(run => run.marks.forEach(mark => {
    const x = u.valToPos(mark[state.x], "x", true);
    if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
    u.ctx.save();
    u.ctx.strokeStyle = MARKS[mark.kind] || MARKS.end;
    u.ctx.globalAlpha = 0.7;
    u.ctx.setLineDash([4, 3]);
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    u.ctx.restore();
  }));
}

function around(u, low, high) {  // uPlot's own range of what is flat is 0 to 100
  if (low == null) return [0, 1];
  return low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.1, true);
}

function options(box, runs, more) {
  const x = { label: state.x === "time" ? "time" : "update", value: (u, v) => v == null ? "–" : state.x === "time" ? duration(v) : number(v) };
  return {
    width: box.clientWidth, height: 190, axes: axes(), scales: { x: { time: false }, y: { range: around } }, cursor: { sync: { key: "x" }, y: false },
    hooks: { draw: [marked(runs)] }, ...more, series: [x, ...more.series],
  };
}

function lines(box, figure) {
  const series = [], bands = [], tables = [], runs = RUNS.filter(visible);
  const many = RUNS.length > 1;
  runs.forEach(run => figure.series.forEach(([table, name, label], i) => {
    const content = run.tables[table], column = content?.columns[name];
    if (!column) return;
    const color = COLORS[(many ? RUNS.indexOf(run) : i) % COLORS.length];
    const own = { stroke: color, width: 1.6, spanGaps: true, points: { show: content.update.length < 30, size: 4 }, value: (u, v) => number(v), dash: many && i ? [2 + 3 * i, 3] : undefined };
    const columns = column.mean ? [column.mean, column.low, column.high] : [column];
    const at = 1 + tables.reduce((sum, t) => sum + t.length - 1, 0);
    series.push({ ...own, label: many ? `${run.name}${figure.series.length > 1 ? " " + label : ""}` : label });
    if (column.mean) {
      for (const end of ["low", "high"]) series.push({ ...own, label: end, class: "band", width: 0, points: { show: false } });
      bands.push({ series: [at + 2, at + 1], fill: color + "2e" });
    }
    tables.push([content[state.x], ...columns]);
  }));
  if (!tables.length) return null;
  const rising = t => t[0].every((x, i) => !i || x > t[0][i - 1]);
  const data = tables.length > 1 || !rising(tables[0]) ? uPlot.join(tables.map(unique)) : tables[0];
  return new uPlot(options(box, runs, { series, bands }), data, box);
}

function unique(table) {  // x must rise: where it does not, the last value stands
  const keep = table[0].map((x, i) => i === table[0].length - 1 || table[0][i + 1] > x);
  return table.map(column => column.filter((_, i) => keep[i]));
}

function stack(box, figure) {
  const run = RUNS[figure.run], content = run.tables[figure.series[0][0]];
  const names = figure.series.map(s => s[1]).filter(name => content.columns[name]);
  const own = unique([content[state.x], ...names.map(name => content.columns[name])]);
  const sums = own.slice(1).map((_, k) => own[0].map((_, i) => own.slice(1, k + 2).reduce((sum, c) => sum + (c[i] || 0), 0)));
  let spare = 0;
  const series = names.map((name, k) => {
    const color = STATES[name] || COLORS[(3 + spare++) % COLORS.length];
    return { label: name, stroke: color, fill: color, width: 0.5, points: { show: false }, value: (u, v, s, i) => i == null ? "–" : `${Math.round(100 * (own[k + 1][i] || 0))}%` };
  });
  const more = { series: series.reverse(), scales: { x: { time: false }, y: { range: [0, 1] } } };
  return new uPlot(options(box, [run], more), [own[0], ...sums.reverse()], box);
}

function heat(box, figure) {
  const run = RUNS[figure.run], map = run.lags, x = map[state.x], top = map.share[0].length - 1;
  const paint = u => map.share.forEach((shares, i) => shares.forEach((share, lag) => {
    if (!share) return;
    const from = u.valToPos(i ? x[i - 1] : Math.min(x[0], u.scales.x.min), "x", true), to = u.valToPos(x[i], "x", true);
    const high = u.valToPos(lag + 0.5, "y", true), low = u.valToPos(lag - 0.5, "y", true);
    u.ctx.fillStyle = `hsl(211 80% 50% / ${0.05 + 0.9 * Math.sqrt(share)})`;
    u.ctx.fillRect(from, high, Math.max(1, to - from), low - high);
  }));
  const mean = map.share.map(shares => shares.reduce((sum, share, lag) => sum + share * lag, 0));
  const series = [{ label: "mean lag", stroke: "#e07b00", width: 1, points: { show: false }, value: (u, v) => number(v) }];
  const more = { series, scales: { x: { time: false }, y: { range: [-0.5, top + 0.5] } }, hooks: { drawClear: [paint], draw: [marked([run])] } };
  return new uPlot(options(box, [run], more), unique([x, mean]), box);
}

function draw(box) {
  const kept = plots.get(box);
  if (!kept.plot) kept.plot = { lines, stack, heat }[kept.figure.kind](box, kept.figure);
  if (kept.plot) box.dataset.drawn = "1";
}

let width = innerWidth;
addEventListener("resize", () => {
  if (width !== innerWidth) redraw();
  width = innerWidth;
});

// ------------------------------------------------------------------------------------------------- page

const named = run => el("span", {}, el("span", { class: "swatch", style: `background:${COLORS[RUNS.indexOf(run) % COLORS.length]}` }), run.name);
const section = (title, ...children) => {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  document.getElementById("nav").append(el("a", { href: "#" + id, onclick: e => { e.preventDefault(); document.getElementById(id).scrollIntoView(); } }, title));
  document.getElementById("main").append(el("section", { id }, el("h2", {}, title), ...children));
};

function controls() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = state.theme;
  const button = (label, on, changes) => el("button", { class: on ? "on" : "", onclick: () => set(changes, () => { controls(); redraw(); }) }, label);
  const runs = RUNS.length < 2 ? [] : RUNS.map((run, i) => {
    const hidden = state.hidden.split(",").filter(Boolean), off = hidden.includes(String(i));
    return el("label", {}, el("input", { type: "checkbox", ...(off ? {} : { checked: "" }), onchange: () => set({ hidden: (off ? hidden.filter(h => h !== String(i)) : [...hidden, i]).join() }, () => { controls(); redraw(); }) }), named(run));
  });
  document.getElementById("controls").replaceChildren(
    el("span", { class: "dim" }, "across: "), button("updates", state.x === "update", { x: "update" }), button("time", state.x === "time", { x: "time" }),
    button(dark ? "☀ light" : "☾ dark", false, { theme: dark ? "light" : "dark" }), ...runs);
}

function overview() {
  const box = el("div");
  for (const run of RUNS) {
    box.append(el("div", {}, RUNS.length > 1 ? named(run) : el("b", {}, run.name), el("span", { class: "note" }, run.state)));
    box.append(el("div", { class: "tiles" }, ...run.tiles.map(([label, value]) => el("div", {}, el("span", {}, label), el("b", {}, value)))));
  }
  box.append(el("p", { class: "dim" }, DATA.about));
  section("Overview", box);
}

function table(heads, rows) {
  const row = (cells, tag, cls) => el("tr", cls ? { class: cls } : {}, ...cells.map(cell => el(tag, {}, cell)));
  return el("div", { class: "scroll" }, el("table", { class: "plain" }, row(heads, "th"), ...rows.map(([cells, cls]) => row(cells, "td", cls))));
}

function trouble() {
  const rows = RUNS.flatMap(run => run.marks.map(mark => [[run.name, duration(mark.time), number(mark.update), el("span", {}, el("span", { class: "swatch", style: `background:${MARKS[mark.kind] || MARKS.end}` }), mark.kind), mark.text]]));
  return [el("p", { class: "dim" }, rows.length ? "Dashed lines in all plots stand where these happened." : "No restart and no error is on record."), rows.length ? table(["run", "time", "update", "", "what"], rows.slice(0, 300)) : null];
}

function settings() {
  const box = el("div"), show = () => {
    const rows = DATA.settings.filter(line => state.all || (RUNS.length > 1 && line.differs));
    const text = value => value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value);
    box.replaceChildren(
      el("label", {}, el("input", { type: "checkbox", ...(state.all ? { checked: "" } : {}), onchange: e => set({ all: e.target.checked ? "1" : "" }, show) }), ` all ${DATA.settings.length} settings`),
      rows.length ? table(["setting", ...RUNS.map(run => run.name)], rows.map(line => [[line.name, ...line.values.map(text)], line.differs ? "differs" : ""])) : el("p", { class: "dim" }, RUNS.length > 1 ? "The runs' settings are the same." : ""));
  };
  show();
  section(RUNS.length > 1 ? "What differs" : "Settings", box);
}

function forks() {
  const rows = pair => pair.metrics.map(m => [[m.metric, m.rollouts, String(m.updates), number(m.source), number(m.fork), number(m.difference) + " ± " + number(m.error)]]);
  const parts = DATA.paired.flatMap(pair => [
    el("h3", {}, `${pair.fork} − ${pair.source}`, el("span", { class: "note" }, `after update ${pair.update}; log: both trained the same rollouts; live: each its own`)),
    table(["metric", "rollouts", "updates", pair.source, pair.fork, "difference ± standard error"], rows(pair)),
  ]);
  if (parts.length) section("Forks, update by update", ...parts);
}

function knobs() {
  return RUNS.flatMap(run => run.advice.map(a => el("div", { class: "card advice" }, RUNS.length > 1 ? el("div", {}, named(run)) : null, a.found, " ", a.knob ? el("b", {}, "→ " + a.knob) : null, el("div", { class: "dim" }, "said where: " + a.rule + "; over the second half of the run"))));
}

function build() {
  controls();
  overview();
  const sections = new Map();
  for (const figure of DATA.figures) {
    if (!sections.has(figure.section)) sections.set(figure.section, []);
    if (figure.kind === "lines") sections.get(figure.section).push(place(figure));
    else RUNS.forEach((run, i) => run.tables[figure.series[0][0]] && sections.get(figure.section).push(place({ ...figure, run: i, note: RUNS.length > 1 ? run.name : "" })));
  }
  RUNS.forEach((run, i) => run.lags && sections.get("Staleness")?.unshift(place({ kind: "heat", run: i, title: "Lag of trained tokens", note: (RUNS.length > 1 ? run.name + ", " : "") + "share of an update's tokens, by lag in updates" })));
  const order = ["Learning", "Staleness", "Who waits for whom", "Throughput", "Trouble"];
  if (!sections.has("Trouble")) sections.set("Trouble", []);
  for (const title of order) if (sections.has(title)) {
    const extra = title === "Staleness" ? knobs() : title === "Trouble" ? trouble() : [];
    section(title, ...extra, el("div", { class: "grid" }, ...sections.get(title)));
  }
  if (RUNS.some(run => run.samples?.length)) section("Samples", browser());
  settings();
  forks();
  for (const [title, cards] of sections) if (!order.includes(title)) section(title, el("details", {}, el("summary", {}, `${cards.length} plots`), el("div", { class: "grid" }, ...cards)));
  document.getElementById("foot").append(el("p", { class: "dim" }, DATA.made));
}
