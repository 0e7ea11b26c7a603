// The emergency stop: one tap, always there, and it says whether it took effect.
import { $, say, sure, toast } from "./dom.js";
import { ask } from "./link.js";

const DOUBT_MS = 3000;

export class Stop {
  constructor() {
    this.button = $("stop");
    this.says = $("stopsays");
    this.asked = 0; // performance.now() of the tap that is not confirmed yet
    this.failed = "";
    this.since = 0;
    this.state = null;
    this.button.addEventListener("click", () => this.pull());
    $("clear").addEventListener("click", () => this.clear());
    setInterval(() => this.tell(), 250);
  }

  async pull() {
    this.asked = performance.now();
    this.failed = "";
    this.tell();
    try {
      await ask("/do", { op: "stop_stimulation" });
    } catch (e) {
      this.failed = e.message;
      if (e.status === 409 && !this.recording) { this.asked = 0; this.since = performance.now(); } // the daemon answered: nothing can be sent
    }
    this.tell();
  }

  async clear() {
    if (!(await sure("Let stimulation be armed again? Nothing is armed by this.", "Allow again"))) return;
    try {
      await ask("/do", { op: "clear_stop" });
      toast("Stimulation may be armed again. Nothing is armed.");
      this.asked = 0;
    } catch (e) {
      toast(e.message, true);
    }
  }

  // streams: name -> {stopped, armed: [names]} as their live processes told last; fresh: whether that is of now
  hear(streams, fresh, recording, may) { Object.assign(this, { state: streams, fresh, recording, may }); this.tell(); }

  tell() {
    const streams = Object.values(this.state || {}), several = streams.length > 1;
    const stopped = streams.filter((s) => s.stopped), all = streams.length > 0 && stopped.length === streams.length;
    const armed = Object.entries(this.state || {}).flatMap(([name, s]) => (s.armed || []).map((rule) => (several ? `${rule} (${name})` : rule)));
    if (this.asked && this.fresh && !this.recording && !this.failed) { this.asked = 0; this.failed = "no session runs"; this.since = performance.now(); }
    if (this.failed && !this.asked && performance.now() - this.since > 6000) this.failed = "";
    const waiting = this.asked && !(all && this.fresh);
    const late = waiting && performance.now() - this.asked > DOUBT_MS;
    if (all && this.fresh) { this.asked = 0; this.failed = ""; }
    const idle = this.failed && !this.asked;
    const kind = idle ? "" : this.failed || late ? "unsure" : all && this.fresh ? "stopped" : "";
    this.button.className = kind;
    const head = this.button.firstElementChild;
    if (this.failed) { say(head, idle ? "Nothing to stop" : "Not stopped from here"); say(this.says, this.failed); }
    else if (late) { say(head, "Not confirmed"); say(this.says, "use the stimulator's own switch; tap to try again"); }
    else if (waiting) { say(head, "Stopping…"); say(this.says, `confirmed by ${stopped.length} of ${streams.length} streams`); }
    else if (all && this.fresh) { say(head, "Stopped"); say(this.says, `confirmed by ${stopped.length} of ${streams.length}: ${stopped[0].stopped}`); }
    else {
      say(head, "Stop stimulation");
      say(this.says, !this.fresh ? "state unknown; the tap is tried all the same" : !this.recording || !streams.length ? "no session, nothing can be sent" : armed.length ? `armed: ${armed.join(", ")}` : "nothing is armed");
    }
    $("clear").hidden = !(all && this.fresh && this.may && this.may.has("clear_stop"));
  }
}
