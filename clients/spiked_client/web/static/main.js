import { ArrayMap } from "./map.js";
import { colour } from "./colour.js";
import { $, hz, make, many, say, sure, toast } from "./dom.js";
import { ask, Link } from "./link.js";
import * as panels from "./panels.js";
import { clock, Raster } from "./raster.js";
import { Stop } from "./stop.js";
import { sorts, Streams } from "./streams.js";
import { UnitView } from "./unit.js";

const FRAME_MS = 1000 / 31; // thirty a second are enough, and a phone's battery is small
const STALE_MS = 3500;

const raster = new Raster($("raster")), map = new ArrayMap($("map")), view = new UnitView(raster, map), stop = new Stop(), latency = new panels.Latency();
const rates = new panels.Rates((u) => choose(u)), cards = new Streams((name) => show(name));
const me = { may: new Set(), role: null };
let state = {}, daemon = { daemon: false, problem: "" }, streams = {}, names = [], current = "", triggers = null, jobRows = [], eventRows = [], touched = false, heardFrame = 0;
const drawn = { frames: 0, ms: [], spikes: 0, since: performance.now(), dropped: 0 };
const of = (name) => (streams[name] ??= { gaps: [], stims: [], ledger: new Map(), units: null, about: null, figures: null, acts: {} });

// ---- who ---------------------------------------------------------------------------------------------------------

async function introduce() {
  // whether the page may connect
  let told;
  try { told = await ask("/me"); } catch { return true; }
  me.role = told.role;
  me.may = new Set(told.may);
  me.full = told.room === 0 && !link.open;
  const who = $("who");
  who.hidden = !told.tokens || !told.role;
  say(who, told.role ? `${told.name} (${told.role}), leave` : "");
  if (told.role) { if ($("login").open) $("login").close(); return true; }
  if (!$("login").open) $("login").showModal();
  return false;
}

async function login(token) {
  try {
    await ask("/login", { token });
    say($("loginsays"), "");
    $("token").value = "";
    if (await introduce()) link.connect();
  } catch (e) {
    say($("loginsays"), e.message);
    if (!$("login").open) $("login").showModal();
  }
}
$("loginform").addEventListener("submit", (e) => { e.preventDefault(); login($("token").value.trim()); });
$("login").addEventListener("cancel", (e) => e.preventDefault());
$("who").addEventListener("click", async () => { await ask("/logout", {}); location.reload(); });

// ---- what comes --------------------------------------------------------------------------------------------------

const heard = {
  link(m) { daemon = m; honest(); },
  session(m) { if (m.session !== state.session) forget(); },
  state(m) {
    if (state.session && m.session !== state.session) forget();
    state = m;
    header();
    panels.health(m);
    panels.session(m, me.may, current);
    tellStream();
    hearStop();
  },
  streams(m) {
    for (const about of m.rows) {
      const s = of(about.name), key = JSON.stringify(about);
      if (s.key !== key) Object.assign(s, { key, about }); // else what is drawn stays
    }
    const box = $("stream"), first = (n) => sorts((state.streams || {})[n] || {}); // a stream of digital lines has no spikes
    names = m.rows.map((r) => r.name);
    if (Array.from(box.options, (o) => o.value).join() !== names.join()) box.replaceChildren(...names.map((n) => make("option", { value: n }, n)));
    $("which").hidden = names.length < 2;
    const linked = new URLSearchParams(location.hash.slice(1)).get("stream");
    if (!names.includes(current) && names.length) show(names.includes(linked) ? linked : names.find(first) || names[0]);
    else if (current) settle();
    $("stream").value = current;
    nameThem();
    tellStream();
  },
  units(m) {
    of(m.stream).units = m;
    if (m.stream === current) useUnits();
  },
  gaps(m) {
    const s = of(m.stream);
    s.gaps = [...s.gaps, ...m.rows].slice(-500);
    if (m.stream === current) raster.addGaps(m.rows);
  },
  stim(m) {
    const s = of(m.stream);
    s.stims = [...s.stims, ...m.rows].slice(-2000);
    if (m.stream === current) raster.addStims(m.rows);
  },
  ledger(m) {
    const s = of(m.stream);
    const marks = m.rows.filter((r) => r.at(-1) >= 0 && !((s.ledger.get(r[0]) || []).at(-1) >= 0)).map((r) => [r.at(-1), 2, 0, 1]);
    for (const r of m.rows) s.ledger.set(r[0], r);
    heard.stim({ stream: m.stream, rows: marks });
    while (s.ledger.size > 500) s.ledger.delete(Math.min(...s.ledger.keys()));
    if (m.stream === current) ledgerDue = true;
  },
  figures(m) {
    for (const [name, f] of Object.entries(m.streams)) of(name).figures = f;
    tellFigures();
    view.poll();
  },
  triggers(m) { triggers = m; panels.armed(m); },
  jobs(m) { jobRows = m.rows; panels.jobs(jobRows, me.may, act); },
  events(m) { eventRows = m.rows; panels.events(eventRows); },
  event({ row }) {
    if (row.event === "act" && row.stream && row.stopped !== undefined) { of(row.stream).acts = { stopped: row.stopped, at: performance.now() }; hearStop(); }
    if (row.event === "calibration" || row.fraction !== undefined) return;
    eventRows = [...eventRows, row].slice(-60);
    panels.events(eventRows);
  },
};
let ledgerDue = false;

