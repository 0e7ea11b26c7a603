// One unit: what is known of it, and its waveform, as the sorter has it and as it was just received.
import { colour, unitColour } from "./colour.js";
import { ask } from "./link.js";
import { $, facts, fill, hz, make, sharp } from "./dom.js";

const EVERY_MS = 1000;

export class UnitView {
  constructor(raster, map) {
    Object.assign(this, { raster, map });
    this.unit = -1;
    this.stream = "";
    this.asked = 0;
    this.figure = (says, flat) => {
      const canvas = make("canvas", flat ? { class: "flat" } : {});
      const caption = make("figcaption", {}, says);
      return { canvas, caption, all: make("figure", {}, canvas, caption) };
    };
    this.own = this.figure("");
    this.foot = this.figure("");
    this.drift = this.figure("", true);
    this.facts = make("div");
  }

  choose(stream, unit) {
    this.stream = stream;
    this.unit = unit;
    this.picture = null;
    this.asked = 0;
    this.map.foot = [];
    const marks = $("unitmarks");
    if (unit < 0) {
      $("unitname").textContent = "Unit";
      fill(marks);
      fill($("unit"), make("p", { class: "soft" }, "Choose a unit: in the raster, on the array or in the list."));
      return;
    }
    $("unitname").textContent = `Unit ${unit}`;
    const dot = make("span", { class: "dot" });
    dot.style.background = unitColour(unit);
    fill(marks, dot);
    fill($("unit"), this.facts, make("div", { class: "figs" }, this.own.all, this.foot.all), this.drift.all);
    this.tell(null, null);
  }

  async poll() {
    if (this.unit < 0 || document.hidden || performance.now() - this.asked < EVERY_MS) return;
    this.asked = performance.now();
    const { stream, unit } = this;
    try {
      const got = await ask(`/unit?stream=${encodeURIComponent(stream)}&unit=${unit}`);
      if (unit !== this.unit || stream !== this.stream) return;
      this.picture = got;
      this.draw();
    } catch { this.asked += 3000; }
  }

  tell(figures, live) {
    if (this.unit < 0) return;
    const { units } = this.raster, k = units.id.indexOf(this.unit);
    if (k < 0) { fill(this.facts, make("p", { class: "warn" }, "This unit is not in use any more.")); return; }
    const about = this.raster.about, channel = units.channel[k];
    const expected = Object.entries(units.expected || {}).filter(([, f]) => f.accuracy).map(([s, f]) => `${s.replace("_", "-")} ${(100 * f.accuracy[k]).toFixed(0)} %`);
    const sure = units.id_confidence ? units.id_confidence[k] : null;
    const doubtful = live && (live.doubtful || []).includes(this.unit);
    fill(this.facts, facts([
      ["rate", figures ? `${hz(figures.rates_hz[this.unit] || 0)} Hz (${hz(units.hz[k])} Hz when calibrated)` : ""],
      ["amplitude", `${units.uv[k].toFixed(0)} µV on electrode ${about ? about.channel_ids[channel] : channel}`],
      ["place", about && about.geometry_known ? `x ${units.x[k]}, y ${units.y[k]} µm` : "no probe map"],
      ["accuracy to expect", expected.join(", ")],
      ["the same cell as before", sure ? `${(100 * sure).toFixed(0)} % sure` : ""],
      ["warning", doubtful ? "no longer looks as calibrated; calibrate again before relying on it" : "", "bad"],
    ]));
  }

  draw() {
    const p = this.picture;
    if (!p || this.unit < 0) return;
    const waves = p.spikes && p.spikes.n ? p.spikes : null;
    this.drawOwn(p, waves);
    this.drawFoot(p, waves);
    this.drawDrift();
  }

  drawOwn(p, waves) {
    const [c, w, h, r] = sharp(this.own.canvas);
    if (!waves) {
      this.own.caption.textContent = p.template && p.template.kind === "sequences" ? "No spikes in the last seconds." : "No spikes in the last seconds; the template is on the right.";
      return;
    }
    const all = waves.single_uv.flat(), top = Math.max(...all, 20), low = Math.min(...all, -20);
    const n = waves.typical_uv[0].length, left = 34 * r;
    const X = (i) => left + i / (n - 1) * (w - left - 4 * r), Y = (v) => 6 * r + (top - v) / (top - low) * (h - 22 * r);
    const step = [20, 50, 100, 200, 500, 1000].find((s) => (top - low) / s < 6) || 2000;
    c.font = `${10 * r}px system-ui, sans-serif`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (let v = Math.ceil(low / step) * step; v <= top; v += step) {
      c.fillStyle = colour("line");
      c.fillRect(left, Y(v), w - left, 1);
      c.fillStyle = colour("soft");
      c.fillText(String(v), left - 4 * r, Y(v));
    }
    c.textAlign = "center";
    for (let t = -Math.floor(waves.before / p.fs_hz * 1000); t <= (n - waves.before) / p.fs_hz * 1000; t++) c.fillText(`${t}`, X(waves.before + t * p.fs_hz / 1000), h - 6 * r);
    const line = (values, width, alpha) => {
      c.beginPath();
      values.forEach((v, i) => (i ? c.lineTo(X(i), Y(v)) : c.moveTo(X(i), Y(v))));
      c.globalAlpha = alpha;
      c.lineWidth = width * r;
      c.stroke();
      c.globalAlpha = 1;
    };
    c.strokeStyle = unitColour(this.unit);
    for (const trace of waves.single_uv) line(trace, 0.8, 0.3);
    c.strokeStyle = colour("ink");
    line(waves.typical_uv[0], 2, 1);
    this.own.caption.textContent = `Last ${waves.n} spikes as received and their median, on its own electrode; µV over ms.`;
  }

