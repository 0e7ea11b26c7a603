"""Two devices in simulated time: clocks that differ and drift, chunks that arrive when a busy computer lets them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiked.clocks.aligned import Clocks
from spiked.clocks.arrival import Step


@dataclass
class Device:
    """`ppm` off its nominal rate on average, swinging by `swing_ppm` with the room's temperature.

    `lost`: (time, samples): lost there without a word, so that the count falls behind.
    """

    fs_hz: float
    block: int  # samples of a chunk
    ppm: float = 0.0
    swing_ppm: float = 0.0
    swing_s: float = 1500.0
    begun_s: float = 0.0
    first: int = 0  # number of its first sample
    least_delay_s: float = 0.0005
    jitter_s: float = 0.0003
    lost: tuple[tuple[float, int], ...] = ()
    done: int = field(default=0, init=False)

    def _taken(self, t: np.ndarray) -> np.ndarray:
        since, w = np.asarray(t) - self.begun_s, 2 * np.pi / self.swing_s
        return self.fs_hz * (since + 1e-6 * (self.ppm * since + self.swing_ppm * (1 - np.cos(w * since)) / w))

    def sample(self, t: Any) -> np.ndarray:
        """Number (a fraction too) of the sample at true time t."""
        taken = self._taken(np.asarray(t, float))
        for at, n in self.lost:
            taken = taken - np.where(np.asarray(t) > at, n, 0)
        return taken + self.first

    def time(self, sample: Any) -> np.ndarray:
        """True time of a sample number."""
        t = (np.asarray(sample, float) - self.first) / self.fs_hz + self.begun_s
        for _ in range(4):
            t = t - (self.sample(t) - sample) / self.fs_hz
        return t

    def chunks(self, until_s: float, rng: np.random.Generator, busy: Any) -> tuple[np.ndarray, np.ndarray]:
        """(last sample of each chunk, arrival ns) of what was taken since the last call."""
        stop = int(self.sample(until_s)) - self.first
        last = np.arange(self.done + self.block - 1, stop, self.block)
        self.done = int(last[-1]) + 1 if len(last) else self.done
        taken = self.time(last + self.first)
        arrival = busy(taken + self.least_delay_s + rng.exponential(self.jitter_s, len(last)))
        return last + self.first, (np.maximum.accumulate(arrival) * 1e9).astype(np.int64)


class Busy:
    """Now and then nothing is received for a while, then all at once."""

    def __init__(
        self, rng: np.random.Generator, seconds: float, per_minute: float = 1.0, mean_s: float = 0.4
    ) -> None:
        n = max(1, round(per_minute * seconds / 60))
        self.at = np.sort(rng.uniform(20, max(seconds, 21), n))
        self.until = self.at + rng.exponential(mean_s, n)

    def __call__(self, arrival: np.ndarray) -> np.ndarray:
        k = np.searchsorted(self.at, arrival) - 1
        return np.where(k >= 0, np.maximum(arrival, self.until[np.maximum(k, 0)]), arrival)


@dataclass
class Pulses:
    """Shared pulses as each device sees them."""

    period_s: float = 1.0
    random: bool = False
    jitter_s: float = 50e-6
    missing: float = 0.0
    extra: float = 0.0  # per second and device

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        k = np.arange(1, int(seconds / self.period_s))
        return (k + (rng.uniform(0, 0.7, len(k)) if self.random else 0.0)) * self.period_s

    def seen(
        self, times: np.ndarray, a: float, b: float, device: Device, rng: np.random.Generator
    ) -> np.ndarray:
        """Sample numbers of the rising edges between two true times."""
        mine = times[(times > a) & (times <= b)]
        mine = mine[rng.random(len(mine)) >= self.missing]
        mine = np.concatenate([mine, rng.uniform(a, b, rng.poisson(self.extra * (b - a)))])
        mine = np.sort(mine + rng.normal(0, self.jitter_s, len(mine)))
        return np.ceil(device.sample(mine[mine > device.begun_s + 0.01])).astype(np.int64)


@dataclass
class Played:
    """What `Clocks` said, second by second. `error_ms`: of the newest sample of the second stream, against the truth."""

    clocks: Clocks
    seconds: np.ndarray
    error_ms: np.ndarray
    told_ms: np.ndarray
    methods: list[str]
    steps: list[tuple[float, str, Step]]  # when it was told


def play(
    a: Device, b: Device, seconds: int, pulses: Pulses | None = None, seed: int = 0, busy: bool = True
) -> Played:
    """Run `Clocks` over so many simulated seconds, told once a second as the daemon tells it."""
    rng = np.random.default_rng(seed)
    late = Busy(rng, seconds, per_minute=1.0 if busy else 0.0, mean_s=0.4 if busy else 1e-6)
    clocks = Clocks({"a": a.fs_hz, "b": b.fs_hz})
    times = pulses.times(seconds, rng) if pulses else np.zeros(0)
    rows: list[tuple[float, float, float, str]] = []
    steps: list[tuple[float, str, Step]] = []
    for second in range(1, seconds + 1):
        new = []
        for name, device in (("a", a), ("b", b)):
            new += clocks.arrived(name, *device.chunks(second, rng, late))
            if pulses is not None:
                clocks.edges(name, pulses.seen(times, second - 1, second, device, rng))
        new += clocks.update()
        steps += [(float(second), name, step) for name, step in new]
        knot = clocks.knot("b")
        if knot is not None:
            truth = float(a.sample(b.time(knot.sample)))
            rows.append((second, 1000 * (knot.reference - truth) / a.fs_hz, knot.error_ms, knot.method))
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return Played(
        clocks, np.array(columns[0]), np.array(columns[1]), np.array(columns[2]), list(columns[3]), steps
    )


def table_error_ms(p: Played, a: Device, b: Device, final: bool = True) -> np.ndarray:
    """Of every row of the table that goes into the file."""
    rows = p.clocks.table("b", final)
    return np.array([1000 * (r[1] - float(a.sample(b.time(r[0])))) / a.fs_hz for r in rows])