function onFrame(f) {
  const about = of(current).about;
  if (f.kind !== 1 || !about || f.stream !== about.number) return;
  if (!f.old) heardFrame = performance.now();
  raster.addFrame(f);
  map.addFrame(f);
  drawn.spikes += f.n;
  const dropped = f.tooSlow + f.leftOut;
  drawn.dropped += dropped;
  if (dropped) say($("dropped"), `this page is too slow: ${many(drawn.dropped)} spikes were not drawn`);
}

const link = new Link((m) => { (heard[m.t] || (() => {}))(m); }, onFrame, () => { if (link.open) again(); honest(); }, introduce);

function again() {
  // a new connection tells everything anew
  streams = {};
  raster.setStream(null);
  map.setStream(null);
}

function forget() {
  again();
  rates.setUnits([]);
  view.choose("", -1);
  latency.reset();
  triggers = null;
  touched = false;
  ledgerDue = true;
}

const live = () => ((((state.streams || {})[current] || {}).processes || {}).live);

function show(name) {
  current = name;
  $("stream").value = name;
  if (names.length > 1) history.replaceState(null, "", `#stream=${encodeURIComponent(name)}`); // so that it can be loaded again, or sent to somebody
  view.choose(name, -1);
  raster.selected = map.selected = rates.chosen = map.electrode = -1;
  say($("mapsays"), "");
  pause(false);
  heardFrame = 0;
  latency.reset();
  link.choose(name);
  settle();
  nameThem();
  tellFigures();
  header();
  panels.session(state, me.may, current);
  tellStream();
}

function nameThem() {
  // whose panels and buttons these are, where that could be a question
  for (const e of document.querySelectorAll(".of")) say(e, names.length < 2 ? "" : ` ${e.dataset.of || ""}${current}`);
}

function tellStream() {
  // what the status says of the stream that is shown
  const s = (state.streams || {})[current];
  if (s) {
    latency.setLive((s.processes || {}).live);
    panels.losses(s, of(current).gaps, of(current).about, of(current).figures);
  }
  tellCards();
}

function tellCards() { cards.tell(names, state.streams || {}, Object.fromEntries(names.map((n) => [n, of(n).figures])), current); }

function tellFigures() {
  const f = of(current).figures;
  raster.rates = f ? f.rates_hz : {};
  raster.mua = f ? f.mua_hz : null;
  tellCards();
  if (!f) return;
  rates.setFigures(f);
  map.setFigures(f);
  panels.scale($("scale"), map.top);
  view.tell(f, live());
}

function settle() {
  // the stream's description is here
  const s = of(current);
  if (s.about === raster.about || !s.about) return;
  raster.setStream(s.about);
  map.setStream(s.about);
  useUnits();
  raster.addGaps(s.gaps);
  raster.addStims(s.stims);
  ledgerDue = true;
}

function useUnits() {
  const { units } = of(current);
  if (units) { raster.setUnits(units); map.setUnits(units); }
  rates.setUnits(units ? units.id : []);
  if (!touched) setMode(units && units.id.length ? "units" : "electrodes");
}

function hearStop() {
  const told = {};
  for (const [name, s] of Object.entries(state.streams || {})) {
    const a = ((s.processes || {}).live || {}).act;
    if (!a) continue;
    const newer = of(name).acts;
    told[name] = { armed: a.armed, stopped: newer.at && performance.now() - newer.at < 2500 ? newer.stopped : a.stopped };
  }
  stop.hear(told, fresh(), ["starting", "recording", "stopping"].includes(state.state), me.may);
}

