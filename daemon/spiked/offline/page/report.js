"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const seconds = (s) => (data.duration_s > 600 ? (s / 60).toFixed(1) + " min" : s.toFixed(1) + " s");

// ---- tables that sort ----------------------------------------------------------------------------------------

function sortBy(th) {
  const table = th.closest("table");
  const body = table.tBodies[0];
  const column = th.cellIndex;
  const down = th.getAttribute("aria-sort") === "ascending";
  const key = (row) => {
    const cell = row.cells[column];
    const value = cell.dataset.v ?? cell.textContent;
    return value === "" ? null : isNaN(value) ? value : Number(value);
  };
  const rows = Array.from(body.rows).map((row) => [key(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // unknown ones last, either way
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return down ? -order : order;
  });
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}

for (const th of document.querySelectorAll("table.sortable th")) {
  th.tabIndex = 0;
  th.addEventListener("click", () => sortBy(th));
  th.addEventListener("keydown", (e) => { if (e.key === "Enter") sortBy(th); });
}

const choose = document.getElementById("which");
if (choose) {
  choose.addEventListener("change", () => {
    for (const card of document.querySelectorAll(".cards .card"))
      card.hidden = choose.value !== "" && card.dataset.label !== choose.value;
  });
}

// ---- drawings ------------------------------------------------------------------------------------------------

function draw(width, height) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.add = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  return svg;
}

function figure(svg, caption) {
  const f = document.createElement("figure");
  const c = document.createElement("figcaption");
  c.textContent = caption;
  f.append(svg, c);
  return f;
}

const distinct = (values) => Array.from(new Set(values)).sort((a, b) => a - b);

function footprint(f) {
  const w = 160, h = 130;
  const svg = draw(w, h);
  const xs = distinct(f.xy.map((p) => p[0])), ys = distinct(f.xy.map((p) => p[1]));
  const spanX = xs.at(-1) - xs[0], spanY = ys.at(-1) - ys[0];
  const wide = 0.9 * w / xs.length;
  const peak = Math.max(...f.uv[0].map(Math.abs), 1);
  const tall = Math.min(0.8 * h / ys.length, 46);
  const n = f.uv[0].length, px = tall * 0.7 / peak;
  const above = Math.max(...f.uv.flat(), 0) * px, below = -Math.min(...f.uv.flat(), 0) * px;
  f.xy.forEach(([x, y], k) => {
    const left = spanX ? (x - xs[0]) / spanX * (w - wide) : (w - wide) / 2;
    const middle = spanY ? h - below - (y - ys[0]) / spanY * (h - below - above) : (h + above - below) / 2;
    const points = f.uv[k].map((v, i) => `${(left + i / (n - 1) * wide).toFixed(1)},${(middle - v * px).toFixed(1)}`);
    svg.add("polyline", { points: points.join(" "), fill: "none", stroke: k ? colour("soft") : colour("accent"), "stroke-width": k ? 1 : 1.8 });
  });
  const extent = [spanX, spanY].map((v) => Math.round(v)).join(" × ");
  return figure(svg, `mean waveform (${data.window_ms.toFixed(1)} ms) on ${f.xy.length} electrodes, ${extent} µm, peak ${f.uv[0].reduce((a, v) => (Math.abs(v) > Math.abs(a) ? v : a), 0)} µV`);
}

function correlogram(counts, bin, refractory, stroke) {
  const w = 160, h = 110, floor = 94;
  const svg = draw(w, h);
  const half = counts.length / 2, reach = half * bin;
  const most = Math.max(...counts, 1);
  const band = refractory / reach * w / 2;
  svg.add("rect", { x: w / 2 - band, y: 0, width: 2 * band, height: floor, fill: colour("bad"), opacity: 0.13 });
  const step = w / counts.length;
  const bars = counts.map((c, i) => `M${(i * step).toFixed(2)} ${floor}v${(-c / most * (floor - 4)).toFixed(2)}h${step.toFixed(2)}V${floor}z`);
  svg.add("path", { d: bars.join(""), fill: colour(stroke) });
  svg.add("line", { x1: 0, x2: w, y1: floor, y2: floor, stroke: colour("line") });
  svg.add("text", { x: 0, y: h - 3 }, `−${reach} ms`);
  svg.add("text", { x: w / 2, y: h - 3, "text-anchor": "middle" }, "0");
  svg.add("text", { x: w, y: h - 3, "text-anchor": "end" }, `${reach}`);
  return svg;
}

