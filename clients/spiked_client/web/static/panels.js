// Everything that is told once a second or seldom: rates, latency, losses, health, session, jobs, ledger, events.
import { colour, heat, unitColour } from "./colour.js";
import { $, facts, fill, hz, make, many, ms, say, sharp, table } from "./dom.js";
import { clock } from "./raster.js";

const ROW = 26; // css pixels of a row of the list of rates
const RECENT = 60; // health messages that "the last minute" of the latencies is made of

export class Rates {
  constructor(onChoose) {
    this.box = $("rates");
    this.space = make("div");
    this.box.append(this.space);
    this.ids = [];
    this.rates = {};
    this.chosen = -1;
    this.box.addEventListener("scroll", () => this.draw());
    this.box.addEventListener("click", (e) => { const r = e.target.closest(".row"); if (r) onChoose(Number(r.dataset.unit)); });
    this.box.addEventListener("keydown", (e) => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[e.key];
      if (!by || !this.ids.length) return;
      e.preventDefault();
      const k = Math.min(Math.max(this.ids.indexOf(this.chosen) + by, 0), this.ids.length - 1);
      this.box.scrollTop = Math.max(Math.min(this.box.scrollTop, k * ROW), (k + 1) * ROW - this.box.clientHeight);
      onChoose(this.ids[k]);
    });
    $("rateorder").addEventListener("change", () => { this.box.scrollTop = 0; this.sort(); });
  }

  setUnits(ids) { this.all = Array.from(ids); this.sort(); }

  setFigures(f) {
    this.rates = f.rates_hz;
    say($("ratesums"), `${(this.all || []).length} units ${hz(f.spikes_hz)} Hz, unsorted detections ${hz(f.detections_hz)} Hz`);
    this.sort();
  }

  sort() {
    const byRate = $("rateorder").value === "rate";
    this.ids = (this.all || []).slice().sort((a, b) => (byRate ? (this.rates[b] || 0) - (this.rates[a] || 0) : 0) || a - b);
    this.top = Math.max(...this.ids.map((u) => this.rates[u] || 0), 1);
    this.box.style.height = this.ids.length < 12 ? `${Math.max(this.ids.length, 2) * ROW + 2}px` : "";
    this.draw();
  }

  draw() {
    // only the rows in view exist
    this.space.style.height = `${this.ids.length * ROW}px`;
    const from = Math.max(Math.floor(this.box.scrollTop / ROW) - 2, 0), to = Math.min(from + Math.ceil(this.box.clientHeight / ROW) + 4, this.ids.length);
    while (this.space.children.length > to - from) this.space.lastChild.remove();
    while (this.space.children.length < to - from) {
      this.space.append(make("div", { class: "row", role: "option" }, make("span", { class: "dot" }), make("span", { class: "name" }), make("span", { class: "barbox" }, make("i")), make("span", { class: "hz" })));
    }
    for (let k = from; k < to; k++) {
      const row = this.space.children[k - from], unit = this.ids[k], rate = this.rates[unit] || 0, [dot, name, bar, value] = row.children;
      row.style.top = `${k * ROW}px`;
      row.classList.toggle("chosen", unit === this.chosen);
      row.setAttribute("aria-selected", unit === this.chosen);
      if (row.dataset.unit !== String(unit) || !dot.style.background) { row.dataset.unit = unit; dot.style.background = bar.firstChild.style.background = unitColour(unit); }
      say(name, String(unit));
      say(value, `${hz(rate)} Hz`);
      bar.firstChild.style.width = `${100 * rate / this.top}%`;
    }
  }
}

export class Latency {
  constructor() {
    this.canvas = make("canvas", { "aria-label": "how many spikes took how long, last minute" });
    this.says = make("p", { class: "num" });
    fill($("latency"), this.says, this.canvas);
    this.kept = [];
  }

  reset() { this.kept = []; }

  setLive(live) {
    const stages = live && live.stages && live.stages.spike ? live.stages : null;
    const whole = live ? live.latency_ms : null;
    fill(this.says, ...(whole && whole.n ? [
      make("b", {}, `${ms(whole.p50)} ms`), " in the middle, ", make("b", {}, `${ms(whole.p99)} ms`), ` for 99 of 100, at most ${ms(whole.max)} ms; ${many(whole.n)} spikes of this session`,
    ] : ["No sorted spikes yet."]));
    this.canvas.hidden = !stages || !(whole && whole.n);
    if (this.canvas.hidden) return;
    const now = stages.spike.n;
    if (this.kept.length && now.some((v, k) => v < this.kept.at(-1)[k])) this.reset(); // counted anew
    this.kept.push(now);
    if (this.kept.length > RECENT) this.kept.shift();
    this.edges = stages.edges_ms;
    this.draw(now.map((v, k) => v - (this.kept.length > 1 ? this.kept[0][k] : 0)));
  }

