"""What a stimulus does to a simulated array: an artifact on every channel, and spikes of cells nearby.

The artifact follows what is seen on HD-MEAs and probes: the pulse itself, a time at the rail that is longer the
nearer the electrode, and then two exponentials that last for milliseconds. Cells near the electrode answer with a
probability that falls with distance, a few milliseconds later. Everything is added to the codes that are about
to be sent, from the sample on that existed when the command came, and clipped at the converter's rails.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.stream import StreamInfo

PHASE_MS, TAIL_MS = 0.2, 60.0  # of one phase of the pulse; of the whole artifact
REACH_UM, STEEPNESS = 40.0, 1.6  # the artifact falls as 1 / (1 + (d / REACH_UM) ** STEEPNESS)
HOLD_MS = (0.5, 3.0)  # at the rail
FAST_MS, SLOW_MS = (0.6, 2.0), (5.0, 12.0)  # of the decay, drawn per channel
PULSE_UV = 30_000.0  # at the stimulated electrode for DEFAULT_UA
DEFAULT_UA = 5.0
EVOKED_UM, LATENCY_MS, MS_PER_UM, JITTER_MS = 80.0, 2.0, 0.02, 0.3
CELL_MS = (1.0, 2.0)  # of a cell's wave before and after the trough
SPIKES_PER_CELL = 60  # averaged, where a recording's cells are taken from its spikes
TTL_MS = 1.0

STIM_ROW = np.dtype(
    [("number", "<i8"), ("sample", "<i8"), ("received_ns", "<i8"), ("trigger", "<i8"), ("decided_ns", "<i8"), ("pulses", "<i4")]
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A cell that can be evoked: its wave (frames, channels) in codes on `channels`, trough at frame `pre`."""

    unit: int
    root: int
    channels: np.ndarray
    wave: np.ndarray
    pre: int


@dataclass(frozen=True)
class Pattern:
    """What a named sequence does: which channels, and how many pulses at what rate."""

    electrodes: tuple[int, ...]
    pulses: int = 1
    hz: float = 100.0


@dataclass(frozen=True)
class Pulse:
    """A command as it came. `trigger`: sample number that it was said to answer to, -1: none."""

    pattern: Pattern
    received_ns: int
    number: int = 0
    trigger: int = -1
    decided_ns: int = 0
    amplitude_ua: float = DEFAULT_UA


def cells_made(recording: Any) -> list[Cell]:
    """The known cells of a recording made by spiked_models.synthesis."""
    out = []
    for i, u in enumerate(recording.units[: recording.n_units]):
        wave = u.template.waves[0].T * np.float32(abs(u.peak_uv) / recording.lsb_uv)
        out.append(Cell(i, u.template.root, u.template.channels, wave, u.template.pre))
    return out


def cells_seen(recording: Any) -> list[Cell]:
    """The cells of a recording with known spikes, as their averages."""
    truth, info = recording.ground_truth, recording.info
    if truth is None:
        return []
    pre, post = (round(ms * info.fs_hz / 1000) for ms in CELL_MS)
    out = []
    for unit in truth.unit_ids.tolist():
        at = truth.samples[truth.units == unit] - recording.first_sample
        at = at[(at >= pre) & (at < recording.n_samples - post)][:SPIKES_PER_CELL]
        if not len(at):
            continue
        mean = np.mean([recording.read(a - pre, a + post) for a in at.tolist()], axis=0, dtype=np.float64)
        mean -= np.median(mean, axis=0)
        root = int(np.argmax(np.ptp(mean, axis=0)))
        near = np.flatnonzero(np.linalg.norm(info.positions - info.positions[root], axis=1) < 100)
        out.append(Cell(unit, root, near, mean[:, near].astype(np.float32), pre))
    return out