// ---- honest about age --------------------------------------------------------------------------------------------

const fresh = () => link.open && performance.now() - link.heard < STALE_MS && daemon.daemon;

function honest() {
  const age = link.heard ? (performance.now() - link.heard) / 1000 : 0, pill = $("link"), banner = $("banner");
  const ok = fresh();
  document.body.classList.toggle("stale", !ok);
  let text = "";
  if (me.full && !link.open) text = "As many pages as there is room for are open already; close one. This one goes on trying.";
  else if (!link.heard) { if (performance.now() > 4000) text = "This page's server does not answer yet."; }
  else if (!link.open || age * 1000 > STALE_MS) text = `Not connected for ${age.toFixed(0)} s: what you see is that old. Trying again…${link.why ? ` (${link.why})` : ""}`;
  else if (!daemon.daemon) text = `The rig's daemon is not heard${daemon.age_s ? ` for ${daemon.age_s.toFixed(0)} s: what you see is that old` : ""}. ${daemon.problem || ""}`;
  banner.hidden = !text;
  say(banner, text);
  pill.className = `pill ${ok ? "on" : text ? "off" : ""}`;
  say(pill, ok ? "live" : link.heard ? `${Math.max(age, daemon.age_s || 0).toFixed(0)} s old` : "connecting");
  const quiet = ok && state.state === "recording" && heardFrame && performance.now() - heardFrame > 2500;
  const over = $("rastersays"), f = (state.streams || {})[current], calibration = f && f.calibration;
  let says = "";
  if (ok && !["recording", "stopping", "starting"].includes(state.state)) says = state.state === "idle" || !state.state ? "No session is running." : `No session is running; the last one is ${state.state}.`;
  else if (ok && f && ["lost", "failed"].includes(f.state)) says = `${current} is ${f.state}${f.error ? `: ${f.error}` : ""}`;
  else if (ok && f && f.samples && state.state === "recording" && !sorts(f)) says = `${current} is recorded, not sorted.`;
  else if (quiet) says = `Nothing was published for ${((performance.now() - heardFrame) / 1000).toFixed(0)} s.`;
  else if (ok && raster.mode === "units" && !raster.units.id.length) says = calibration && calibration.state !== "failed" ? `No units yet: calibration ${calibration.state} ${(100 * (calibration.fraction || 0)).toFixed(0)} %.` : "No units yet.";
  over.hidden = !says;
  if (over.dataset.says !== says) { over.dataset.says = says; over.replaceChildren(make("span", {}, says)); }
  hearStop();
}

function header() {
  say($("rig"), state.rig || "spiked");
  document.title = `${state.rig || "spiked"}: ${state.state || ""}`;
  const pill = $("state");
  say(pill, state.state || "…");
  pill.className = `pill ${state.state === "recording" ? "on" : state.state === "failed" ? "off" : ["starting", "stopping", "finalizing", "offline"].includes(state.state) ? "busy" : ""}`;
  const s = (state.streams || {})[current] || Object.values(state.streams || {})[0];
  say($("clock"), s && s.fs_hz ? clock(s.samples / s.fs_hz) : "");
}

// ---- what is asked for -------------------------------------------------------------------------------------------

async function act(op, fields = {}, question = "") {
  if (question && !(await sure(question, "Yes"))) return;
  try {
    await ask("/do", { op, ...fields });
    toast({ start_session: "Session starting", stop_session: "Session stopping", calibrate: "Calibration begins", cancel_calibration: "Calibration is given up", mark_stim: "Stimulus marked", cancel_job: "Job given up", retry_job: "Job queued" }[op] || "Done");
  } catch (e) {
    toast(e.message, true);
  }
}
const ofStream = ["calibrate", "cancel_calibration"];
for (const b of document.querySelectorAll("#actions button")) b.addEventListener("click", () => act(b.dataset.op, ofStream.includes(b.dataset.op) ? { stream: current } : {}, b.dataset.sure));
$("mark").addEventListener("submit", (e) => { e.preventDefault(); act("mark_stim", { stream: current, pattern: $("pattern").value.trim() || "by hand" }); });
$("sentonly").addEventListener("change", () => { ledgerDue = true; });

