// The array: every electrode where it is, coloured by its rate, flashing with what it just saw; units as rings in their colours.
import { colour, dark, heat, unitColour } from "./colour.js";

const STEPS = 48, FADE_S = 0.35;

export class ArrayMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.mode = "mua";
    this.selected = -1;
    this.electrode = -1;
    this.setStream(null);
    new ResizeObserver(() => { this.dirty = true; }).observe(canvas);
    dark.addEventListener("change", () => { this.dirty = true; });
  }

  setStream(about) {
    this.about = about;
    this.xy = about ? about.positions_um : [];
    this.flash = new Float32Array(this.xy.length);
    this.rate = new Float32Array(this.xy.length);
    this.units = { id: [], channel: [], x: [], y: [] };
    this.foot = [];
    this.top = 1;
    this.dirty = true;
  }

  setUnits(units) { this.units = units; }

  setFigures(f) {
    const values = this.mode === "mua" ? f.mua_hz : this.unitRates(f.rates_hz);
    for (let c = 0; c < this.rate.length; c++) this.rate[c] = values[c] || 0;
    this.top = Math.max(...this.rate, 1);
  }

  unitRates(rates) {
    const out = new Float32Array(this.xy.length);
    this.units.id.forEach((u, k) => { out[this.units.channel[k]] += rates[u] || 0; });
    return out;
  }

  addFrame(f) {
    if (f.old) return;
    const mua = this.mode === "mua";
    for (let k = 0; k < f.n; k++) if ((f.unit[k] < 0) === mua && f.channel[k] < this.flash.length) this.flash[f.channel[k]] = 1;
  }

  layOut() {
    const ratio = Math.min(devicePixelRatio || 1, 2), box = this.canvas.getBoundingClientRect();
    const W = this.canvas.width = Math.max(Math.round(box.width * ratio), 40), H = this.canvas.height = Math.max(Math.round(box.height * ratio), 40);
    this.ratio = ratio;
    const xs = this.xy.map((p) => p[0]), ys = this.xy.map((p) => p[1]);
    const x0 = Math.min(...xs, Infinity), x1 = Math.max(...xs, -Infinity), y0 = Math.min(...ys, Infinity), y1 = Math.max(...ys, -Infinity);
    const stepX = pitch(xs), stepY = pitch(ys);
    const wide = x1 - x0 + stepX, tall = y1 - y0 + stepY, pad = 10 * ratio;
    let sx = (W - 2 * pad) / wide, sy = (H - 2 * pad) / tall;
    const free = Math.max(wide / tall, tall / wide) > 4; // a shank: its width is drawn larger than it is
    if (!free) sx = sy = Math.min(sx, sy);
    else if (tall > wide) sx = Math.min(sx, 60 * ratio / stepX);
    else sy = Math.min(sy, 60 * ratio / stepY);
    this.stretched = free && Math.abs(Math.log(sx / sy)) > 0.1;
    const ox = (W - sx * wide) / 2, oy = (H - sy * tall) / 2;
    this.px = (x) => ox + (x - x0 + stepX / 2) * sx;
    this.py = (y) => H - oy - (y - y0 + stepY / 2) * sy; // y points up
    this.cell = [Math.max(stepX * sx * 0.86, 1.5 * ratio), Math.max(stepY * sy * 0.86, 1.5 * ratio)];
    this.at = this.xy.map(([x, y]) => [this.px(x), this.py(y)]);
    this.palette = Array.from({ length: STEPS }, (_, k) => heat(k / (STEPS - 1)));
    this.dirty = false;
  }

  draw(dt) {
    if (this.dirty) this.layOut();
    const c = this.context, [w, h] = this.cell, n = this.at.length;
    c.fillStyle = colour("field");
    c.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const fade = Math.exp(-dt / FADE_S), log = Math.log1p(this.top);
    const buckets = Array.from({ length: STEPS }, () => []);
    for (let k = 0; k < n; k++) {
      const mean = 0.62 * Math.log1p(this.rate[k]) / log;
      buckets[Math.min(STEPS - 1, Math.floor(STEPS * Math.min(mean + 0.38 * this.flash[k], 0.999)))].push(k);
      this.flash[k] *= fade;
    }
    buckets.forEach((list, b) => {
      c.fillStyle = this.palette[b];
      for (const k of list) c.fillRect(this.at[k][0] - w / 2, this.at[k][1] - h / 2, w, h);
    });
    this.drawUnits(c, Math.min(Math.max(Math.min(w, h) * 0.28, 2 * this.ratio), 8 * this.ratio));
  }

  drawUnits(c, r) {
    const { id, x, y } = this.units;
    const few = id.length <= 260;
    c.lineWidth = 1.6 * this.ratio;
    const stack = new Map();
    for (let k = 0; k < id.length; k++) {
      const chosen = id[k] === this.selected;
      if (!few && !chosen) continue;
      const key = `${x[k]} ${y[k]}`, nth = stack.get(key) || 0; // units of one electrode beside each other
      stack.set(key, nth + 1);
      const X = this.px(x[k]) + nth * r * 0.9, Y = this.py(y[k]) - nth * r * 0.9;
      c.beginPath();
      c.arc(X, Y, chosen ? r * 1.5 : r, 0, 7);
      c.fillStyle = unitColour(id[k]);
      c.fill();
      c.strokeStyle = chosen ? colour("ink") : colour("paper");
      c.lineWidth = (chosen ? 2.5 : 1) * this.ratio;
      c.stroke();
    }
    const [w, h] = this.cell;
    c.strokeStyle = colour("ink");
    c.lineWidth = this.ratio;
    for (const k of this.foot) if (this.at[k]) c.strokeRect(this.at[k][0] - w / 2, this.at[k][1] - h / 2, w, h);
    if (this.electrode >= 0 && this.at[this.electrode]) {
      c.lineWidth = 2.5 * this.ratio;
      c.strokeRect(this.at[this.electrode][0] - w / 2 - 2, this.at[this.electrode][1] - h / 2 - 2, w + 4, h + 4);
    }
  }

  nearest(clientX, clientY) {
    // the electrode under the pointer and the units on it
    const box = this.canvas.getBoundingClientRect();
    const x = (clientX - box.left) * this.ratio, y = (clientY - box.top) * this.ratio;
    let best = -1, far = Infinity;
    this.at.forEach(([X, Y], k) => { const d = (X - x) ** 2 + (Y - y) ** 2; if (d < far) { far = d; best = k; } });
    const units = this.units.id.filter((_, k) => this.units.channel[k] === best);
    return { channel: best, units };
  }
}

function pitch(values) {
  // least distance between two different coordinates
  const sorted = Array.from(new Set(values)).sort((a, b) => a - b);
  let least = Infinity;
  for (let k = 1; k < sorted.length; k++) if (sorted[k] - sorted[k - 1] > 0.5) least = Math.min(least, sorted[k] - sorted[k - 1]);
  return Number.isFinite(least) ? least : 20;
}
