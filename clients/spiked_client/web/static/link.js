// The connection to the page's server: it comes back by itself, and its age is never hidden.
const AGAIN_MS = [300, 700, 1500, 3000, 5000];

export function unpack(buffer) {
  // layout: spiked_client/web/frames.py
  const v = new DataView(buffer);
  const n = v.getUint32(4, true), m = v.getUint32(8, true);
  let at = 40;
  const take = (Kind, count) => { const a = new Kind(buffer, at, count); at += a.byteLength; return a; };
  return {
    kind: v.getUint8(0), stream: v.getUint8(1), old: v.getUint16(2, true) === 1, n, m,
    leftOut: v.getUint32(12, true), tooSlow: v.getUint32(16, true), lost: v.getUint32(20, true),
    base: v.getFloat64(24, true), stop: v.getFloat64(32, true),
    blindStart: take(Float64Array, m), blindStop: take(Float64Array, m), offset: take(Int32Array, n), unit: take(Int32Array, n),
    blindChannel: take(Int32Array, m), blindReason: take(Int32Array, m), channel: take(Uint16Array, n), uv: take(Int16Array, n),
  };
}

export class Link {
  constructor(onText, onFrame, onChange, onRefused) {
    Object.assign(this, { onText, onFrame, onChange, onRefused });
    this.heard = 0; // performance.now() of the last message
    this.open = false;
    this.stream = "";
    this.tries = 0;
    addEventListener("online", () => this.connect());
    document.addEventListener("visibilitychange", () => { if (!document.hidden && !this.open) this.connect(); });
  }

  connect() {
    clearTimeout(this.timer);
    if (this.socket && this.socket.readyState <= 1) return;
    const socket = this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => { this.open = true; this.tries = 0; if (this.stream) this.choose(this.stream); this.onChange(); };
    socket.onmessage = ({ data }) => {
      this.heard = performance.now();
      if (typeof data === "string") this.onText(JSON.parse(data)); else this.onFrame(unpack(data));
    };
    socket.onclose = (e) => {
      if (socket !== this.socket) return;
      this.open = false;
      this.why = e.reason;
      this.onChange();
      this.timer = setTimeout(() => this.onRefused().then((may) => { if (may) this.connect(); }), AGAIN_MS[Math.min(this.tries++, AGAIN_MS.length - 1)]);
    };
  }

  choose(stream) {
    this.stream = stream;
    if (this.socket && this.socket.readyState === 1) this.socket.send(JSON.stringify({ stream }));
  }
}

export async function ask(path, body) {
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), 12000);
  try {
    const how = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const got = await fetch(path, { ...how, signal: patience.signal });
    const told = await got.json().catch(() => ({}));
    if (!got.ok) throw Object.assign(new Error(told.error || `refused (${got.status})`), { status: got.status });
    return told;
  } catch (e) {
    if (e.status) throw e;
    throw new Error("the page's server does not answer");
  } finally {
    clearTimeout(timer);
  }
}