  draw(counts) {
    const [c, w, h, r] = sharp(this.canvas), total = counts.reduce((a, b) => a + b, 0);
    const last = Math.max(counts.findLastIndex((v) => v > 0), 8) + 1, first = Math.min(Math.max(counts.findIndex((v) => v > 0) - 1, 0), 6), n = last - first + 1;
    const top = Math.max(...counts, 1), foot = 30 * r, bar = w / n;
    c.font = `${10 * r}px system-ui, sans-serif`;
    c.textAlign = "center";
    const every = Math.max(Math.ceil(34 * r / bar), 1);
    for (let k = first; k <= last && k < counts.length; k++) {
      const x = (k - first) * bar, high = counts[k] / top * (h - foot - 4 * r), edge = this.edges[k];
      c.fillStyle = edge === undefined || edge > 50 ? colour("bad") : edge > 10 ? colour("unsure") : colour("accent");
      c.fillRect(x + bar * 0.06, h - foot - high, bar * 0.88, Math.max(high, counts[k] ? 1.5 * r : 0));
      c.fillStyle = colour("soft");
      if ((k - first) % every === 0 && edge !== undefined) { c.fillRect(x + bar, h - foot, 1, 3 * r); c.fillText(String(edge), x + bar, h - foot + 14 * r); }
    }
    c.fillStyle = colour("line");
    c.fillRect(0, h - foot, w, 1);
    c.fillStyle = colour("soft");
    c.textAlign = "right";
    c.fillText(`ms; ${many(total)} spikes of the last minute`, w, h - 3 * r);
  }
}

export function losses(stream, gaps, about, figures) {
  const time = (s) => clock((s - (about ? about.first_sample || 0 : 0)) / (about ? about.fs_hz : 1));
  const fs = about ? about.fs_hz : 1, live = (stream.processes || {}).live || {}, blind = live.blind || {};
  const reasons = Object.entries(blind.samples || {}).filter(([, n]) => n / fs >= 0.005).map(([why, n]) => `${why} ${(n / fs).toFixed(n / fs < 10 ? 2 : 0)} s`);
  const skipped = live.counters ? live.counters.skipped_samples : 0;
  fill($("losses"),
    facts([
      ["samples that never arrived", stream.gaps ? `${many(stream.gap_samples)} in ${stream.gaps} ${stream.gaps === 1 ? "gap" : "gaps"}` : "none", stream.gaps ? "warn" : "good"],
      ["blind in the last seconds", figures ? `${(100 * figures.blind).toFixed(1)} %` : "", figures && figures.blind > 0.05 ? "warn" : ""],
      ["blind in this session", reasons.join(", ") || (blind.samples ? "never" : "")],
      ["given up to catch up", skipped ? `${many(skipped)} samples` : "", "bad"],
      ["behind", live.behind !== undefined ? `${ms(1000 * live.behind / fs)} ms` : ""],
      ["lost on the way to this page", figures && figures.lost ? `${many(figures.lost)} messages` : "", "warn"],
    ]),
    gaps.length ? make("div", { class: "scroll tall small" }, table([["at"], ["samples"], ["ms"], ["electrodes"], ["why", true]],
      gaps.slice(-50).reverse().map(([a, b, n, why]) => [time(a), b - a, ms(1000 * (b - a) / fs), n || "all", why]))) : null);
}

