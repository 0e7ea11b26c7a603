// Small ways to make and change elements. Texts are always set as text: nothing that comes from the rig is markup.
export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...inside) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k === "class") e.className = v;
    else if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v === true) e.setAttribute(k, "");
    else if (v !== false && v !== null && v !== undefined) e.setAttribute(k, v);
  }
  e.append(...inside.filter((x) => x !== null && x !== undefined && x !== false));
  return e;
}

export function say(element, text) { if (element.textContent !== text) element.textContent = text; }

export function fill(element, ...inside) { element.replaceChildren(...inside.filter(Boolean)); }

export function facts(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [name, value, kind] of pairs.filter(([, v]) => v !== null && v !== undefined && v !== ""))
    list.append(make("dt", {}, name), make("dd", { class: kind || "" }, value instanceof Node ? value : String(value)));
  return list;
}

export function table(heads, rows) {
  const t = make("table");
  t.append(make("thead", {}, make("tr", {}, ...heads.map(([name, left]) => make("th", { class: left ? "t" : "" }, name)))));
  t.append(make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((c, k) => make("td", { class: heads[k][1] ? "t" : "" }, c === null || c === undefined ? "" : c instanceof Node ? c : String(c)))))));
  return t;
}

let toastTimer = 0;
export function toast(text, failed = false) {
  const t = $("toast");
  t.textContent = text;
  t.classList.toggle("failed", failed);
  t.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { t.hidden = true; }, failed ? 8000 : 3500);
}

export function sure(question, yes) {
  const d = $("sure");
  $("suresays").textContent = question;
  $("sureyes").textContent = yes;
  d.returnValue = "no";
  d.showModal();
  return new Promise((done) => d.addEventListener("close", () => done(d.returnValue === "yes"), { once: true }));
}

export function sharp(canvas) {
  // a canvas as fine as the screen, cleared; [context, width, height, ratio] in its own pixels
  const ratio = Math.min(devicePixelRatio || 1, 2), box = canvas.getBoundingClientRect();
  const w = Math.max(Math.round(box.width * ratio), 10), h = Math.max(Math.round(box.height * ratio), 10);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const c = canvas.getContext("2d");
  c.clearRect(0, 0, w, h);
  return [c, w, h, ratio];
}

export const ms = (x) => (x === null || x === undefined ? "" : x < 10 ? x.toFixed(2) : x < 100 ? x.toFixed(1) : x.toFixed(0));
export const hz = (x) => (x < 10 ? x.toFixed(2) : x < 100 ? x.toFixed(1) : x.toFixed(0));
export const many = (n) => (n >= 1e6 ? (n / 1e6).toFixed(2) + " M" : n >= 1e4 ? (n / 1e3).toFixed(1) + " k" : String(n));
