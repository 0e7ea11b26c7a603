"""Trigger rules over sorted spikes. No I/O and no clock: what a rule decides follows from the sample numbers alone.

Spikes are taken in the order of sample, then unit, once that order is final, so that any cut of the stream into chunks gives the
same decisions; a rule that is `early` takes them as they come. Probability and sham are dice that the seed, the rule and the sample number throw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spiked.act import matching
from spiked.act.conditional import not_told_early
from spiked.config import Trigger
from spiked_client.protocol import BLIND, SPIKE, TRIGGERS

BLIND_KEPT = 16  # stretches per electrode


class Firing(NamedTuple):
    """A rule that was complete. `blocked` is one of protocol.REASONS, or "chance", or empty."""

    rule: Trigger
    sample: int  # of the spike that completed it
    units: tuple[int, ...]  # of the newest trigger spikes
    samples: tuple[int, ...]
    blocked: str = ""


NOTHING: list[Firing] = []  # never changed


@dataclass(frozen=True, eq=False)
class UnitFacts:
    """What rules need to know of the sorter's units: ids (units,), their electrodes, and how far they can be trusted."""

    ids: np.ndarray
    electrodes: tuple[np.ndarray, ...] = ()  # per unit, channel indices
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (units,); none: not known
    accuracy: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def electrodes_of(self, ids: Iterable[int]) -> np.ndarray:
        """Channel indices of these units, as far as they are known."""
        at = [np.flatnonzero(self.ids == u) for u in set(ids)] if self.electrodes else []
        return np.unique(
            np.concatenate([np.zeros(0, np.int64), *(self.electrodes[i[0]] for i in at if len(i))])
        )

    def figure(self, values: np.ndarray, unit: int) -> float:
        """Of one unit; 0 where it is not known."""
        at = np.flatnonzero(self.ids == unit)
        return float(values[at[0]]) if len(at) and len(values) else 0.0


NO_UNITS = UnitFacts(np.zeros(0, np.int64))


def dice(seed: int, rule: str, sample: int, unit: int, what: str) -> float:
    """A number in [0, 1) that is always the same for the same arguments."""
    text = f"{seed}/{rule}/{sample}/{unit}/{what}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2**64


def _alone(t: Trigger) -> tuple[int | None, ...]:
    """The units that fire a rule alone; None: they do it together."""
    return t.units if t.when == "unit" else (None,)


