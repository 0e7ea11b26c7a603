"""The clocks of a session's streams: each against the computer's, each against the first stream's.

A pure object: it is told arrivals, edges and resets, and says what a sample number of one stream is in another, how
sure that is, and when a clock jumped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiked.clocks.arrival import ArrivalClock, Step
from spiked.clocks.fit import straight
from spiked.clocks.pulses import PulseClock

KNOT_S = 10.0  # between two rows of the table that is kept
PULSES_OLD_S = 60.0  # without a matched pulse for so long, arrival takes over
FIRST_ERROR_S = (
    0.0005  # arrival: what nobody can see is the difference of both streams' least delays; at least this
)
SMOOTH_S = 60.0  # half of what a final knot is fitted over; pulses
SMOOTH_ARRIVAL_S = 150.0
FEWEST_POINTS = 3
SAME_STEP_S, SAME_SIZE_S = 10.0, 0.005  # a jump told by pulses is not told again by arrival


@dataclass(frozen=True)
class Knot:
    """Sample `sample` of a stream was taken when sample `reference` (a fraction too) of the reference stream was."""

    sample: int
    reference: float
    ratio: float  # reference samples per sample
    error_ms: float  # one standard deviation
    method: str  # "pulses", "arrival", or "same" for the reference stream itself
    segment: int  # counts up at every jump; nothing may be interpolated across

    def row(self) -> list[Any]:
        return [
            self.sample,
            round(self.reference, 4),
            self.ratio,
            round(self.error_ms, 5),
            self.method,
            self.segment,
        ]


COLUMNS = ("sample", "reference_sample", "ratio", "error_ms", "method", "segment")


@dataclass
class _Stream:
    fs_hz: float
    arrival: ArrivalClock
    pulses: PulseClock = field(default_factory=PulseClock)
    knots: list[Knot] = field(default_factory=list)
    segment: int = 0
    begun: int = 0  # first sample of the segment
    starts: list[list[int]] = field(default_factory=list)  # [segment, first sample] of all of them
    steps: list[Step] = field(default_factory=list)
    heard: bool = False  # pulses came


class Clocks:
    """`streams`: name -> nominal rate, the reference first."""

    def __init__(self, streams: dict[str, float]) -> None:
        self.streams = {name: _Stream(fs, ArrivalClock(fs)) for name, fs in streams.items()}
        self.reference = next(iter(streams))

    # ---- what happens

    def arrived(
        self, stream: str, last_samples: np.ndarray, arrival_ns: np.ndarray
    ) -> list[tuple[str, Step]]:
        """Chunks of one stream, by their last samples. Returns the steps that became certain."""
        steps = self.streams[stream].arrival.add(last_samples, arrival_ns)
        s = self.streams[stream]
        if not s.starts and len(last_samples):
            s.begun = int(last_samples[0])
            s.starts.append([0, s.begun])
        new = [step for step in steps if not self._known(s, step)]
        for step in new:
            self._jumped(stream, step.sample)
            s.steps.append(step)
        return [(stream, step) for step in new]

    @staticmethod
    def _known(s: _Stream, step: Step) -> bool:
        """Whether the pulses have told of this jump already."""
        last = s.steps[-1] if s.steps else None
        return (
            last is not None
            and last.method == "pulses"
            and abs(step.sample - last.sample) < SAME_STEP_S * s.fs_hz
            and abs(step.seconds - last.seconds) < SAME_SIZE_S
        )

    def reset(self, stream: str, sample: int) -> None:
        """The stream's count began anew at this sample of the session's numbering, and said so."""
        self.streams[stream].arrival.reset(sample)
        self._jumped(stream, sample)

    def edges(self, stream: str, samples: np.ndarray) -> None:
        """Rising edges on the stream's sync line."""
        s = self.streams[stream]
        s.heard = s.heard or len(samples) > 0
        seconds = samples / s.fs_hz
        if stream == self.reference:
            for other in self._others():
                other.pulses.add_reference(seconds)
        else:
            s.pulses.add(seconds)

    def update(self) -> list[tuple[str, Step]]:
        """Match what came since; once a second. Returns the steps that the pulses showed."""
        out = []
        ref = self.streams[self.reference]
        for name, s in self.streams.items():
            if name == self.reference:
                continue
            guess = self._guess(s) if s.arrival.line and ref.arrival.line else None
            jump = s.pulses.update(guess, s.arrival.newest / s.fs_hz, ref.arrival.newest / ref.fs_hz)
            if jump is not None:
                step = Step(round(s.pulses.x[0] * s.fs_hz), jump, "pulses")
                s.steps.append(step)
                self._segment(s, step.sample)
                out.append((name, step))
            self._note(name, s)
        return out

    def _others(self) -> list[_Stream]:
        return [s for name, s in self.streams.items() if name != self.reference]

    def _jumped(self, stream: str, sample: int) -> None:
        """All that is known of pairs with this stream is of the time before."""
        hit = self._others() if stream == self.reference else [self.streams[stream]]
        for s in hit:
            at = sample if stream != self.reference else s.arrival.newest
            s.pulses.forget()
            self._segment(s, at)

    @staticmethod
    def _segment(s: _Stream, sample: int) -> None:
        s.segment += 1
        s.begun = sample
        s.starts.append([s.segment, sample])
        while s.knots and s.knots[-1].sample >= sample:
            s.knots.pop()

    def _guess(self, s: _Stream) -> Any:
        """Reference seconds of stream seconds by arrival."""
        ref = self.streams[self.reference]
        return lambda x: ref.arrival.sample(s.arrival.seconds(x * s.fs_hz)) / ref.fs_hz

    def _note(self, name: str, s: _Stream) -> None:
        """A row of the table, now and then."""
        last = s.knots[-1] if s.knots else None
        if (
            last is not None
            and last.segment == s.segment
            and s.arrival.newest - last.sample < KNOT_S * s.fs_hz
        ):
            return
        knot = self.knot(name)
        if knot is not None and knot.sample >= s.begun:
            s.knots.append(knot)

    # ---- what is known

    def knot(self, stream: str, sample: int | None = None) -> Knot | None:
        """Where a sample of `stream` (default: its newest) lies in the reference stream; None before that is known."""
        s, ref = self.streams[stream], self.streams[self.reference]
        at = s.arrival.newest if sample is None else sample
        if stream == self.reference:
            return Knot(at, float(at), 1.0, 0.0, "same", s.segment)
        line, x = s.pulses.line, at / s.fs_hz
        if line is not None and s.pulses.x and x - s.pulses.x[-1] < PULSES_OLD_S:
            error = 1000 * (line.error(x) + line.spread / np.sqrt(max(line.n, 1)))
            ratio = (1 + line.slope) * ref.fs_hz / s.fs_hz
            return Knot(at, (x + line(x)) * ref.fs_hz, ratio, float(error), "pulses", s.segment)
        if s.arrival.line is None or ref.arrival.line is None:
            return None
        there = ref.arrival.sample(s.arrival.seconds(at))
        ratio = ref.fs_hz / s.fs_hz * (1 + s.arrival.line.slope) / (1 + ref.arrival.line.slope)
        blind = max(FIRST_ERROR_S, 0.5 * (s.arrival.late_s + ref.arrival.late_s))
        error = np.sqrt(s.arrival.error(at) ** 2 + ref.arrival.error(there) ** 2 + blind**2)
        return Knot(at, there, ratio, 1000 * float(error), "arrival", s.segment)

    def told(self) -> dict[str, dict[str, Any]]:
        """The figures of each stream, for a message: plain numbers and text."""
        out = {}
        for name, s in self.streams.items():
            knot = self.knot(name) if name != self.reference or s.arrival.newest else None
            out[name] = {
                "reference": self.reference,
                "fs_hz": s.fs_hz,
                "computer_ppm": None if s.arrival.line is None else round(s.arrival.ppm, 3),
                "steps": len(s.steps),
                "from_sample": s.begun,
                "n": 0,
            }
            if knot is not None:
                nominal = self.streams[self.reference].fs_hz / s.fs_hz
                out[name] |= {
                    "sample": knot.sample, "reference_sample": knot.reference, "ratio": knot.ratio, "ppm": round(1e6 * (nominal / knot.ratio - 1), 4),
                    "error_ms": round(knot.error_ms, 5), "method": knot.method, "segment": knot.segment,
                    "n": s.pulses.matched if knot.method == "pulses" else len(s.arrival.x),
                }  # fmt: skip
            if s.heard:
                out[name]["pulses"] = {
                    "matched": s.pulses.matched, "left_over": s.pulses.left_over, "ambiguous": s.pulses.ambiguous,
                }  # fmt: skip
        return out

    def table(self, stream: str, final: bool = False) -> list[list[Any]]:
        """Rows of COLUMNS. `final`: the rows of the running segment fitted again from both sides, for the file."""
        s = self.streams[stream]
        knots = [self._smooth(s, k) for k in s.knots] if final and stream != self.reference else s.knots
        return [k.row() for k in knots]

    def _smooth(self, s: _Stream, k: Knot) -> Knot:
        if k.segment != s.segment:
            return k
        ref, x = self.streams[self.reference], k.sample / s.fs_hz
        if k.method == "pulses":
            line = _around(np.array(s.pulses.x), np.array(s.pulses.e), x, SMOOTH_S)
            if line is None:
                return k
            error = 1000 * (line.error(x) + line.spread / np.sqrt(line.n))
            ratio = (1 + line.slope) * ref.fs_hz / s.fs_hz
            return Knot(k.sample, (x + line(x)) * ref.fs_hz, ratio, float(error), k.method, k.segment)
        mine = _around(s.arrival.x, s.arrival.d, x - s.arrival.origin[0] / s.fs_hz, SMOOTH_ARRIVAL_S)
        at = (k.reference - ref.arrival.origin[0]) / ref.fs_hz
        theirs = _around(ref.arrival.x, ref.arrival.d, at, SMOOTH_ARRIVAL_S)
        if mine is None or theirs is None:
            return k
        own = x - s.arrival.origin[0] / s.fs_hz
        host = s.arrival.origin[1] / 1e9 + own + mine(own) - ref.arrival.origin[1] / 1e9
        there = host - theirs(host - theirs(host))
        ratio = ref.fs_hz / s.fs_hz * (1 + mine.slope) / (1 + theirs.slope)
        return Knot(
            k.sample, ref.arrival.origin[0] + there * ref.fs_hz, ratio, k.error_ms, k.method, k.segment
        )


def _around(x: np.ndarray, y: np.ndarray, at: float, half: float) -> Any:
    a, b = np.searchsorted(x, [at - half, at + half])
    return straight(x[a:b], y[a:b]) if b - a >= FEWEST_POINTS else None
