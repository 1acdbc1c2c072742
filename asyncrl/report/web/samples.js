"use strict";
// The sample browser: the responses to a prompt side by side, each token coloured.

const ORDERS = {
  newest: ["newest", r => r.update ?? Infinity], reward: ["reward", r => r.reward], worst: ["reward, lowest first", r => r.reward == null ? null : -r.reward],
  gain: ["gain over its group", r => r.gain], loss: ["gain, lowest first", r => r.gain == null ? null : -r.gain], length: ["length", r => r.length],
  surprise: ["surprise", r => r.surprise], lag: ["lag", r => r.lag],
};
const HUES = update => (update * 137.5) % 360;  // neighbours differ

function token(rollout, i, version) {
  const policy = !rollout.context.some(([from, to]) => i >= from && i < to), p = Math.exp(rollout.logprobs[i] ?? 0);
  const colour = state.colour === "version" ? `hsl(${HUES(version)} 70% 50% / .35)` : policy ? `hsl(${120 * p} 75% 45% / ${0.12 + 0.5 * (1 - p)})` : "none";
  const title = policy ? `p = ${number(p)}, log p = ${number(rollout.logprobs[i])}, weights of update ${version}` : "not the policy's";
  return el("span", { style: `background:${colour}`, title, ...(policy ? {} : { class: "env" }) }, rollout.tokens[i]);
}

function response(rollout) {
  if (!rollout.tokens) return el("div", { class: "text" }, rollout.response);
  const spans = rollout.spans.flatMap(([from, to, update]) => Array.from({ length: Math.max(0, Math.min(to, rollout.tokens.length) - from) }, (_, k) => token(rollout, from + k, update)));
  return el("div", { class: "text" }, ...spans, rollout.cut ? el("span", { class: "dim" }, ` … ${rollout.cut} more tokens`) : null);
}

function rolloutCard(rollout) {
  const chip = (label, value, cls = "") => value == null || value === "" ? null : el("span", { class: "chip " + cls }, label ? `${label} ${typeof value === "number" ? number(value) : value}` : value);
  const parts = Object.entries(rollout.parts).map(([name, value]) => chip(name, value));
  const said = Object.entries(rollout.said).map(([name, text]) => el("div", {}, el("b", {}, name + ": "), text));
  return el("div", { class: "card" },
    chip("", rollout.status ?? "not scored", rollout.status === "ok" ? "good" : "bad"), chip("reward", rollout.reward), chip("gain", rollout.gain, rollout.gain > 0 ? "good" : rollout.gain < 0 ? "bad" : ""),
    ...parts, chip("tokens", rollout.length), chip("surprise", rollout.surprise), chip("lag", rollout.lag), chip("", rollout.finish), rollout.baseline ? chip("", "greedy baseline") : null,
    response(rollout), rollout.error ? el("pre", { class: "bad" }, rollout.error) : null, ...said,
    rollout.messages.length ? el("details", {}, el("summary", {}, `${rollout.messages.length} messages`), ...rollout.messages.map(([role, text]) => el("pre", {}, el("b", {}, role + ": "), text))) : null,
    el("div", { class: "dim" }, rollout.name));
}

function browser() {
  const found = el("div", { id: "found" }), count = el("span", { class: "dim" });
  const samples = RUNS.flatMap(run => (run.samples || []).map(group => ({ run, ...group })));
  const choice = (name, options) => el("select", { id: "by-" + name, onchange: e => set({ [name]: e.target.value, shown: "6" }, show) }, ...options.map(([value, label]) => el("option", { value, ...(state[name] === value ? { selected: "" } : {}) }, label)));
  const distinct = of => [["", "any"], ...[...new Set(samples.flatMap(of))].sort().map(value => [value, value])];
  const bar = el("div", { id: "filters" },
    "sort by ", choice("sort", Object.entries(ORDERS).map(([name, [label]]) => [name, label])), " status ", choice("status", distinct(g => g.rollouts.map(r => r.status ?? "not scored"))),
    " source ", choice("source", distinct(g => [g.source])), " colour ", choice("colour", [["probability", "probability"], ["version", "version"]]),
    " ", el("input", { id: "by-text", type: "search", placeholder: "text in prompt or response", value: state.text, oninput: e => set({ text: e.target.value, shown: "6" }, show) }), " ", count);

  function show() {
    const by = ORDERS[state.sort]?.[1] ?? ORDERS.newest[1], key = r => by(r) ?? -Infinity, text = state.text.toLowerCase();
    const kept = samples.filter(g => visible(g.run) && (!state.source || g.source === state.source)).map(g => ({
      ...g, rollouts: g.rollouts.filter(r => (!state.status || (r.status ?? "not scored") === state.status) && (!text || g.prompt.toLowerCase().includes(text) || r.response.toLowerCase().includes(text))).sort((a, b) => (key(b) > key(a)) - (key(b) < key(a))),
    })).filter(g => g.rollouts.length);
    kept.sort((a, b) => (key(b.rollouts[0]) > key(a.rollouts[0])) - (key(b.rollouts[0]) < key(a.rollouts[0])));
    count.textContent = `${kept.length} of ${samples.length} groups`;
    found.replaceChildren(...kept.slice(0, +state.shown).map(groupCard), kept.length > +state.shown ? el("button", { onclick: () => set({ shown: String(+state.shown + 12) }, show) }, "more") : "");
  }

  const groupCard = group => el("div", { class: "group" }, el("h3", {}, RUNS.length > 1 ? named(group.run) : null, ` group ${group.group}`, el("span", { class: "note" }, [group.why, group.outcome ?? "pending", group.update == null ? "" : `update ${group.update}`, group.source].filter(Boolean).join(", "))),
    el("pre", {}, group.prompt), group.truth ? el("div", { class: "dim" }, "ground truth: " + group.truth) : null, el("div", { class: "side" }, ...group.rollouts.map(rolloutCard)));
  show();
  return el("div", {}, el("p", { class: "dim" }, DATA.picked), bar, el("p", { class: "dim" }, state.colour === "version" ? "" : "Background: red, unlikely; green, certain. Hover for probabilities and versions."), found);
}

let scrolled = null;
build();
if (DATA.renew_s) {
  try { scrolled = sessionStorage.getItem("asyncrl-scroll"); sessionStorage.removeItem("asyncrl-scroll"); } catch { /* no storage: the page begins at its top */ }
  if (scrolled) requestAnimationFrame(() => scrollTo(0, +scrolled));
  setTimeout(() => {
    try { sessionStorage.setItem("asyncrl-scroll", String(scrollY)); } catch { /* as above */ }
    location.reload();
  }, 1000 * DATA.renew_s);
}