  drawFoot(p, waves) {
    const [c, w, h, r] = sharp(this.foot.canvas);
    const t = p.template && p.template.uv ? p.template : null;
    const channels = waves ? waves.channels : t ? t.channels : p.template ? p.template.channels : [];
    const about = this.raster.about;
    if (!about || !channels || !channels.length) { this.foot.caption.textContent = ""; return; }
    const xy = channels.map((k) => about.positions_um[k]);
    const distinct = (a) => Array.from(new Set(a.map((v) => Math.round(v)))).sort((x, y) => x - y);
    const xs = distinct(xy.map((q) => q[0])), ys = distinct(xy.map((q) => q[1]));
    const wide = w / xs.length * 0.92, tall = 0.84 * h / ys.length;
    const place = ([x, y]) => [(xs.indexOf(Math.round(x)) + 0.5) * w / xs.length, 0.86 * h - (ys.indexOf(Math.round(y)) + 0.5) * tall];
    this.map.foot = channels;
    const paint = (rows, style, width) => {
      const peak = Math.max(...rows.flat().map(Math.abs), 1), scale = Math.min(tall * 1.5, h * 0.4) / (2 * peak);
      c.strokeStyle = style;
      c.lineWidth = width * r;
      rows.forEach((row, k) => {
        const [X, Y] = place(xy[k]);
        c.beginPath();
        row.forEach((v, i) => c[i ? "lineTo" : "moveTo"](X - wide / 2 + i / (row.length - 1) * wide, Y - v * scale));
        c.stroke();
      });
    };
    if (t && waves) {
      const of = new Map(t.channels.map((k, i) => [k, i]));
      paint(channels.map((k) => (of.has(k) ? around(t.uv[of.get(k)], t.before, waves.before, waves.typical_uv[0].length) : [0, 0])), colour("soft"), 0.9);
    }
    if (waves) paint(waves.typical_uv, unitColour(this.unit), 1.6);
    else if (t) paint(t.uv, unitColour(this.unit), 1.6);
    else this.dots(c, place, xy, p.template, r);
    this.foot.caption.textContent = waves ? `Their median on ${channels.length} electrodes${t ? "; grey: the template, filtered, to its own scale" : ""}.`
      : t ? "The template, filtered." : "Amplitude in noise SDs per electrode, and how much later.";
  }

  dots(c, place, xy, sequence, r) {
    // RT-Sort knows no waveform: how strong and how late on each electrode
    if (!sequence || !sequence.sd) return;
    const peak = Math.max(...sequence.sd, 1);
    c.font = `${9 * r}px system-ui, sans-serif`;
    c.textAlign = "center";
    xy.forEach((q, k) => {
      const [X, Y] = place(q);
      c.beginPath();
      c.arc(X, Y, (2 + 9 * sequence.sd[k] / peak) * r, 0, 7);
      c.fillStyle = unitColour(this.unit);
      c.fill();
      c.fillStyle = colour("soft");
      c.fillText(`${sequence.latency_ms[k] > 0 ? "+" : ""}${sequence.latency_ms[k].toFixed(2)}`, X, Y + 20 * r);
    });
  }

  drawDrift() {
    const [c, w, h, r] = sharp(this.drift.canvas), seconds = 60, { raster } = this;
    const points = Array.from(raster.spikesOf(this.unit, seconds));
    this.drift.caption.textContent = `Amplitude of each spike in the last minute; µV.`;
    if (!points.length) return;
    const low = Math.min(...points.map((q) => q[1]), 0) * 1.1, top = Math.max(...points.map((q) => q[1]), 0);
    const left = 34 * r, end = raster.stop;
    c.font = `${10 * r}px system-ui, sans-serif`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const v of [0, Math.round(low / 2), Math.round(low)]) {
      const y = 6 * r + (top - v) / (top - low) * (h - 12 * r);
      c.fillStyle = colour("line");
      c.fillRect(left, y, w - left, 1);
      c.fillStyle = colour("soft");
      c.fillText(String(v), left - 4 * r, y);
    }
    c.fillStyle = unitColour(this.unit);
    for (const [s, v] of points) c.fillRect(left + (1 - (end - s) / raster.fs / seconds) * (w - left) - r, 6 * r + (top - v) / (top - low) * (h - 12 * r) - r, 2.4 * r, 2.4 * r);
  }
}

function around(wave, before, wantedBefore, length) {
  // a waveform cut or lengthened so that its trough lies where the other's does
  return Array.from({ length }, (_, i) => wave[i - wantedBefore + before] ?? 0);
}