export function health(state) {
  fill($("alarms"), ...(state.alarms || []).map((a) => make("div", { class: `alarm is-${a.level}` }, make("b", { title: a.about }, `${a.figure.replaceAll("_", " ")}${a.stream ? ` (${a.stream}${a.process ? ` ${a.process}` : ""})` : ""}: `), String(a.judged_by === "p99" ? `99th percentile ${ms(a.value)}` : +a.value.toPrecision(4)), make("br"), ...rich(a.todo || ""))),
    (state.alarms || []).length ? null : make("p", { class: "good" }, "All figures are within their limits."));
  const gpus = (state.gpus || []).map((g) => `${g.name || `GPU ${g.index}`}${g.busy_ratio !== undefined ? ` ${(100 * g.busy_ratio).toFixed(0)} % busy` : ""}${g.memory_mb ? `, ${(g.memory_used_mb / 1024).toFixed(1)} of ${(g.memory_mb / 1024).toFixed(0)} GB` : ""}${g.celsius ? `, ${g.celsius} °C` : ""}`);
  const hours = state.disk_hours_left;
  const rows = [];
  for (const [name, s] of Object.entries(state.streams || {}))
    for (const [role, p] of Object.entries(s.processes || {}))
      rows.push([Object.keys(state.streams).length > 1 ? `${name} ${role}` : role, (s.pids || {})[role] ? make("span", { class: "good" }, "runs") : make("span", { class: "warn" }, "ended"), (s.lives || {})[role] || 0,
        state.cpu && state.cpu[`${name}.${role}`] !== undefined ? `${state.cpu[`${name}.${role}`].toFixed(0)} s` : "", ring(s, role)]);
  fill($("machine"), facts([
    ["disk free", state.disk_free_gb !== undefined ? `${state.disk_free_gb} GB${hours ? `, for ${hours.toFixed(hours < 10 ? 1 : 0)} h` : ""}` : ""],
    ["GPU", gpus.join("; ") || "none"],
    ["clocks", clocks(state).join("; ")],
  ]), rows.length ? make("div", { class: "scroll" }, table([["process", true], ["", true], ["restarts"], ["CPU"], ["ring"]], rows)) : null);
}

function clocks(state) {
  // how fast each device's clock runs, and where it stands against the first stream's
  return Object.entries(state.streams || {}).flatMap(([name, s]) => {
    const own = ((s.processes || {}).acquire || {}).clock || {}, k = s.clock || {};
    const ppm = k.computer_ppm ?? ((own.ppm_error ?? 99) < 20 ? own.ppm : null);
    const aligned = ["pulses", "arrival"].includes(k.method) && k.error_ms !== undefined ? `aligned to ${ms(k.error_ms)} ms by ${k.method}` : "";
    const rate = ppm === null || ppm === undefined ? "" : `${ppm > 0 ? "+" : ""}${Number(ppm).toFixed(1)} ppm`;
    return rate || aligned ? [`${name} ${[rate, aligned].filter(Boolean).join(", ")}`] : [];
  });
}

function rich(text) {
  // what stands in `backticks` is a command or a key
  return text.split("`").map((part, k) => (k % 2 ? make("code", {}, part) : part));
}

function ring(s, role) {
  const r = ((s.processes || {}).acquire || {}).ring;
  return r && r.behind && r.behind[role] !== undefined && r.capacity ? `${(100 * r.behind[role] / r.capacity).toFixed(1)} %` : "";
}

export function session(state, may, stream) {
  const running = ["starting", "recording", "stopping"].includes(state.state);
  const calibrations = Object.entries(state.streams || {}).map(([n, s]) => [n, s.calibration]).filter(([, c]) => c && ["collecting", "calculating", "failed"].includes(c.state));
  fill($("session"), facts([
    ["session", state.session || "none"],
    ["state", state.state],
    ["error", state.error, "bad"],
    ["recorded", Object.entries(state.streams || {}).map(([n, s]) => `${n} ${clock(s.fs_hz ? s.samples / s.fs_hz : 0)} of ${s.channels || "?"} electrodes`).join(", ")],
  ]), ...calibrations.map(([n, c]) => make("div", {}, make("p", { class: c.state === "failed" ? "bad small" : "small" }, `${n}: calibration ${c.state}${c.stage && c.stage !== c.state ? `, ${c.stage}` : ""}`), c.state === "failed" ? null : make("progress", { value: c.fraction ?? 0, max: 1 }))));
  const of = (state.streams || {})[stream] || {}, calibrating = ["collecting", "calculating"].includes((of.calibration || {}).state);
  const can = {
    start_session: !["starting", "recording", "stopping", "finalizing"].includes(state.state), stop_session: running,
    calibrate: state.state === "recording" && !!(of.processes || {}).live && !calibrating, cancel_calibration: state.state === "recording" && calibrating,
  };
  for (const b of document.querySelectorAll("#actions button")) b.disabled = !may.has(b.dataset.op) || !can[b.dataset.op];
  for (const e of $("mark").elements) e.disabled = !may.has("mark_stim") || state.state !== "recording";
}