function amplitude(values) {
  const w = 320, h = 44;
  const svg = draw(w, h);
  const most = Math.max(...values.map((v) => Math.abs(v ?? 0)), 1);
  let pen = false;
  const path = values.map((v, i) => {
    if (v === null) { pen = false; return ""; }
    const at = `${(i / (values.length - 1) * w).toFixed(1)} ${(h - 2 - Math.abs(v) / most * (h - 6)).toFixed(1)}`;
    const piece = (pen ? "L" : "M") + at + (pen ? "" : "h.01");
    pen = true;
    return piece;
  });
  svg.add("line", { x1: 0, x2: w, y1: h - 2, y2: h - 2, stroke: colour("line") });
  svg.add("path", { d: path.join(""), fill: "none", stroke: colour("accent"), "stroke-width": 1.6, "stroke-linecap": "round" });
  return figure(svg, `amplitude over the session, 0 to ${most} µV`);
}

function fillCard(card) {
  const unit = card.dataset.unit;
  const plots = card.querySelector(".plots");
  if (data.footprints[unit]) plots.append(footprint(data.footprints[unit]));
  if (data.acg[unit]) plots.append(figure(correlogram(data.acg[unit], data.bin_ms, data.refractory_ms, "accent"), "auto-correlogram"));
  if (data.amplitudes[unit]) card.append(amplitude(data.amplitudes[unit]));
}

function fillPair(box) {
  const pair = data.ccg[Number(box.dataset.pair)];
  box.prepend(correlogram(pair.counts, data.bin_ms, data.refractory_ms, box.dataset.merged ? "good" : "soft"));
}

function drift(box) {
  const w = 640, h = 150, floor = 132, d = data.drift;
  const svg = draw(w, h);
  const all = d.um.flat(), low = Math.min(...all, -1), high = Math.max(...all, 1);
  for (const row of d.um) {
    const points = row.map((v, i) => `${(d.times_s[i] / data.duration_s * w).toFixed(1)},${(floor - (v - low) / (high - low) * (floor - 6)).toFixed(1)}`);
    svg.add("polyline", { points: points.join(" "), fill: "none", stroke: colour("accent"), "stroke-width": 1.3, opacity: 0.8 });
  }
  svg.add("text", { x: 0, y: 10 }, `${high.toFixed(0)} µm`);
  svg.add("text", { x: 0, y: floor }, `${low.toFixed(0)} µm`);
  svg.add("text", { x: w, y: h - 3, "text-anchor": "end" }, seconds(data.duration_s));
  box.append(svg);
}

// ---- canvases ------------------------------------------------------------------------------------------------

function canvasOf(box, height) {
  const canvas = box.querySelector("canvas");
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(canvas.clientWidth, 1);
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return { canvas, pen, width };
}

function rgb(name) {
  const hex = colour(name).slice(1);
  const full = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
  return [0, 2, 4].map((i) => parseInt(full.slice(i, i + 2), 16));
}