class Stimulation:
    """Commands in at any time (`fire`), changed samples out (`apply`), what happened on record (`save`)."""

    def __init__(
        self, info: StreamInfo, cells: list[Cell], evoked_p: float = 0.5, seed: int = 1, line: int = 0, delay_ms: float = 0.0
    ) -> None:  # fmt: skip
        self.info, self.cells, self.evoked_p, self.line = info, cells, evoked_p, line
        self._rng = np.random.default_rng(np.random.SeedSequence([seed, 77]))
        self._delay, self._per_ms = round(delay_ms * info.fs_hz / 1000), info.fs_hz / 1000
        self._commands: deque[Pulse] = deque()
        self._added: list[tuple[int, np.ndarray | slice, np.ndarray]] = []  # start, channels, wave in codes
        self._edges: list[tuple[int, int]] = []  # sample, state
        self._shapes: dict[tuple[int, float], np.ndarray] = {}
        self._shaping = threading.Lock()
        self._low, self._high = rails(info)
        self.stims: list[tuple[int, ...]] = []
        self.evoked: list[tuple[int, int]] = []  # sample of the trough, unit

    # ---- in ----------------------------------------------------------------------------------------------------

    def fire(self, pulse: Pulse) -> None:
        """A command that was received just now; from any thread."""
        self.shapes(pulse)
        self._commands.append(pulse)

    def shapes(self, pulse: Pulse) -> None:
        """Make the artifacts that it needs, so that no sample waits for them."""
        for e in pulse.pattern.electrodes:
            self._shape(e, pulse.amplitude_ua)

    # ---- out ---------------------------------------------------------------------------------------------------

    def apply(self, first: int, codes: np.ndarray, sample_at: Callable[[int], int]) -> np.ndarray:
        """`codes` (samples, channels) from sample `first` (from 0), with what was commanded; the same array where nothing was.

        `sample_at` gives the sample that existed at a monotonic time.
        """
        while self._commands:
            pulse = self._commands.popleft()
            self._begin(pulse, max(sample_at(pulse.received_ns) + self._delay, first))
        if not self._added:
            return codes
        stop = first + len(codes)
        out = codes.astype(np.float32)
        for start, channels, wave in self._added:
            a, b = max(start, first), min(start + len(wave), stop)
            if a < b:
                out[a - first : b - first, channels] += wave[a - start : b - start]
        self._added = [x for x in self._added if x[0] + len(x[2]) > stop]
        return np.clip(np.rint(out), self._low, self._high).astype(codes.dtype)

    def edges(self, stop: int) -> list[tuple[int, int, int]]:
        """TTL edges before sample `stop` that were not handed out yet: sample, line, state."""
        due = sorted(e for e in self._edges if e[0] < stop)
        self._edges = [e for e in self._edges if e[0] >= stop]
        return [(sample, self.line, state) for sample, state in due]

    def save(self, path: Path, first_sample: int) -> None:
        """npz: stims (STIM_ROW), evoked_samples and evoked_units; samples in the device's numbers."""
        rows = np.array(self.stims, STIM_ROW)
        rows["sample"] += first_sample
        evoked = np.array(sorted(self.evoked), np.int64).reshape(-1, 2)
        np.savez(path, stims=rows, evoked_samples=evoked[:, 0] + first_sample, evoked_units=evoked[:, 1])

    # ---- one stimulus ------------------------------------------------------------------------------------------

    def _begin(self, pulse: Pulse, sample: int) -> None:
        self.stims.append(
            (pulse.number, sample, pulse.received_ns, pulse.trigger, pulse.decided_ns, pulse.pattern.pulses)
        )
        for k in range(pulse.pattern.pulses):
            at = sample + round(k * self.info.fs_hz / pulse.pattern.hz)
            self._edges += [(at, 1), (at + round(TTL_MS * self._per_ms), 0)]
            for e in pulse.pattern.electrodes:
                self._added.append((at, slice(None), self._shape(e, pulse.amplitude_ua)))
            self._evoke(pulse.pattern.electrodes, at)

    def _evoke(self, electrodes: tuple[int, ...], sample: int) -> None:
        """Draw which cells answer and when; add their waves."""
        if not electrodes:
            return
        where = self.info.positions[list(electrodes)]
        for cell in self.cells:
            away = float(np.linalg.norm(where - self.info.positions[cell.root], axis=1).min())
            if self._rng.random() >= self.evoked_p * np.exp(-((away / EVOKED_UM) ** 2)):
                continue
            late_ms = max(LATENCY_MS + MS_PER_UM * away + self._rng.normal(0, JITTER_MS), 1.0)
            trough = sample + round(late_ms * self._per_ms)
            self._added.append((trough - cell.pre, cell.channels, cell.wave))
            self.evoked.append((trough, cell.unit))

    def _shape(self, electrode: int, amplitude_ua: float) -> np.ndarray:
        """(samples, channels) codes of one pulse at one electrode. Channels keep their character between pulses."""
        key = (electrode, amplitude_ua)
        with self._shaping:
            if key not in self._shapes:
                self._shapes[key] = self._shaped(*key)
            return self._shapes[key]

    def _shaped(self, electrode: int, amplitude_ua: float) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence([77, electrode]))
        n, away = self.info.n_channels, self.info.positions - self.info.positions[electrode]
        far = 1 + (np.linalg.norm(away, axis=1) / REACH_UM) ** STEEPNESS
        rail = np.minimum(self._high - self.info.zero_code, self.info.zero_code - self._low) * np.ones(n)
        size = PULSE_UV * amplitude_ua / DEFAULT_UA * np.exp(0.3 * rng.normal(size=n)) / far / self.info.gains
        sign = np.where(rng.random(n) < 0.85, 1.0, -1.0)
        fast, slow = rng.uniform(*FAST_MS, n), rng.uniform(*SLOW_MS, n)
        share = rng.uniform(0.4, 0.8, n)
        over = size > rail
        hold = np.where(over, np.clip(0.5 + 0.75 * np.log(np.maximum(size / rail, 1)), *HOLD_MS), 0.0)
        t = (np.arange(round(TAIL_MS * self._per_ms)) / self._per_ms)[:, None]
        after = t - 2 * PHASE_MS - hold
        rest = np.maximum(after, 0)
        decay = share * np.exp(-rest / fast) + (1 - share) * np.exp(-rest / slow)
        wave = np.where(over, 0.95 * rail, 0.3 * size) * decay * np.clip(4 * (1 - t / TAIL_MS), 0, 1)
        wave = np.where(after < 0, 1.5 * rail, wave)
        wave = np.where(t < PHASE_MS, -size, np.where(t < 2 * PHASE_MS, size, wave))
        return (sign * wave).astype(np.float32)


def rails(info: StreamInfo) -> tuple[float, float]:
    """Lowest and highest code of the converter; ten bits where a device counts up from 0."""
    if info.code_min is not None and info.code_max is not None:
        return float(info.code_min), float(info.code_max)
    if info.dtype == "uint16":
        return 0.0, 2.0 * info.zero_code - 1
    return (-32768.0, 32767.0) if info.dtype == "int16" else (-np.inf, np.inf)