export function jobs(rows, may, onDo) {
  if (!rows.length) { fill($("jobs"), make("p", { class: "soft" }, "\u00a0none")); return; }
  const button = (op, r, says) => (may.has(op) ? make("button", { onclick: () => onDo(op, { job: r.id }, op === "cancel_job" ? `Give up job ${r.id}, ${r.name}?` : "") }, says) : "");
  fill($("jobs"), table([["job"], ["session", true], ["state", true], ["", true]], rows.slice().reverse().slice(0, 30).map((r) => [
    r.id, make("span", { class: "wrap" }, r.name), make("span", { class: "wrap" }, r.state === "running" && !r.stale ? `${(100 * r.overall).toFixed(0)} % ${r.stage}` : `${r.stale ? "stale" : r.state}${r.text && r.state !== "done" ? `: ${r.text.slice(0, 80)}` : ""}`),
    ["queued", "running"].includes(r.state) ? button("cancel_job", r, "Cancel") : ["failed", "cancelled"].includes(r.state) ? button("retry_job", r, "Retry") : "",
  ])));
}

export function armed(triggers) {
  const streams = Object.entries((triggers && triggers.streams) || {});
  const rows = streams.flatMap(([n, t]) => (t.triggers || []).map((r) => [streams.length > 1 ? `${n}: ${r.name}` : r.name, r.when, (r.units || []).join(" "), r.output || "records only", r.pattern, r.refractory_ms ? `${r.refractory_ms} ms` : "", (t.armed || []).includes(r.name) ? make("b", { class: "warn" }, "armed") : "not armed"]));
  fill($("armed"), rows.length ? make("div", { class: "scroll" }, table([["rule", true], ["when", true], ["units", true], ["output", true], ["pattern", true], ["refractory"], ["", true]], rows)) : make("p", { class: "soft" }, streams.length ? "No rules are set." : "No session, or no live process."));
}

export function ledger(rows, about) {
  const only = $("sentonly").checked;
  const shown = rows.filter((r) => !only || r[3] === "sent").sort((a, b) => b[0] - a[0]).slice(0, 100);
  const first = about ? about.first_sample || 0 : 0, fs = about ? about.fs_hz : 1;
  fill($("ledger"), shown.length ? table(
    [["no."], ["at"], ["rule", true], ["pattern", true], ["outcome", true], ["units", true], ["decided, ms"], ["sent"], ["acknowledged"], ["artifact after sending"], ["µA"], ["µs"]],
    shown.map(([number, rule, pattern, outcome, reason, sample, decided, sent, ack, seen, ua, us, units]) => [
      number, clock((sample - first) / fs), rule || "a client", pattern, make("span", { class: { sent: "good", failed: "bad", refused: "warn" }[outcome] || "soft" }, reason ? `${outcome}: ${reason}` : outcome), units.join(" "), ms(decided), ms(sent), ms(ack), seen === null ? "" : ms(seen), ua, us,
    ])) : make("p", { class: "soft" }, "\u00a0no decisions yet"));
}

export function events(rows) {
  if (!rows.length) { fill($("events"), make("li", { class: "soft" }, "none since this page's server runs")); return; }
  fill($("events"), ...rows.slice(-60).reverse().map((e) => {
    const rest = Object.entries(e).filter(([k, v]) => !["at", "event", "text", "process", "level", "session", "state", "armed", "stopped"].includes(k) && typeof v !== "object").map(([k, v]) => `${k} ${v}`).join(", ");
    const what = e.event === "alarm" ? `${e.figure.replaceAll("_", " ")}${e.process ? ` (${e.process})` : ""} ${e.level === "good" ? "is good again" : `is ${+Number(e.value).toPrecision(4)}: ${e.level}`}` : e.text || [e.event, e.state, rest].filter(Boolean).join(" ");
    return make("li", { class: e.event === "error" || ["error", "bad"].includes(e.level) ? "bad" : e.event === "restart" || e.event === "gap" || e.level === "warning" ? "warn" : "" },
      make("time", {}, new Date(1000 * e.at).toLocaleTimeString()), `${e.stream ? `${e.stream}: ` : ""}${what}`);
  }));
}

export function scale(canvas, top) {
  const c = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) { c.fillStyle = heat(0.62 * x / canvas.width); c.fillRect(x, 0, 1, canvas.height); }
  say($("scalesays"), `0 to ${hz(top)} Hz per electrode`);
}