function raster(box) {
  const r = data.rasters[box.dataset.raster];
  r.cells ??= Uint8Array.from(atob(r.counts), (c) => c.charCodeAt(0));
  const rows = r.ids.length, tall = Math.min(Math.max(rows * Math.min(14, Math.max(2, 420 / rows)), 30), 900);
  const { canvas, pen, width } = canvasOf(box, tall);
  const image = new ImageData(r.bins, rows), ink = rgb("ink");
  for (let u = 0; u < rows; u++) {
    const row = r.cells.subarray(u * r.bins, (u + 1) * r.bins);
    const most = Math.max(Float64Array.from(row).sort()[Math.floor(0.98 * r.bins)], 1);
    for (let b = 0; b < r.bins; b++) {
      const at = 4 * (u * r.bins + b);
      image.data.set(ink, at);
      image.data[at + 3] = row[b] ? 55 + 200 * Math.min(row[b] / most, 1) : 0;
    }
  }
  const small = document.createElement("canvas");
  small.width = r.bins; small.height = rows;
  small.getContext("2d").putImageData(image, 0, 0);
  const x = (s) => s / data.duration_s * width;
  for (const [spans, name] of [[box.dataset.raster === "live" ? data.blind : [], "blind"], [data.gaps, "bad"]]) {
    pen.fillStyle = colour(name);
    pen.globalAlpha = 0.35;
    for (const [a, b] of spans) pen.fillRect(x(a), 0, Math.max(x(b) - x(a), 1), tall);
  }
  pen.globalAlpha = 1;
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, width, tall);
  pen.fillStyle = colour("unsure");
  for (const t of data.stim_s) pen.fillRect(x(t), 0, 1, 6);
  const says = box.querySelector("figcaption"), text = says.dataset.text ??= says.textContent;
  canvas.onpointermove = (e) => {
    const place = canvas.getBoundingClientRect();
    const b = Math.floor((e.clientX - place.left) / place.width * r.bins), u = Math.floor((e.clientY - place.top) / place.height * rows);
    if (b < 0 || b >= r.bins || u < 0 || u >= rows) return;
    const from = b / r.bins * data.duration_s;
    says.textContent = `unit ${r.ids[u]} at ${seconds(from)}: ${(r.cells[u * r.bins + b] * r.bins / data.duration_s).toFixed(1)} Hz`;
  };
  canvas.onpointerleave = () => { says.textContent = text; };
}

function agreement(box) {
  const { offline, live, matrix } = data.agreement;
  if (!offline.length || !live.length) return;
  const canvas = box.querySelector("canvas");
  const cell = Math.max(Math.min(18, box.clientWidth / live.length), 1);
  canvas.style.width = Math.min(cell * live.length, box.clientWidth) + "px";
  const high = Math.max(cell * offline.length, 12);
  const { pen, width } = canvasOf(box, high);
  const ink = rgb("accent").join(",");
  matrix.forEach((row, o) => row.forEach((v, l) => {
    pen.fillStyle = `rgba(${ink},${v})`;
    pen.fillRect(l * width / live.length, o * high / offline.length, width / live.length, high / offline.length);
  }));
  const says = box.querySelector("figcaption"), text = says.dataset.text ??= says.textContent;
  canvas.onpointermove = (e) => {
    const place = canvas.getBoundingClientRect();
    const l = Math.floor((e.clientX - place.left) / place.width * live.length), o = Math.floor((e.clientY - place.top) / place.height * offline.length);
    if (matrix[o]?.[l] === undefined) return;
    says.textContent = `offline unit ${offline[o]}, live unit ${live[l]}: agreement ${matrix[o][l].toFixed(2)}`;
  };
  canvas.onpointerleave = () => { says.textContent = text; };
}

// ---- drawn when they come into view --------------------------------------------------------------------------

const PAINT = { raster, agreement };
const FILL = { card: fillCard, pair: fillPair, drift };
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const kind = target.dataset.draw;
    (FILL[kind] ?? PAINT[kind])(target);
    target.dataset.drawn = "";
  }
}, { rootMargin: "400px" });
for (const box of document.querySelectorAll("[data-draw]")) seen.observe(box);

let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    for (const box of document.querySelectorAll("[data-drawn]")) PAINT[box.dataset.draw]?.(box);
  }, 150);
});