class Matcher:
    """Rules over spikes in the order in which they are given to `take`."""

    def __init__(self, triggers: Sequence[Trigger], fs_hz: float) -> None:
        self.triggers, self._per_ms = tuple(triggers), fs_hz / 1000
        n = len(self.triggers)
        room = max(64, n)
        self._rule = np.zeros((n, matching.N_RULE), np.int64)
        self._rule[:, matching.LAST] = matching.NEVER
        self._queue = np.zeros((n, matching.QUEUE), np.int64), np.zeros((n, matching.QUEUE), np.int64)
        steps = (n, matching.MAX_STEPS)
        self._steps = np.full(steps, -1, np.int64), np.zeros(steps, np.int64), np.zeros(steps, np.int64)
        self._runs = (
            np.zeros((*steps, matching.KEPT, matching.MAX_STEPS), np.int64),
            np.zeros(steps, np.int64),
        )
        self._fired = np.zeros((room, 3), np.int64)
        self._trig = np.zeros((room, TRIGGERS), np.int64), np.zeros((room, TRIGGERS), np.int64)
        self._newest = matching.NEVER
        self.use(NO_UNITS)

    def use(self, units: UnitFacts) -> None:
        """Other units from the next spike on: windows and sequences begin anew, refractory times go on."""
        self._ids = units.ids.astype(np.int64)
        self._lookup = np.full(int(self._ids.max(initial=-1)) + 1, -1, np.int64)
        self._lookup[self._ids] = np.arange(len(self._ids))
        self._rule[:, matching.HEAD : matching.N_STEPS] = 0
        self._runs[1][:] = 0
        self._present = np.zeros((len(self.triggers), len(self._ids)), np.int64)
        lists: list[list[int]] = [[] for _ in self._ids]
        for r, t in enumerate(self.triggers):
            mine = [int(self._lookup[u]) if 0 <= u < len(self._lookup) else -1 for u in t.units]
            self._set_rule(r, t, mine)
            for u in dict.fromkeys(mine if t.units else range(len(self._ids))):
                if u >= 0:
                    lists[u].append(r)
        self._ptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        self._rules_of = np.array([r for x in lists for r in x], np.int64)

    def resume(self, decided: Mapping[str, int]) -> None:
        """The refractory times go on from these rules' last decisions."""
        for r, t in enumerate(self.triggers):
            self._rule[r, matching.LAST] = max(
                decided.get(t.name, matching.NEVER), self._rule[r, matching.LAST]
            )

    def _set_rule(self, r: int, t: Trigger, mine: list[int]) -> None:
        row = self._rule[r]
        window = max(1, round((t.window_ms or 0) * self._per_ms))
        row[matching.KIND], row[matching.WINDOW], row[matching.NEED] = matching.COUNT, window, t.count or 1
        row[matching.REFRACTORY] = round(t.refractory_ms * self._per_ms)
        if t.rate_hz is not None and t.window_ms is not None:
            row[matching.NEED] = max(1, int(np.ceil(t.rate_hz * t.window_ms / 1000 - 1e-9)))
        if t.share is not None:
            of = len(mine) or len(self._ids)
            row[matching.KIND], row[matching.NEED] = matching.SHARE, max(1, int(np.ceil(t.share * of - 1e-9)))
        if t.when == "sequence":
            row[matching.KIND], row[matching.N_STEPS] = matching.SEQUENCE, len(mine)
            self._steps[0][r, : len(mine)] = mine
            for j, (low, high) in enumerate(t.intervals_ms, 1):
                self._steps[1][r, j], self._steps[2][r, j] = (
                    round(low * self._per_ms),
                    round(high * self._per_ms),
                )

    def take(self, spikes: np.ndarray) -> list[Firing]:
        """SPIKE records; what they completed, in their order."""
        begin, found = 0, NOTHING
        while begin < len(spikes):
            n, begin, self._newest = matching.match(
                spikes, begin, self._newest, self._lookup, self._ptr, self._rules_of, self._rule, *self._queue,
                self._present, *self._steps, *self._runs, self._fired, *self._trig,
            )  # fmt: skip
            if n:
                found = [*found, *(self._firing(k) for k in range(n))]
        return found

    def _firing(self, k: int) -> Firing:
        r, sample, n = self._fired[k].tolist()
        samples, index = (a[k, :n] for a in self._trig)
        return Firing(self.triggers[r], sample, tuple(self._ids[index].tolist()), tuple(samples.tolist()))


