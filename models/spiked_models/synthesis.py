"""Ground-truth extracellular recordings from our own generator (numpy and scipy only, no torch).

Used to train the detection networks, by `spiked simulate`, the demo and the tests. Voltages in microvolt,
positions in micrometre, codes as an ADC would give them: microvolt = (code - zero_code) * lsb_uv.

    rec = synthesize(hdmea_grid(8, 8), fs_hz=20_000, duration_s=60, n_units=14, seed=1)
    rec.codes                       # (samples, channels)
    rec.spikes                      # structured array SPIKE, sorted by sample
    for codes, spikes in rec.blocks(20):     # the same stream in pieces, never held in memory

`duration_s=None` streams without end. The stream depends on the seed alone, not on how it is cut. Noise is
drawn fresh throughout, never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.signal import lfilter

from spiked_models.cells import OVERSAMPLE, Template, make_template

BLOCK_S = 0.1  # internal block of the stream
# One row per spike: sample of the trough on the root channel, unit, root channel, its peak there in microvolt
# (negative), that peak over the channel's noise SD, factor on the unit's template, sub-sample shift.
SPIKE = np.dtype([("sample", "<i8"), ("unit", "<i4"), ("channel", "<i4"), ("peak_uv", "<f4"), ("snr", "<f4"),
                  ("scale", "<f4"), ("shift", "<i4")])  # fmt: skip


def hdmea_grid(rows: int, cols: int, pitch_um: float = 17.5) -> np.ndarray:
    """(rows * cols, 2) positions x, y of a square electrode grid, row by row."""
    y, x = np.mgrid[:rows, :cols]
    return np.stack([x.ravel(), y.ravel()], 1) * float(pitch_um)


def neuropixels(n: int) -> np.ndarray:
    """(n, 2) positions of the first n sites of a Neuropixels 1.0 bank: staggered, rows 20 um apart."""
    site = np.arange(n)
    row = site // 2
    x = np.where(row % 2 == 0, 27.0, 11.0) + 32.0 * (site % 2)
    return np.stack([x, row * 20.0], 1)


@dataclass(frozen=True)
class Unit:
    """A neuron: its template, its trough on the root channel (microvolt, negative) and how it fires."""

    template: Template
    peak_uv: float
    snr: float
    rate_hz: float
    burst_p: float  # chance that a spike is followed by another 3 to 8 ms later
    jitter: float  # SD of the logarithm of the amplitude
    background: bool
    burst_decay: float = 0.85  # of the amplitude from one spike of a burst to the next
    burst_ms: tuple[float, float] = (3.0, 8.0)  # intervals in a burst
    population_hz: float = 0.0  # rate within a population burst, if it takes part


@dataclass(frozen=True)
class Noise:
    """Electrode and tissue noise. `uv` is the total SD in microvolt of a channel, before background units."""

    uv: float = 6.0
    spread: float = 0.1  # SD of the logarithm over channels
    tissue: float = (
        0.5  # share of the variance that is tissue noise, correlated in space, falling towards 1/f
    )
    tissue_um: float = 60.0  # its correlation length
    low_hz: float = 5.0  # below this corner tissue noise is flat
    colour: float = 0.0  # share of the electrode noise that is low-passed at 2 kHz
    drift_uv: float = 0.0  # SD of a slow wandering baseline (about 1 s)
    offset_uv: float = 0.0  # SD over channels of a constant offset
    common: float = 0.0  # of what every channel has in common (the reference's noise), relative to `uv`
    lfp_uv: float = 0.0  # SD of a local field potential of 1 to 100 Hz, varying slowly over the array
    hum_uv: float = 0.0  # amplitude of the mains at 50 Hz, with harmonics


@dataclass(frozen=True)
class Adc:
    """Codes = round(microvolt / lsb_uv) + zero_code, clipped to [code_min, code_max]."""

    lsb_uv: float = 0.195
    zero_code: int = 0
    dtype: str = "int16"
    code_min: int = -32768
    code_max: int = 32767


MAXWELL = Adc(lsb_uv=3.14, zero_code=512, dtype="uint16", code_min=0, code_max=1023)
NEUROPIXELS = Adc(lsb_uv=2.34375, zero_code=0, dtype="int16", code_min=-512, code_max=511)
NEUROPIXELS_2 = Adc(lsb_uv=3.05176, zero_code=0, dtype="int16", code_min=-2048, code_max=2047)
OPEN_EPHYS = Adc()


def _rng(seed: int, *tag: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, *tag]))


class _Population:
    """Population bursts as an endless stream, the same for all units: (start, stop) in samples."""

    def __init__(self, rate_hz: float, fs_hz: float, rng: np.random.Generator) -> None:
        self.rate, self.fs, self.rng = rate_hz, fs_hz, rng
        self.bursts: list[tuple[float, float]] = []

    def at(self, index: int) -> tuple[float, float]:
        while len(self.bursts) <= index:
            rest = self.rng.exponential(1 / self.rate) + 0.1
            start = (self.bursts[-1][1] if self.bursts else 0.0) + rest * self.fs
            self.bursts.append((start, start + self.rng.uniform(0.05, 0.3) * self.fs))
        return self.bursts[index]


class _Train:
    """Spike times of one unit as an endless stream: refractory period, gamma-like intervals, bursts."""

    REFRACTORY_MS = 2.0

    def __init__(
        self, unit: Unit, fs_hz: float, rng: np.random.Generator, population: _Population | None = None
    ) -> None:
        self.unit, self.fs, self.rng = unit, fs_hz, rng
        self.population = population if unit.population_hz > 0 else None
        self.in_burst, self.ahead = 0, 0
        self.next = rng.exponential(fs_hz / unit.rate_hz)

    def until(self, stop: int) -> list[tuple[float, float]]:
        """(time in samples, amplitude factor) of the spikes before `stop` that were not handed out yet."""
        out = []
        while self.next < stop:
            factor = np.exp(self.rng.normal(0, self.unit.jitter)) * self.unit.burst_decay**self.in_burst
            out.append((self.next, float(factor)))
            if self.rng.random() < self.unit.burst_p and self.in_burst < 4:
                self.in_burst += 1
                gap_ms = self.rng.uniform(*self.unit.burst_ms)
            else:
                self.in_burst = 0
                gap_ms = self.REFRACTORY_MS + self.rng.exponential(1000 / self.unit.rate_hz)
            self.next = self._joined(self.next, self.next + gap_ms * self.fs / 1000)
        return out

    def _joined(self, now: float, planned: float) -> float:
        """The next spike, with population bursts: in them, intervals of their rate take the place of its own."""
        if self.population is None or self.in_burst:
            return planned
        rest, fast = self.REFRACTORY_MS * self.fs / 1000, self.fs / self.unit.population_hz
        while True:
            start, stop = self.population.at(self.ahead)
            if planned <= start:
                return planned
            soon = max(now + rest, start) + self.rng.exponential(fast)
            if soon < stop:
                return soon
            self.ahead += 1
            planned = max(now + rest, stop) + self.rng.exponential(self.fs / self.unit.rate_hz)


class _NoiseStream:
    """Continuous noise, block after block: (channels, samples) float32 microvolt."""

    def __init__(
        self, positions_um: np.ndarray, fs_hz: float, noise: Noise, seed: int, sd_uv: np.ndarray
    ) -> None:
        self.rng = _rng(seed, 2)
        self.noise, n = noise, len(positions_um)
        sources = min(n, max(4, min(round(n / 4), 96)))
        places = positions_um[self.rng.choice(n, sources, replace=False)]
        apart = np.linalg.norm(positions_um[:, None] - places[None], axis=2)
        mix = np.exp(-((apart / noise.tissue_um) ** 2)) * self.rng.normal(size=sources) + 1e-6
        mix /= np.linalg.norm(mix, axis=1, keepdims=True)
        self.mix = (mix * sd_uv[:, None] * np.sqrt(noise.tissue)).astype(np.float32)
        self.white_uv = (sd_uv * np.sqrt(1 - noise.tissue)).astype(np.float32)[:, None]
        # A sum of first-order low-passes at octave-spaced corners falls as 1/f between the outer two.
        corners = np.geomspace(max(noise.low_hz, 1.0), min(3000.0, 0.3 * fs_hz), 4)
        self.poles = np.exp(-2 * np.pi * corners / fs_hz)
        self.memory = [np.zeros((sources, 1)) for _ in self.poles]
        self.colour_pole = float(np.exp(-2 * np.pi * 2000 / fs_hz))
        self.colour_memory = np.zeros((n, 1), np.float32)
        self.slow_pole = float(np.exp(-1 / fs_hz))
        self.slow = self.rng.normal(size=sources)
        self.offset = (self.rng.normal(size=(n, 1)) * noise.offset_uv).astype(np.float32)
        self.fs, self.at = fs_hz, 0
        far = (positions_um - positions_um.mean(0)) / 300.0
        plane = np.concatenate([np.ones((n, 1)), far, far[:, :1] * far[:, 1:]], 1)
        self.field_mix = plane / np.linalg.norm(plane, axis=1, keepdims=True)
        self.field_poles = np.exp(-2 * np.pi * np.array([2.0, 10.0, 40.0, 90.0]) / fs_hz)
        self.field_memory = [np.zeros((plane.shape[1], 1)) for _ in self.field_poles]

    def next(self, n: int) -> np.ndarray:
        out = self.rng.standard_normal((len(self.mix), n), dtype=np.float32)
        if self.noise.colour > 0:
            a, share = np.float32(self.colour_pole), self.noise.colour
            b = np.array([np.sqrt(1 - a * a)], np.float32)
            back = np.array([1, -a], np.float32)
            soft, self.colour_memory = lfilter(b, back, out, axis=1, zi=self.colour_memory)
            out *= 1 - share
            out += share * soft
            # White and low-passed part share their source; this restores a variance of 1.
            out /= np.sqrt((1 - share) ** 2 + share**2 + 2 * share * (1 - share) * np.sqrt(1 - a * a))
        out *= self.white_uv
        tissue = np.zeros((self.mix.shape[1], n))
        for i, a in enumerate(self.poles):
            drive = self.rng.standard_normal(tissue.shape)
            part, self.memory[i] = lfilter([np.sqrt(1 - a * a)], [1, -a], drive, axis=1, zi=self.memory[i])
            tissue += part
        out += self.mix @ (tissue / np.sqrt(len(self.poles))).astype(np.float32)
        if self.noise.drift_uv > 0:
            end = self.slow * self.slow_pole**n + self.rng.normal(size=self.slow.shape) * np.sqrt(
                1 - self.slow_pole ** (2 * n)
            )
            line = np.linspace(self.slow, end, n, endpoint=False, axis=1)
            share = self.mix / np.linalg.norm(self.mix, axis=1, keepdims=True)
            out += (share @ line).astype(np.float32) * np.float32(self.noise.drift_uv)
            self.slow = end
        out += self.offset
        if self.noise.common > 0:
            out += self.rng.standard_normal((1, n), dtype=np.float32) * np.float32(
                self.noise.common * self.noise.uv
            )
        if self.noise.lfp_uv > 0:
            out += self._field(n)
        if self.noise.hum_uv > 0:
            turn = 2 * np.pi * 50 * (self.at + np.arange(n)) / self.fs
            hum = sum(np.sin(k * turn + k) / k**1.5 for k in (1, 2, 3, 5))
            out += (self.noise.hum_uv * hum).astype(np.float32)
        self.at += n
        return out

    def _field(self, n: int) -> np.ndarray:
        """Local field potential: low-passed noise at four corners, over the array a slowly varying mixture."""
        field = np.zeros((self.field_mix.shape[1], n))
        for i, a in enumerate(self.field_poles):
            drive = self.rng.standard_normal(field.shape)
            part, self.field_memory[i] = lfilter(
                [np.sqrt(1 - a * a)], [1, -a], drive, axis=1, zi=self.field_memory[i]
            )
            field += part / np.sqrt(len(self.field_poles))
        return (self.field_mix @ field * self.noise.lfp_uv).astype(np.float32)


@dataclass(frozen=True)
class Recording:
    """A recording that is made when it is read; see the module docstring. `n_samples` None: endless."""

    positions_um: np.ndarray  # (channels, 2)
    fs_hz: float
    n_samples: int | None
    seed: int
    units: tuple[Unit, ...]  # the known units first, background units after them
    noise: Noise
    noise_sd_uv: np.ndarray  # (channels,)
    adc: Adc
    population_hz: float = 0.0  # population bursts per second
    _cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_channels(self) -> int:
        return len(self.positions_um)

    @property
    def n_units(self) -> int:
        return sum(not u.background for u in self.units)

    @property
    def lsb_uv(self) -> float:
        return self.adc.lsb_uv

    @property
    def zero_code(self) -> int:
        return self.adc.zero_code

    def blocks(self, n_samples: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From the start: codes (n_samples, channels), and the known spikes with their trough in them.

        The last block may be shorter. Sample numbers count from 0.
        """
        for codes, spikes in self._cut(n_samples):
            yield codes, spikes[spikes["unit"] < self.n_units]

    def placed(self) -> np.ndarray:
        """SPIKE rows of every unit, background included (unit >= n_units)."""
        self._make()
        return self._cache["placed"]

    @cached_property
    def codes(self) -> np.ndarray:
        """(samples, channels) in the ADC's dtype. Raises ValueError for an endless recording."""
        self._make()
        return self._cache["codes"]

    @cached_property
    def spikes(self) -> np.ndarray:
        """SPIKE rows of the known units, by sample."""
        placed = self.placed()
        return placed[placed["unit"] < self.n_units]

    def microvolts(self) -> np.ndarray:
        """(samples, channels) float32."""
        return (self.codes.astype(np.float32) - self.zero_code) * np.float32(self.lsb_uv)

    def _make(self) -> None:
        if "codes" in self._cache:
            return
        if self.n_samples is None:
            raise ValueError("this recording has no end; read it with blocks(), or give duration_s")
        parts = list(self._cut(max(1, round(self.fs_hz))))
        empty = np.empty((0, self.n_channels), self.adc.dtype)
        self._cache["codes"] = np.concatenate([empty, *(c for c, _ in parts)])
        self._cache["placed"] = np.concatenate([np.empty(0, SPIKE), *(s for _, s in parts)])

    def _cut(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if n < 1:
            raise ValueError(f"a block of {n} samples is empty; give at least 1")
        codes = np.empty((0, self.n_channels), self.adc.dtype)
        spikes, first = np.empty(0, SPIKE), 0
        for more, found in self._stream():
            codes = np.concatenate([codes, more]) if len(codes) else more
            spikes = np.concatenate([spikes, found]) if len(spikes) else found
            at = 0
            while len(codes) - at >= n:
                inside = spikes["sample"] < first + n
                yield codes[at : at + n], spikes[inside]
                spikes, at, first = spikes[~inside], at + n, first + n
            codes = codes[at:]
        if len(codes):
            yield codes, spikes[spikes["sample"] < first + len(codes)]

    def _stream(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Internal blocks: codes, and all spikes with their trough before the block's end, by sample."""
        length = max(1, round(BLOCK_S * self.fs_hz))
        frames = max((u.template.waves.shape[2] for u in self.units), default=0)
        noise = _NoiseStream(self.positions_um, self.fs_hz, self.noise, self.seed, self.noise_sd_uv)
        together = (
            _Population(self.population_hz, self.fs_hz, _rng(self.seed, 5))
            if self.population_hz > 0
            else None
        )
        trains = [_Train(u, self.fs_hz, _rng(self.seed, 3, i), together) for i, u in enumerate(self.units)]
        trace = np.zeros((self.n_channels, length + frames), np.float32)
        done, waiting = 0, np.empty(0, SPIKE)
        while self.n_samples is None or done < self.n_samples:
            rows = []
            for i, train in enumerate(trains):
                for time, scale in train.until(done + length):
                    rows.append(self._place(trace, i, time, scale, done))
            trace[:, :length] += noise.next(length)
            codes = np.rint(trace[:, :length].T / np.float32(self.lsb_uv)) + self.zero_code
            codes = np.clip(codes, self.adc.code_min, self.adc.code_max, out=codes).astype(self.adc.dtype)
            waiting = np.sort(np.concatenate([waiting, np.array(rows, SPIKE)]), order="sample")
            trace[:, :frames] = trace[:, length:]
            trace[:, frames:] = 0
            done += length
            stop = done if self.n_samples is None else min(done, self.n_samples)
            ready = waiting["sample"] < stop
            yield np.ascontiguousarray(codes[: stop - done + length]), waiting[ready]
            waiting = waiting[~ready]

    def _place(self, trace: np.ndarray, i: int, time: float, scale: float, done: int) -> tuple:
        """Add one spike whose template starts at `time`; its SPIKE row."""
        unit = self.units[i]
        fine = int(time * OVERSAMPLE)
        start, shift = divmod(fine, OVERSAMPLE)
        wave = unit.template.waves[shift]
        at = start - done
        trace[unit.template.channels, at : at + wave.shape[1]] += np.float32(abs(unit.peak_uv) * scale) * wave
        # A shift of half a frame or more moves the nearest sample to the trough by one.
        trough = start + unit.template.pre + (2 * shift >= OVERSAMPLE)
        return trough, i, unit.template.root, unit.peak_uv * scale, unit.snr * scale, scale, shift


def _somas(
    positions_um: np.ndarray, n: int, apart_um: float, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """n places under the array, at least `apart_um` from each other where they fit."""
    low, high = positions_um.min(0) - 10, positions_um.max(0) + 10
    out: list[tuple[float, float, float]] = []
    for _ in range(n):
        for _attempt in range(30):
            x, y = rng.uniform(low, high)
            z = 8 + rng.gamma(2.0, 9.0)
            if all((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 > apart_um**2 for a, b, c in out):
                break
        out.append((float(x), float(y), float(z)))
    return out


def synthesize(
    positions_um: np.ndarray, fs_hz: float, duration_s: float | None, n_units: int, seed: int = 0, *,
    noise: Noise | None = None, noise_uv: float = 6.0, adc: Adc | None = None,
    snr: tuple[float, float] = (5.0, 25.0), rate_hz: tuple[float, float] = (1.0, 15.0), burst_p: float = 0.1,
    amplitude_jitter: float = 0.08, n_background: int | None = None,
    background_snr: tuple[float, float] = (0.5, 2.5), inverted: float = 0.0, apart_um: float = 20.0,
    families: dict[str, float] | None = None, burst_decay: tuple[float, float] = (0.85, 0.85),
    burst_ms: tuple[float, float] = (3.0, 8.0), population_hz: float = 0.0,
) -> Recording:  # fmt: skip
    """A recording of `n_units` known units; nothing is generated until it is read.

    positions_um (channels, 2). snr, background_snr: peak on the root channel over its noise SD, drawn
    log-uniformly; rate_hz likewise. n_background: units too small to be sorted (default: one per channel, at
    most 100). inverted: share of units with the sign flipped. `noise` takes the place of `noise_uv`. families: share
    of units of each wave family (cells.make_template), cables where none is said. burst_decay: range of the factor on
    the amplitude from one spike of a burst to the next. population_hz: population bursts per second, in which three
    of four units fire at 20 to 120 Hz.
    Raises ValueError when an argument makes no recording.
    """
    positions = np.asarray(positions_um, float).reshape(-1, 2)
    if not len(positions) or fs_hz <= 0 or n_units < 0 or (duration_s is not None and duration_s <= 0):
        raise ValueError(
            f"{len(positions)} channels at {fs_hz} Hz for {duration_s} s with {n_units} units: no recording"
        )
    noise = noise or Noise(uv=noise_uv)
    rng = _rng(seed, 1)
    sd = noise.uv * np.exp(rng.normal(0, noise.spread, len(positions)))
    n_background = min(len(positions), 100) if n_background is None else n_background
    somas = _somas(positions, n_units, apart_um, rng) + _somas(positions, n_background, 0.0, rng)
    units = []
    for i, soma in enumerate(somas):
        own = _rng(seed, 4, i)
        background = i >= n_units
        flipped, family = own.random() < inverted, _family(families, own)
        template = make_template(positions, fs_hz, soma, own, 0.1 if background else 0.02, flipped, family)
        target = float(np.exp(own.uniform(*np.log(background_snr if background else snr))))
        upward = template.waves[0, np.searchsorted(template.channels, template.root), template.pre] > 0
        peak = target * float(sd[template.root]) * (1 if upward else -1)
        bursts = 0.0 if background else burst_p * own.uniform(0, 2)
        rate = float(np.exp(own.uniform(*np.log(rate_hz))))
        decay = float(own.uniform(*burst_decay)) if burst_decay[0] < burst_decay[1] else burst_decay[0]
        joins = population_hz > 0 and own.random() < 0.75
        together = float(own.uniform(20, 120)) if joins else 0.0
        units.append(
            Unit(
                template, peak, target, rate, bursts, amplitude_jitter, background, decay, burst_ms, together
            )
        )  # fmt: skip
    n_samples = None if duration_s is None else round(duration_s * fs_hz)
    return Recording(
        positions, float(fs_hz), n_samples, seed, tuple(units), noise, sd, adc or Adc(), population_hz
    )


def _family(families: dict[str, float] | None, rng: np.random.Generator) -> str:
    """The wave family of a unit; no number is drawn where there is no choice."""
    if not families:
        return "cable"
    shares = np.array(list(families.values()))
    return str(rng.choice(list(families), p=shares / shares.sum()))
