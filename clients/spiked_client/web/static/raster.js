// The raster: a ring of pixel columns into which only what is new is painted; drawing it is two copies.
import { colour, dark, pixel, rgb, unitPixel } from "./colour.js";

const KEEP = 1 << 19; // spikes that are kept to paint the raster anew
const KEEP_SPANS = 3000;
const AHEAD_S = 1.1;
const GUTTER = 46, FOOT = 18; // css pixels

export class Raster {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.mode = "units";
    this.order = "id";
    this.seconds = 10;
    this.selected = -1;
    this.rates = {};
    this.painted = 0;
    this.setStream(null);
    new ResizeObserver(() => { this.dirty = true; }).observe(canvas);
    dark.addEventListener("change", () => { this.dirty = true; });
  }

  setStream(about) {
    this.about = about;
    this.fs = about ? about.fs_hz : 1;
    this.units = { id: [], channel: [], x: [], y: [] };
    this.sample = new Float64Array(KEEP);
    this.unit = new Int32Array(KEEP);
    this.channel = new Uint16Array(KEEP);
    this.uv = new Int16Array(KEEP);
    this.count = 0; // ever
    this.spans = []; // start, stop, channel, what
    this.marks = [];
    this.stop = 0; // looked at until
    this.shown = 0; // the right edge
    this.dirty = true;
  }

  setUnits(units) { this.units = units; this.dirty = true; }

  addFrame(f) {
    if (!this.stop) this.dirty = true; // now there is a present, in which gaps and marks have their places
    for (let k = 0; k < f.m; k++) this.addSpan(f.blindStart[k], f.blindStop[k], f.blindChannel[k], f.blindReason[k] === 4 ? "unknown" : f.blindReason[k] === 0 ? "gap" : "blind");
    for (let k = 0; k < f.n; k++) {
      const i = this.count++ % KEEP;
      this.sample[i] = f.base + f.offset[k];
      this.unit[i] = f.unit[k];
      this.channel[i] = f.channel[k];
      this.uv[i] = f.uv[k];
      if (!this.dirty) this.paintSpike(i);
    }
    if (f.stop < this.stop - 5 * this.fs) this.dirty = true; // another life of the stream
    this.stop = f.stop > this.stop - 5 * this.fs ? Math.max(this.stop, f.stop) : f.stop;
  }

  addSpan(start, stop, channel, what) {
    const last = this.spans.at(-1);
    if (last && last[1] === start && last[2] === channel && last[3] === what) last[1] = stop; // goes on
    else this.spans.push([start, stop, channel, what]);
    if (this.spans.length > KEEP_SPANS) this.spans.splice(0, KEEP_SPANS / 4);
    if (!this.dirty && this.stop) this.paintSpan([start, stop, channel, what]);
  }

  addGaps(rows) { for (const [start, stop, , reason] of rows) if (stop > start && reason !== "partial") this.addSpan(start, stop, -1, "gap"); }

  addStims(rows) {
    for (const [sample, , , state] of rows) {
      if (!state) continue;
      this.marks.push(sample);
      if (!this.dirty && this.stop) this.paintMark(sample);
    }
    if (this.marks.length > 2000) this.marks.splice(0, 500);
  }

  // ---- geometry -------------------------------------------------------------------------------------------

  layOut() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    const box = this.canvas.getBoundingClientRect();
    this.ratio = ratio;
    this.canvas.width = Math.max(Math.round(box.width * ratio), 50);
    this.canvas.height = Math.max(Math.round(box.height * ratio), 50);
    this.left = Math.round(GUTTER * ratio);
    this.w = this.canvas.width - this.left;
    this.h = this.canvas.height - Math.round(FOOT * ratio);
    this.perPixel = this.seconds * this.fs / this.w; // samples
    this.wide = this.w + Math.ceil(AHEAD_S * this.fs / this.perPixel); // columns of the ring: what is known already is not shown yet
    this.buffer = new OffscreenCanvas(this.wide, this.h);
    this.image = new ImageData(this.wide, this.h);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.sketch = this.buffer.getContext("2d", { alpha: false });
    this.orderRows();
    this.colours();
    this.dot = Math.max(Math.round(ratio * (this.n <= 120 ? 2 : 1)), 1);
    this.prepared = Math.floor(this.shown / this.perPixel) - this.wide; // columns up to here are not ours
    this.touched = [];
    this.dirty = false;
    const oldest = this.shown - this.seconds * this.fs;
    this.prepare(Math.floor(this.shown / this.perPixel));
    for (const s of this.stop ? this.spans : []) if (s[1] > oldest) this.paintSpan(s);
    for (const m of this.stop ? this.marks : []) if (m > oldest) this.paintMark(m);
    const from = Math.max(this.count - KEEP, 0);
    for (let c = from; c < this.count; c++) { const i = c % KEEP; if (this.sample[i] > oldest) this.paintSpike(i); }
    this.whole = true;
  }

  orderRows() {
    const byUnits = this.mode === "units";
    const xy = this.about ? this.about.positions_um : [];
    const ids = byUnits ? Array.from(this.units.id) : xy.map((_, c) => c);
    const at = byUnits ? new Map(this.units.id.map((u, k) => [u, [this.units.x[k], this.units.y[k]]])) : null;
    const place = (u) => (byUnits ? at.get(u) : xy[u]) || [0, 0];
    if (this.order === "place") ids.sort((a, b) => place(a)[1] - place(b)[1] || place(a)[0] - place(b)[0]);
    else if (this.order === "rate" && byUnits) ids.sort((a, b) => (this.rates[b] || 0) - (this.rates[a] || 0) || a - b);
    else if (this.order === "rate" && this.mua) ids.sort((a, b) => this.mua[b] - this.mua[a] || a - b);
    else ids.sort((a, b) => a - b);
    this.rows = ids;
    this.n = Math.max(ids.length, 1);
    this.rowOf = new Map(ids.map((u, k) => [u, k]));
    this.rowsOfChannel = new Map();
    if (byUnits) this.units.channel.forEach((c, k) => { const l = this.rowsOfChannel.get(c) || []; l.push(this.rowOf.get(this.units.id[k])); this.rowsOfChannel.set(c, l); });
    else ids.forEach((c, k) => this.rowsOfChannel.set(c, [k]));
  }

  colours() {
    const of = (name) => pixel(rgb(colour(name)));
    this.paper = of("field");
    this.of = { blind: of("blind"), gap: of("gap"), unknown: of("blind") };
    this.markColour = of("stim");
    this.plain = of("ink");
    this.grounds = new Set([this.paper, this.of.blind, this.of.gap]);
    this.colourOf = new Map(this.units.id.map((u) => [u, unitPixel(u)]));
  }

  rowBox(row) {
    const top = Math.floor(row * this.h / this.n), bottom = Math.max(Math.floor((row + 1) * this.h / this.n), top + 1);
    const air = bottom - top > 5 ? Math.round((bottom - top) * 0.14) : bottom - top > 2 ? 1 : 0;
    return [top + (air > 1 ? air : 0), bottom - air];
  }

  // ---- painting -------------------------------------------------------------------------------------------

  prepare(bin) {
    if (bin <= this.prepared) return;
    for (let b = Math.max(this.prepared + 1, bin - this.wide + 1); b <= bin; b++) {
      const x = ((b % this.wide) + this.wide) % this.wide;
      for (let y = 0, p = x; y < this.h; y++, p += this.wide) this.pixels[p] = this.paper;
      this.touch(x);
    }
    this.prepared = bin;
  }

  touch(x) { this.touched.push(x); }

  column(bin) {
    // where a column lies in the ring; -1: it is too old to be seen
    if (bin > this.prepared) this.prepare(bin);
    return bin <= this.prepared - this.wide ? -1 : ((bin % this.wide) + this.wide) % this.wide;
  }

  paintSpike(i) {
    const unit = this.unit[i], byUnits = this.mode === "units";
    const row = this.rowOf.get(byUnits ? unit : this.channel[i]);
    if (row === undefined) return;
    const value = unit >= 0 ? this.colourOf.get(unit) ?? unitPixel(unit) : this.plain;
    const [top, bottom] = this.rowBox(row);
    const bin = Math.floor(this.sample[i] / this.perPixel);
    for (let d = 0; d < this.dot; d++) {
      const x = this.column(bin + d);
      if (x < 0) continue;
      for (let y = top, p = top * this.wide + x; y < bottom; y++, p += this.wide) this.pixels[p] = value;
      this.touch(x);
    }
    this.painted++;
  }

  paintSpan([start, stop, channel, what]) {
    if (what === "unknown" && this.mode === "electrodes") return; // detections can be seen all the same
    const rows = channel < 0 ? null : this.rowsOfChannel.get(channel);
    if (channel >= 0 && !rows) return;
    const ground = this.of[what];
    const first = Math.floor(start / this.perPixel), last = Math.max(Math.ceil(stop / this.perPixel) - 1, first);
    for (let b = Math.max(first, this.prepared - this.wide); b <= last; b++) {
      const x = this.column(b);
      if (x < 0) continue;
      const boxes = rows ? rows.map((r) => [Math.floor(r * this.h / this.n), Math.max(Math.floor((r + 1) * this.h / this.n), Math.floor(r * this.h / this.n) + 1)]) : [[0, this.h]];
      for (const [top, bottom] of boxes)
        for (let y = top, p = top * this.wide + x; y < bottom; y++, p += this.wide)
          if (this.pixels[p] === this.paper || (what === "gap" && this.pixels[p] === this.of.blind)) this.pixels[p] = ground;
      this.touch(x);
    }
  }

  paintMark(sample) {
    const x = this.column(Math.floor(sample / this.perPixel));
    if (x < 0) return;
    for (let y = 0, p = x; y < this.h; y++, p += this.wide) if (this.grounds.has(this.pixels[p])) this.pixels[p] = this.markColour;
    this.touch(x);
  }

  flush() {
    if (this.whole) { this.sketch.putImageData(this.image, 0, 0); this.whole = false; this.touched.length = 0; return; }
    if (!this.touched.length) return;
    const seen = new Uint8Array(this.wide);
    for (const x of this.touched) seen[x] = 1;
    this.touched.length = 0;
    for (let x = 0; x < this.wide; x++) {
      if (!seen[x]) continue;
      let end = x + 1;
      while (end < this.wide && (seen[end] || seen[end + 1] || seen[end + 2])) end++;
      this.sketch.putImageData(this.image, 0, 0, x, 0, end - x, this.h);
      x = end;
    }
  }

  // ---- a frame --------------------------------------------------------------------------------------------

  advance(dt) {
    // the right edge moves evenly, and stays a little behind what is known
    if (this.paused) return;
    const aim = this.stop - 0.05 * this.fs;
    const off = aim - this.shown;
    if (Math.abs(off) > this.fs) { if (off > 0 || off < -2 * this.fs) { this.shown = aim; if (Math.abs(off) > this.seconds * this.fs) this.dirty = true; } return; }
    this.shown = Math.max(this.shown, Math.min(this.shown + dt * this.fs + off * Math.min(dt * 4, 1), this.stop));
  }

  draw(dt) {
    this.advance(dt);
    if (this.dirty || !this.buffer) this.layOut();
    const head = Math.floor(this.shown / this.perPixel);
    this.prepare(head);
    this.flush();
    const c = this.context, { left, w, h } = this;
    c.fillStyle = colour("paper");
    c.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const from = ((head + 1 - w) % this.wide + this.wide) % this.wide, most = Math.min(w, this.wide - from); // the oldest column in view
    c.imageSmoothingEnabled = false;
    c.drawImage(this.buffer, from, 0, most, h, left, 0, most, h);
    if (most < w) c.drawImage(this.buffer, 0, 0, w - most, h, left + most, 0, w - most, h);
    this.scales(c);
  }

  scales(c) {
    const { left, w, h, ratio, n } = this;
    c.font = `${11 * ratio}px system-ui, sans-serif`;
    c.fillStyle = colour("soft");
    c.textBaseline = "middle";
    c.textAlign = "right";
    const every = Math.ceil(13 * ratio / (h / n));
    const step = every <= 1 ? 1 : [2, 5, 10, 20, 50, 100, 200, 500].find((s) => s >= every) || every;
    for (let r = 0; r < n && this.rows.length; r += step) {
      const name = this.mode === "units" ? this.rows[r] : this.about.channel_ids[this.rows[r]];
      c.fillText(String(name), left - 6 * ratio, Math.min(Math.max((r + 0.5) * h / n, 6 * ratio), h - 6 * ratio));
    }
    const row = this.selected >= 0 && this.mode === "units" ? this.rowOf.get(this.selected) : undefined;
    if (row !== undefined) {
      const y = row * h / n, tall = Math.max(h / n, 3 * ratio);
      c.strokeStyle = colour("accent");
      c.lineWidth = 1.5 * ratio;
      c.strokeRect(left - 1, y, w, tall);
      c.fillStyle = colour("accent");
      c.fillRect(left - 4 * ratio, y, 3 * ratio, tall);
    }
    c.textBaseline = "alphabetic";
    c.textAlign = "center";
    c.fillStyle = colour("soft");
    c.strokeStyle = colour("line");
    c.lineWidth = 1;
    c.strokeRect(left + 0.5, 0.5, w - 1, h - 1);
    const first = this.about ? this.about.first_sample || 0 : 0, end = (this.shown - first) / this.fs;
    const tick = this.seconds <= 5 ? 1 : this.seconds <= 10 ? 2 : 5;
    for (let t = Math.ceil((end - this.seconds) / tick) * tick; t <= end; t += tick) {
      const x = left + w - (end - t) / this.seconds * w;
      if (t < 0 || x < left + 14 * ratio || x > left + w - 14 * ratio) continue;
      c.fillText(clock(t), x, h + 14 * ratio);
      c.fillRect(x, h, 1, 3 * ratio);
    }
  }

  at(clientX, clientY) {
    // what lies under the pointer: { row id, seconds since the session began }
    const box = this.canvas.getBoundingClientRect();
    const x = (clientX - box.left) * this.ratio - this.left, y = (clientY - box.top) * this.ratio;
    if (y < 0 || y >= this.h || !this.rows || !this.rows.length) return null;
    const first = this.about ? this.about.first_sample || 0 : 0;
    return { id: this.rows[Math.min(Math.floor(y * this.n / this.h), this.n - 1)], seconds: (this.shown - first) / this.fs - (1 - x / this.w) * this.seconds, inside: x >= 0 };
  }

  *spikesOf(unit, seconds) {
    // [sample, microvolt] of one unit, oldest first
    const oldest = this.stop - seconds * this.fs;
    for (let c = Math.max(this.count - KEEP, 0); c < this.count; c++) {
      const i = c % KEEP;
      if (this.unit[i] === unit && this.sample[i] > oldest) yield [this.sample[i], this.uv[i]];
    }
  }
}

export function clock(s) {
  const whole = Math.max(Math.floor(s), 0), p = (x) => String(x).padStart(2, "0");
  const text = `${p(Math.floor(whole / 60) % 60)}:${p(whole % 60)}`;
  return whole >= 3600 ? `${Math.floor(whole / 3600)}:${text}` : text;
}
