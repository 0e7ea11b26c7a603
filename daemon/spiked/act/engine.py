"""From firings to commands: what is armed, allowed and due goes out, and everything goes into the ledger.

One object with no loop of its own: the live process calls `process` with every chunk's spikes and `poll` between chunks. Time is given
to it; it never waits.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiked.act.arming import Arming
from spiked.act.conditional import Acted, Conditional, as_spikes
from spiked.act.ledger import Ledger
from spiked.act.outputs.base import Ack, Command, Output
from spiked.act.python_rule import PythonRule
from spiked.act.rules import Firing, Rules, UnitFacts
from spiked.act.safety import Safety
from spiked.config import Act, Trigger
from spiked_client.protocol import LEDGER, OUTCOMES, REASONS, TRIGGERS

MAX_HELD = 1024  # commands that wait for their delay; more are refused
MAX_OPEN = 4096  # records that wait for what else becomes of them; the oldest are given up
LOOK_NS = (
    10_000_000  # between looks at leases and at the STOP file; before a command it is looked at in any case
)
STALL_NS = 1_000_000  # what writing a command down may take before it is looked at anew
ASKED_NS = 500_000_000  # a client's command that lay about for so long is refused: who asked gave it up
APART_MS = 1.0  # two sightings closer than this are of one stimulus; as good as the clock is
OUTCOME, REASON = ({name: i for i, name in enumerate(names)} for names in (OUTCOMES, REASONS))


class Clock:
    """Sample numbers and monotonic ns of a device that runs on, by the newest chunk that came."""

    def __init__(self, fs_hz: float) -> None:
        self._ns_per_sample = 1e9 / fs_hz
        self.sample, self.ns = 0, 0

    def chunk(self, stop: int, arrival_ns: int) -> None:
        """A chunk that ends before sample `stop` arrived."""
        self.sample, self.ns = stop, arrival_ns

    def sample_at(self, ns: int) -> int:
        return self.sample + round((ns - self.ns) / self._ns_per_sample)

    def ns_of(self, sample: int) -> int:
        return self.ns - round((self.sample - sample) * self._ns_per_sample)


@dataclass(order=True)
class Held:
    """A command on its way: due at `due_ns`."""

    due_ns: int
    number: int
    trigger: Trigger = field(compare=False)
    record: np.ndarray = field(compare=False)
    sham: bool = field(compare=False, default=False)
    leases: frozenset[str] = field(compare=False, default=frozenset())  # that allowed it when it was decided
    late_ns: int = field(compare=False, default=0)  # so long after `due_ns` it is worth nothing
    marked_from: int = field(compare=False, default=0)  # sample at which its artifact was foretold


class Engine:
    """Rules, safety, arming, outputs and the ledger of one stream.

    `safety`: an account that streams share; default: this stream's own. `now`: the clock of the times that are given, for what took long meanwhile.
    `mark(sample, pattern)` is told where a sent stimulus is expected; `tell(level, text)` gets what the operator must know.
    `news` collects the records that changed until `take_news`. `counters`: decisions per outcome, lost (from the queues); `refusals`: those refused, per reason.
    """

    def __init__(
        self, triggers: tuple[Trigger, ...], limits: Act, fs_hz: float, n_channels: int, outputs: Mapping[str, Output],
        ledger: Ledger, arming: Arming, tell: Callable[[str, str], None], mark: Callable[[int, str], None],
        safety: Safety | None = None, now: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self.cfg, self.outputs, self.ledger, self.arming = limits, outputs, ledger, arming
        self.safety, self.clock = safety or Safety(limits, ledger.sent), Clock(fs_hz)
        self._fs_hz, self._n_channels, self._tell, self._mark, self._now = fs_hz, n_channels, tell, mark, now
        self._units = UnitFacts(np.zeros(0, np.int64))
        self.counters: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()  # per reason
        self.conditional = Conditional()
        self._held: list[Held] = []
        self._open: dict[int, Held] = {}
        self._news: list[np.ndarray] = []
        self._offsets: deque[int] = deque(maxlen=31)  # samples from a command's hand-over to its artifact
        self._looked_ns = self._failed_ns = 0
        self._failing = False
        self._stops = 0  # of `arming`, that were acted on
        self._decided = dict(ledger.decided)  # rule -> sample of its last decision, of earlier lives too
        self.python: list[PythonRule] = []
        self.stop_asked = ""  # may be set by a signal handler at any moment
        self.set_triggers(triggers)

    def set_triggers(self, triggers: tuple[Trigger, ...]) -> None:
        """Other rules from now on. Raises ConfigError when a Python rule cannot be loaded."""
        same = {r.trigger.name: r for r in self.python if r.trigger in triggers}  # they know what they know
        python = [
            same.get(t.name) or PythonRule(t, self._fs_hz, self._suspended)
            for t in triggers
            if t.when == "python"
        ]
        self.triggers, self.python = triggers, python
        self.rules = Rules(triggers, self._fs_hz, self._n_channels, self.cfg.seed)
        self.rules.use(self._units)
        self.rules.resume(self._decided)
        for rule in python:
            rule.resume(self._decided)

    def use(self, units: UnitFacts) -> None:
        """The sorter's units from now on."""
        self._units = units
        self.rules.use(units)
        for name, lacking in self.rules.missing().items():
            self._tell("warning", f"trigger {name} waits for units that are not there: {lacking}")

    def _suspended(self, text: str) -> None:
        self._tell("error", text)

    # ---- decisions ---------------------------------------------------------------------------------------------

    def process(self, spikes: np.ndarray, blind: np.ndarray, until: int, now_ns: int) -> None:
        """SPIKE and BLIND records of the newest chunk (see `clock`), and the sample number up to which spikes are final."""
        for firing in self.rules.process(spikes, blind, until):
            self._decide(firing, now_ns)
        for rule in self.python:
            now_ns = self._ask(rule, self.rules.fresh(spikes) if rule.trigger.early else spikes, now_ns)

    def _ask(self, rule: PythonRule, spikes: np.ndarray, now_ns: int) -> int:
        """What a rule in Python makes of these spikes; the time afterwards."""
        begun = self._now()
        found = rule.process(spikes)
        now_ns += self._now() - begun
        for firing in found:
            self._decide(self.rules.judged(firing), now_ns)
        return now_ns

    def early(self, found: np.ndarray, resolved: np.ndarray, now_ns: int) -> None:
        """Spikes of the newest chunk that are not final yet (EARLY), and what became of earlier ones (RESOLVED).

        Only rules that are `early` see them; `process` then gets the final spikes with a flag, and gives these rules the others.
        """
        if len(resolved):
            for acted in self.conditional.resolve(resolved):
                self._resolved(acted)
        if not len(found):
            return
        self.conditional.tell(found)
        spikes = as_spikes(found)
        for firing in self.rules.early(spikes):
            self._decide(firing, now_ns)
        for rule in self.python:
            if rule.trigger.early:
                now_ns = self._ask(rule, spikes, now_ns)

    def _resolved(self, acted: Acted) -> None:
        """It is known what became of the early spikes behind a decision."""
        record, number = acted.record, int(acted.record["number"][0])
        if record["outcome"] == OUTCOME["held"]:  # comes up when it is due
            return
        self.conditional.forget(number)
        if acted.word == "withdrawn" and number in self._open:
            for output in self.outputs.values():
                if number in output.waiting() and output.withdraw(number):
                    del self._open[number]
                    self._unsent(record, "refused", "withdrawn")
                    return
        if record["reason"] == REASON["early"]:  # else it says why nothing came of it
            record["reason"] = REASON[acted.word]
            self._write(record)

    def _decide(self, f: Firing, now_ns: int) -> None:
        t = f.rule
        self._decided[t.name] = max(f.sample, self._decided.get(t.name, 0))
        record = self._record(t.name, t, f.sample, now_ns)
        record["trigger_ns"] = trough_ns = self.clock.ns_of(f.sample)
        n = min(len(f.units), TRIGGERS)
        record["n_triggers"] = n
        record["trigger_unit"][0, :n], record["trigger_sample"][0, :n] = f.units[-n:], f.samples[-n:]
        if f.blocked == "chance":
            self._settle(record, "chance")
        elif f.blocked:
            self._settle(record, "refused", f.blocked)
        elif now_ns - trough_ns > self.cfg.late_ms * 1e6:
            self._settle(record, "refused", "late")
        else:
            if t.early:
                self.conditional.note(record, f.units, f.samples)
            due_ns = trough_ns + round(t.delay_ms * 1e6) if t.delay_ms else now_ns
            leases, late_ns = self.arming.covering(t.name), round(self.cfg.late_ms * 1e6)
            number = int(record["number"][0])
            self._hold(Held(due_ns, number, t, record, self.rules.is_sham(f), leases, late_ns), now_ns)

    def stimulate(self, t: Trigger, lease: str, now_ns: int, asked_ns: int | None = None) -> dict[str, Any]:
        """A command that a client with this lease asked for: its number, and what became of it."""
        record = self._record("", t, self.clock.sample_at(now_ns), now_ns)
        number, due_ns = int(record["number"][0]), now_ns if asked_ns is None else asked_ns
        self._execute(Held(due_ns, number, t, record, False, frozenset((lease,)), ASKED_NS), now_ns)
        return {
            "number": number,
            "outcome": OUTCOMES[int(record["outcome"][0])],
            "reason": REASONS[int(record["reason"][0])],
        }

    def _record(self, rule: str, t: Trigger, sample: int, now_ns: int) -> np.ndarray:
        record = np.zeros(1, LEDGER)
        record["number"], record["rule"], record["pattern"] = (
            self.ledger.number(),
            rule.encode(),
            t.pattern.encode(),
        )
        record["sample"], record["decided_ns"] = sample, now_ns
        record["sent_sample"] = record["artifact_sample"] = -1
        record["amplitude_ua"] = np.nan if t.amplitude_ua is None else t.amplitude_ua
        record["width_us"] = np.nan if t.width_us is None else t.width_us
        return record

    def _hold(self, held: Held, now_ns: int) -> None:
        if held.due_ns <= now_ns:
            self._execute(held, now_ns)
        elif len(self._held) >= MAX_HELD:
            self._settle(held.record, "refused", "queue full")
        else:
            heapq.heappush(self._held, held)
            self._write(held.record)

    # ---- commands ----------------------------------------------------------------------------------------------

    def _execute(self, held: Held, now_ns: int) -> None:
        """The last checks, then out."""
        t, record = held.trigger, held.record
        self._watch(now_ns)
        refusal = self.safety.refusal(now_ns, t.charge_nc, t.pulses)
        outcome, reason = self._withheld(held, now_ns)
        if outcome:
            self._settle(record, outcome, refusal if outcome == "dry" else reason)
        elif t.output not in self.outputs:
            self._settle(record, "refused", "no output")
        elif refusal:
            self._settle(record, "refused", refusal)
        elif held.sham:
            self._settle(record, "sham")
        else:
            self._send(held, now_ns)

    def _withheld(self, held: Held, now_ns: int) -> tuple[str, str]:
        """(outcome, reason) of a command that may not go out now, whatever the limits say; empty: it may."""
        if self.arming.stopped:
            return "refused", "stopped"
        if not any(self.arming.holds(lease) for lease in held.leases):
            return "dry", ""
        if self.conditional.word(held.number) == "withdrawn":
            return "refused", "withdrawn"
        if now_ns - held.due_ns > held.late_ns:
            return "refused", "late"
        return "", ""

    def _send(self, held: Held, now_ns: int) -> None:
        t, record, begun = held.trigger, held.record, self._now()
        number, sample = held.number, int(record["sample"][0])
        if refusal := self.safety.take(now_ns, t.charge_nc, t.pulses):  # another stream was first
            self._settle(record, "refused", refusal)
            return
        record["sent_ns"], record["sent_sample"] = now_ns, self.clock.sample_at(now_ns)
        record["outcome"], record["reason"] = OUTCOME["sent"], REASON[self.conditional.say(number)]
        self._write(record)  # on file before it can happen
        if self._failing:
            self._unsent(record, "refused", "ledger")
            return
        if (took := self._now() - begun) > STALL_NS:
            now_ns += took
            self._watch(now_ns)
            outcome, reason = self._withheld(held, now_ns)
            if outcome:
                self._unsent(record, outcome, reason)
                return
            self.safety.seen(now_ns)  # it happens only now
        self.counters["sent"] += 1
        rule = record["rule"][0].decode()
        apart_ns = round(self.safety.limits.lockout_ms * 1e6)
        self.outputs[t.output].send(
            Command(number, rule, sample, t.pattern, t.electrodes, t.amplitude_ua, t.width_us, int(record["decided_ns"][0]), apart_ns)
        )  # fmt: skip
        held.marked_from = int(record["sent_sample"][0])
        self._mark(held.marked_from + self._expected_offset(), t.pattern)
        self._open[number] = held
        if len(self._open) > MAX_OPEN:
            del self._open[next(iter(self._open))]

    def _unsent(self, record: np.ndarray, outcome: str, reason: str) -> None:
        """A command that is on file as sent, and was not."""
        record["sent_ns"], record["sent_sample"] = 0, -1
        self._settle(record, outcome, reason)

    def _expected_offset(self) -> int:
        """Samples from a command to its artifact: what it was lately, at first what is configured."""
        if not self._offsets:
            return round(self.cfg.expected_ms * self._fs_hz / 1000)
        return int(np.median(self._offsets))

    def _settle(self, record: np.ndarray, outcome: str, reason: str = "") -> None:
        reason = reason or self.conditional.say(int(record["number"][0]))
        record["outcome"], record["reason"] = OUTCOME[outcome], REASON[reason]
        self.counters[outcome] += 1
        if outcome == "refused":
            self.refusals[reason] += 1
        self._write(record)

    def _write(self, record: np.ndarray) -> None:
        try:
            self.ledger.append(record)
        except OSError as e:
            if not self._failing:
                self._tell(
                    "error", f"the stimulus ledger cannot be written ({e.strerror}): nothing is sent any more"
                )
            self._failing = True
            self.arming.disarm()
        else:
            self._failing = False
        self._news.append(record.copy())

    # ---- between chunks ----------------------------------------------------------------------------------------

    def poll(self, now_ns: int) -> None:
        """Commands that are due, acknowledgements, leases, the stop."""
        while self._held and self._held[0].due_ns <= now_ns:
            self._execute(heapq.heappop(self._held), now_ns)
        for output in self.outputs.values():
            if waiting := output.waiting():
                self._recall(output, waiting, now_ns)
            for ack in output.poll():
                self._acknowledged(ack)
        if now_ns - self._looked_ns > LOOK_NS or self.stop_asked:
            self._watch(now_ns)

    def _recall(self, output: Output, waiting: tuple[int, ...], now_ns: int) -> None:
        """Take back what has not left an output yet and may not leave it any more."""
        self._watch(now_ns)
        for number in waiting:
            held = self._open.get(number)
            outcome, reason = ("refused", "stopped") if held is None else self._withheld(held, held.due_ns)
            if outcome and output.withdraw(number) and held is not None:
                del self._open[number]
                self._unsent(held.record, outcome, reason)

    def _watch(self, now_ns: int) -> None:
        self._looked_ns = now_ns
        if self.stop_asked:
            why, self.stop_asked = self.stop_asked, ""
            self.arming.stop(why)
        self.arming.look()
        if self.arming.stops != self._stops:
            self._halt(now_ns)
        for lease in self.arming.expire(now_ns):
            rules = "everything" if lease.rules is None else ", ".join(sorted(lease.rules))
            self._tell(
                "warning", f"disarmed: the client that armed {rules} did not renew within {lease.seconds:g} s"
            )

    def stop(self, why: str) -> None:
        """The emergency stop."""
        self.stop_asked = why
        self._watch(self._looked_ns)

    def _halt(self, now_ns: int) -> None:
        """A stop has come: what still waits is refused for good, also when the stop is lifted before its time."""
        self._stops = self.arming.stops
        self._tell("warning", f"stimulation is stopped: {self.arming.stopped or 'and the stop was lifted'}")
        held, self._held = sorted(self._held), []
        for h in held:
            self._settle(h.record, "refused", "stopped")
        for output in self.outputs.values():
            if waiting := output.waiting():
                self._recall(output, waiting, now_ns)
            output.halt()

    def orphaned(self) -> None:
        """Nobody supervises this process any more."""
        if self.arming.disarm():
            self._tell("warning", "disarmed: the supervisor is gone")

    def _acknowledged(self, ack: Ack) -> None:
        held = self._open.get(ack.number)
        if held is None:
            return
        record = held.record
        if not record["ack_ns"][0]:  # what else is told of it later was at another time
            if ack.sent_ns > int(record["sent_ns"][0]) + STALL_NS:  # it waited for the peer
                self.safety.seen(ack.sent_ns)
            record["sent_ns"], record["ack_ns"] = ack.sent_ns, ack.ack_ns
            record["sent_sample"] = self.clock.sample_at(ack.sent_ns) if ack.sent_ns else -1
        if not ack.sent_ns:
            del self._open[ack.number]
        if not ack.ok:
            self._failed(record, ack)
        self._write(record)

    def _failed(self, record: np.ndarray, ack: Ack) -> None:
        self.counters["failed"] += 1
        record["outcome"], record["reason"] = OUTCOME["failed"], REASON["output"]
        if ack.ack_ns - self._failed_ns > 1_000_000_000:
            self._failed_ns = ack.ack_ns
            failed = self.counters["failed"]
            self._tell("warning", f"stimulus {ack.number} failed, {failed} so far: {ack.text}")

    def seen(self, sample: int, now_ns: int) -> None:
        """A stimulus was noticed at this sample, by the device, a TTL line, a client, or in the data."""
        self.safety.seen(min(now_ns, self.clock.ns_of(sample)))
        reach, apart = self.cfg.artifact_ms * self._fs_hz / 1000, APART_MS * self._fs_hz / 1000
        for held in reversed(self._open.values()):  # of two commands before it the later one
            record = held.record
            lag, already = sample - int(record["sent_sample"][0]), int(record["artifact_sample"][0])
            if lag > reach or (already >= 0 and abs(sample - already) < apart):
                return
            if already < 0 and lag > -apart:
                record["artifact_sample"], record["artifact_ns"] = sample, now_ns
                # not `lag`: the output says later when it left, and a place that was only foretold must not move the next one
                self._offsets.append(sample - held.marked_from)
                self._write(record)
                return

    def take_news(self) -> np.ndarray:
        """LEDGER records written since the last call."""
        if not self._news:
            return NO_NEWS
        news, self._news = np.concatenate(self._news), []
        return news

    def told(self) -> dict[str, Any]:
        """Rules, limits and what is armed, for a client."""
        python = {r.trigger.name: dict(r.counters) for r in self.python}
        return {
            "triggers": [t.model_dump(mode="json") for t in self.triggers],
            "armed": self.arming.armed_rules(t.name for t in self.triggers),
            "stopped": self.arming.stopped, "limits": self.safety.told(), "outputs": sorted(self.outputs),
            "counters": dict(self.counters), "python": python, "missing_units": self.rules.missing(),
        }  # fmt: skip

    def close(self) -> None:
        """What still waits stays in the ledger as held."""
        self.arming.disarm()
        for output in self.outputs.values():
            output.close()
        self.ledger.close()


NO_NEWS = np.zeros(0, LEDGER)