class Rules:
    """All rules of a stream but those in Python. `process` gives their firings, blocked ones too."""

    def __init__(self, triggers: Sequence[Trigger], fs_hz: float, n_channels: int, seed: int = 0) -> None:
        self.seed, self._fs_hz, self._triggers = seed, fs_hz, tuple(triggers)
        matched = [t for t in triggers if t.when != "python"]
        self._early = Matcher([t for t in matched if t.early], fs_hz)
        self._ordered = Matcher([t for t in matched if not t.early], fs_hz)
        self._flagged = False  # whether some spikes come early
        self._held, self._n_held = np.zeros(matching.MAX_HELD, SPIKE), 0
        shape = (n_channels + 1, BLIND_KEPT)
        self._blind = np.full(shape, matching.NEVER, np.int64), np.full(shape, matching.NEVER, np.int64)
        self._blind_at = np.zeros(n_channels + 1, np.int64)
        self._doubtful: frozenset[int] = frozenset()
        self._needs: dict[tuple[str, int | None], np.ndarray] = {}
        self.use(NO_UNITS)

    def use(self, units: UnitFacts) -> None:
        """Sort with these units from now on."""
        self.units = units
        for m in (self._early, self._ordered):
            m.use(units)
        self._n_held, self._doubtful = 0, frozenset()
        self._needs = {(t.name, u): self._electrodes(t, u) for t in self._triggers for u in _alone(t)}

    def _electrodes(self, t: Trigger, unit: int | None) -> np.ndarray:
        """Rows of what is kept of blindness that the rule depends on; the last one is the whole array."""
        units = () if t.blind != "units" else t.units if unit is None else (unit,)
        return np.append(self.units.electrodes_of(units), len(self._blind_at) - 1).astype(np.int64)

    def resume(self, decided: Mapping[str, int]) -> None:
        """Rule -> sample of its last decision: refractory times go on from there."""
        for m in (self._early, self._ordered):
            m.resume(decided)

    def missing(self) -> dict[str, list[int]]:
        """Rules that name units which are not there, and these units."""
        known = set(self.units.ids.tolist())
        lacking = {t.name: [u for u in t.units if u not in known] for t in self._triggers}
        return {name: units for name, units in lacking.items() if units}

    def doubt(self, units: Iterable[int]) -> None:
        """These units no longer look as calibrated."""
        self._doubtful = frozenset(units)

    def note_blind(self, rows: np.ndarray) -> None:
        """BLIND records."""
        matching.note_blind(rows, *self._blind, self._blind_at)

    def process(self, spikes: np.ndarray, blind: np.ndarray, until: int) -> list[Firing]:
        """SPIKE and BLIND records of a chunk, and the sample number up to which spikes are final; what fired."""
        if len(blind):
            self.note_blind(blind)
        found = NOTHING
        if len(spikes):
            if self._early.triggers:
                found = self._early.take(self.fresh(spikes))
            if self._ordered.triggers:
                found = self._hold(spikes, found)
        if self._n_held and self._held.item(0)[0] < until:
            found = self._let_through(until, found)
        return [self.judged(f) for f in found] if found else found

    def early(self, spikes: np.ndarray) -> list[Firing]:
        """SPIKE records that are not final yet; what fired of the rules that are `early`."""
        self._flagged = True
        return [self.judged(f) for f in self._early.take(spikes)] if self._early.triggers else NOTHING

    def fresh(self, spikes: np.ndarray) -> np.ndarray:
        """Final SPIKE records without those that `early` had."""
        return not_told_early(spikes) if self._flagged else spikes

    def _hold(self, spikes: np.ndarray, found: list[Firing]) -> list[Firing]:
        for a in range(0, len(spikes), matching.MAX_HELD // 2):
            part = spikes[a : a + matching.MAX_HELD // 2]
            if self._n_held + len(part) > matching.MAX_HELD:
                found = self._let_through(np.iinfo(np.int64).max, found)
            self._n_held = matching.put_in_order(self._held, self._n_held, part)
        return found

    def _let_through(self, until: int, found: list[Firing]) -> list[Firing]:
        k = matching.ready(self._held, self._n_held, until)
        fired = self._ordered.take(self._held[:k])
        self._n_held = matching.drop_first(self._held, self._n_held, k)
        return [*found, *fired] if fired else found

    def judged(self, f: Firing) -> Firing:
        return f._replace(blocked=self._why_not(f))

    def _why_not(self, f: Firing) -> str:
        t, unit = f.rule, f.units[-1]
        if t.probability < 1 and dice(self.seed, t.name, f.sample, unit, "chance") >= t.probability:
            return "chance"
        if t.blind != "ignore" and self._is_blind(f):
            return "blind"
        units = set(f.units)
        if t.block_doubtful and units & self._doubtful:
            return "doubtful"
        for least, values, why in (
            (t.least_confidence, self.units.confidence, "confidence"),
            (t.least_accuracy, self.units.accuracy, "accuracy"),
        ):
            if least and any(self.units.figure(values, u) < least for u in units):
                return why
        return ""

    def _is_blind(self, f: Firing) -> bool:
        """Whether what the rule looked at was not seen, somewhere between its first sample and the spike.

        A rule that names no units looks at the whole array.
        """
        window = round((f.rule.window_ms or 0) * self._fs_hz / 1000)
        since = min(f.samples[0], f.sample - window + 1 if window else f.sample)
        unit = f.units[-1] if f.rule.when == "unit" else None
        return bool(matching.was_blind(self._needs[f.rule.name, unit], *self._blind, since, f.sample))

    def is_sham(self, f: Firing) -> bool:
        """Whether this firing belongs to the rule's sham fraction."""
        t = f.rule
        return (
            bool(t.sham_fraction) and dice(self.seed, t.name, f.sample, f.units[-1], "sham") < t.sham_fraction
        )

    def warm_up(self) -> None:
        """Have the kernels compiled."""
        other = Rules(
            [Trigger(name="w", when="burst", count=1, window_ms=1.0)], self._fs_hz, len(self._blind_at) - 1
        )
        other.use(UnitFacts(np.zeros(1, np.int64), (np.zeros(1, np.int64),)))
        other.process(np.zeros(1, SPIKE), np.zeros(1, BLIND), 1)