// ---- choosing ----------------------------------------------------------------------------------------------------

function choose(unit) {
  raster.selected = map.selected = rates.chosen = unit;
  map.electrode = -1;
  say($("mapsays"), "");
  view.choose(current, unit);
  view.tell(of(current).figures, live());
  view.poll();
  rates.draw();
}

function press(group, value) { for (const b of $(group).children) b.setAttribute("aria-pressed", b.dataset.v === value); }

function setMode(mode) {
  raster.mode = mode;
  raster.dirty = true;
  press("mode", mode);
}
$("mode").addEventListener("click", (e) => { if (e.target.dataset.v) { touched = true; setMode(e.target.dataset.v); } });
$("mapof").addEventListener("click", (e) => {
  if (!e.target.dataset.v) return;
  map.mode = e.target.dataset.v;
  press("mapof", map.mode);
  if (of(current).figures) { map.setFigures(of(current).figures); panels.scale($("scale"), map.top); }
});
$("order").addEventListener("change", (e) => { raster.order = e.target.value; raster.dirty = true; });
$("window").addEventListener("change", (e) => { raster.seconds = Number(e.target.value); raster.dirty = true; });
$("stream").addEventListener("change", (e) => show(e.target.value));
$("pause").addEventListener("click", () => pause(!raster.paused));
function pause(on) {
  raster.paused = on;
  $("pause").setAttribute("aria-pressed", on);
  say($("pause"), on ? "Go on" : "Pause");
}

function under(e) {
  const at = raster.at(e.clientX, e.clientY);
  if (!at) return null;
  if (raster.mode === "units") return { ...at, unit: at.id, says: `unit ${at.id}, ${hz(raster.rates[at.id] || 0)} Hz, at ${clock(at.seconds)}` };
  return { ...at, channel: at.id, says: `electrode ${raster.about.channel_ids[at.id]}, ${hz((raster.mua || [])[at.id] || 0)} Hz, at ${clock(at.seconds)}` };
}
const tip = $("tip");
$("raster").addEventListener("pointermove", (e) => {
  const u = e.pointerType === "mouse" ? under(e) : null;
  tip.hidden = !u;
  if (!u) return;
  say(tip, u.says);
  tip.style.left = `${Math.min(e.clientX + 14, innerWidth - 230)}px`;
  tip.style.top = `${e.clientY + 16}px`;
});
$("raster").addEventListener("pointerleave", () => { tip.hidden = true; });
$("raster").addEventListener("click", (e) => {
  const u = under(e);
  if (!u) return;
  if (u.unit !== undefined) choose(u.unit); else look(u.channel);
});
$("map").addEventListener("click", (e) => {
  if (!map.at) return;
  const { channel, units } = map.nearest(e.clientX, e.clientY);
  if (channel < 0) return;
  const next = units[(units.indexOf(map.selected) + 1) % units.length];
  if (units.length) choose(next);
  look(channel);
});
function look(channel) {
  map.electrode = channel;
  const f = of(current).figures, units = map.units.id.filter((_, k) => map.units.channel[k] === channel);
  say($("mapsays"), `electrode ${map.about.channel_ids[channel]}: ${f ? hz(f.mua_hz[channel] || 0) : "?"} Hz${units.length ? `, units ${units.join(" ")}` : ""}`);
}

// ---- frames ------------------------------------------------------------------------------------------------------

let last = performance.now(), due = 0;
function frame(now) {
  requestAnimationFrame(frame);
  if (now < due) return;
  due = Math.max(due + FRAME_MS, now + FRAME_MS / 4);
  const begun = performance.now(), dt = Math.min((begun - last) / 1000, 0.5);
  last = begun;
  raster.draw(dt);
  map.draw(dt);
  if (ledgerDue) { ledgerDue = false; panels.ledger(Array.from(of(current).ledger.values()), of(current).about); }
  drawn.frames++;
  drawn.ms.push(performance.now() - begun);
  if (drawn.ms.length > 600) drawn.ms.shift();
}
requestAnimationFrame(frame);
setInterval(honest, 500);

press("mapof", "mua");
press("mode", raster.mode);
// for `spiked bench web` and the tests
window.spiked = { drawn, raster, map, colour, state: () => state };

const token = new URLSearchParams(location.hash.slice(1)).get("token");
if (token) { history.replaceState(null, "", location.pathname); login(token); }
else introduce().then((may) => { if (may) link.connect(); });
