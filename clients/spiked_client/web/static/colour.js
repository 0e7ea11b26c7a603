// Colours: a unit keeps its own for ever, since it comes from its number alone.
export const dark = matchMedia("(prefers-color-scheme: dark)");

let named = {};
dark.addEventListener("change", () => { named = {}; });
export function colour(name) {
  return named[name] ??= getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

export function unitHsl(id) {
  const hue = (id * 137.508 + 20) % 360; // the golden angle: neighbours differ
  const ring = Math.floor(id / 8) % 3;
  return dark.matches ? [hue, 68, 58 + 7 * ring] : [hue, 70, 34 + 6 * ring];
}
export const unitColour = (id) => { const [h, s, l] = unitHsl(id); return `hsl(${h.toFixed(1)} ${s}% ${l}%)`; };

export function rgb(css) {
  const c = rgb.canvas ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  c.clearRect(0, 0, 1, 1);
  c.fillStyle = css;
  c.fillRect(0, 0, 1, 1);
  return Array.from(c.getImageData(0, 0, 1, 1).data.slice(0, 3));
}
export const pixel = ([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0; // as it lies in an ImageData, little-endian

export function unitPixel(id) {
  const [h, s, l] = unitHsl(id);
  const a = s / 100 * Math.min(l / 100, 1 - l / 100);
  const f = (n) => { const k = (n + h / 30) % 12; return Math.round(255 * (l / 100 - a * Math.max(-1, Math.min(k - 3, 9 - k, 1)))); };
  return pixel([f(0), f(8), f(4)]);
}

export function heat(x) {
  // 0..1: from nearly paper to as strong as this paper allows
  const t = Math.max(0, Math.min(x, 1));
  return dark.matches ? `hsl(${212 - 22 * t} ${16 + 74 * t}% ${17 + 55 * t}%)` : `hsl(${205 + 12 * t} ${28 + 52 * t}% ${93 - 58 * t}%)`;
}
