// Several streams in one session: what each of them does, how its clock lies against the first one's, and which one is looked at.
import { $, hz, make, many, ms, say } from "./dom.js";
import { clock } from "./raster.js";

const BAD = ["lost", "failed"];

export class Streams {
  constructor(onChoose) {
    this.box = $("streams");
    this.onChoose = onChoose;
    this.cards = new Map();
  }

  // names: in the rig's order; status: the state message's streams; figures: name -> figures; chosen: the one that is shown
  tell(names, status, figures, chosen) {
    this.box.hidden = names.length < 2;
    if (this.box.hidden) return;
    if (Array.from(this.cards.keys()).join() !== names.join()) {
      this.cards = new Map(names.map((n) => [n, this.card(n)]));
      this.box.replaceChildren(...this.cards.values());
    }
    for (const [name, card] of this.cards) {
      const s = status[name] || {}, [head, body, foot] = card.children, bad = BAD.includes(s.state);
      card.setAttribute("aria-pressed", name === chosen);
      card.classList.toggle("bad", bad);
      say(head.children[1], s.state === "recording" || !s.state ? "" : s.state);
      say(head.children[2], s.fs_hz ? clock(s.samples / s.fs_hz) : "");
      say(body, bad && s.error ? s.error : this.what(s, figures[name]));
      const [text, title, jumped] = offset(name, status);
      say(foot, text);
      foot.title = title;
      foot.classList.toggle("bad", jumped);
    }
  }

  card(name) {
    return make("button", { class: "stream", type: "button", onclick: () => this.onChoose(name) },
      make("span", { class: "head" }, make("b", {}, name), make("span", { class: "state" }), make("span", { class: "num" })), make("span", { class: "what" }), make("span", { class: "soft num" }));
  }

  what(s, f) {
    const live = (s.processes || {}).live, gaps = s.gaps ? `${s.gaps} ${s.gaps === 1 ? "gap" : "gaps"}` : "no gaps";
    const sorted = !live ? (sorts(s) ? "sorting starts" : "recorded only") : live.units ? `${live.units} units, ${f ? hz(f.spikes_hz) : "?"} Hz` : `no units yet, ${f ? many(Math.round(f.detections_hz)) : "?"} detections a second`;
    return `${s.channels || "?"} electrodes at ${s.fs_hz ? s.fs_hz / 1000 : "?"} kHz, ${sorted}, ${gaps}`;
  }
}

export const sorts = (s) => "live" in (s.processes || {}) || "live" in (s.pids || {});

// [text, what it means, whether the clock jumped]: where this stream's time lies on the first stream's
export function offset(name, status) {
  const s = status[name] || {}, k = s.clock || {}, reference = k.reference, r = status[reference];
  if (!reference || !r) return ["clock not known yet", "", false];
  const jumps = k.steps ? `; jumped ${k.steps === 1 ? "once" : `${k.steps} times`}` : "";
  if (name === reference) return [`the other clocks are compared with this one${jumps}`, "", !!jumps];
  if (k.reference_sample === undefined || !r.fs_hz) return [`clock against ${reference}: not known yet${jumps}`, "", !!jumps];
  const here = (k.sample - s.first_sample) / k.fs_hz, there = (k.reference_sample - r.first_sample) / r.fs_hz, apart = 1000 * (there - here);
  const sign = (x, text) => `${x < 0 ? "\u2212" : "+"}${text}`, digits = k.error_ms < 0.1 ? 2 : k.error_ms < 1 ? 1 : 0;
  const text = `clock against ${reference}: ${sign(apart, Math.abs(apart).toFixed(digits))} ms, \u00b1 ${ms(k.error_ms)} (${k.method}), ${sign(k.ppm, Math.abs(k.ppm).toFixed(1))} ppm${jumps}`;
  return [text, `What happens at ${here.toFixed(3)} s of ${name} happens at ${there.toFixed(3)} s of ${reference}, each counted from its own first sample.`, !!jumps];
}
