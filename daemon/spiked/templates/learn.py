"""From spike times and units to templates, on the calibration's cleaned samples.

Whoever found the spikes (a sorter run on the same minutes, RT-Sort's calibration, a curated session) gives times and
labels; everything else is measured here: the noise, the mean waveforms (overlaps taken out by matching with first templates and
averaging what remains), the filters, how far a unit's amplitude varies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from spiked.errors import SpikedError
from spiked.templates.averages import mean_waveforms
from spiked.templates.library import Templates
from spiked.templates.noise import Noise, measure_noise
from spiked.templates.sorter import TemplateSorter

BEFORE_MS, FILTER_MS, WAVEFORM_MS = 0.5, 1.0, 2.2  # before the trough; after it, of filters and of waveforms
COMPONENTS = 6
MIN_SPIKES = 20  # of a unit, for a template
MAX_SPIKES = 600  # averaged at most, of each unit
MAX_ELECTRODES = 40
SIGNIFICANT = 2.5  # times the energy that noise leaves in a mean waveform
PRUNE = 0.03  # of a unit's largest filter: electrodes below are left out
ALIGN_MS = 0.7
AMPLITUDE_SD, LEAST_SD, LOW, HIGH = 0.12, 0.08, 0.5, 1.8
THRESHOLD = 35.0
AGREE_MS = 0.3  # a matched spike this close to one that was given is the same

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Found:
    """Spikes somebody found: positions in the samples, in time order, and the index of the unit of each."""

    sample: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(cls, sample: np.ndarray, unit: np.ndarray) -> Found:
        """From parallel arrays in any order, any labels; units with fewer than MIN_SPIKES spikes are left out."""
        _, index, counts = np.unique(unit, return_inverse=True, return_counts=True)
        keep = counts[index] >= MIN_SPIKES
        order = np.argsort(sample[keep], kind="stable")
        _, index = np.unique(index[keep], return_inverse=True)
        return cls(np.asarray(sample)[keep][order].astype(np.int64), index[order].astype(np.int64))

    @property
    def n_units(self) -> int:
        return int(self.unit.max(initial=-1)) + 1


def _some(unit: np.ndarray, n_units: int) -> np.ndarray:
    """(spikes,) bool: at most MAX_SPIKES of every unit, always the same ones."""
    used = np.zeros(len(unit), bool)
    rng = np.random.default_rng(0)
    for u in range(n_units):
        mine = np.flatnonzero(unit == u)  # -1: of no unit
        used[rng.choice(mine, min(len(mine), MAX_SPIKES), replace=False)] = True
    return used


def _components(waveforms: np.ndarray) -> np.ndarray:
    """(COMPONENTS, samples) float32 orthonormal: what filters (n, samples) have in common, large ones not outweighing all."""
    norm = np.linalg.norm(waveforms, axis=1, keepdims=True)
    _, _, v = np.linalg.svd(waveforms / np.sqrt(np.maximum(norm, 1e-9)), full_matrices=False)
    return np.ascontiguousarray(v[:COMPONENTS], np.float32)


def _electrodes(
    mean: np.ndarray, noise: Noise, n_spikes: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Electrodes that see a unit, those of its filter, and the filter (channels, length) on all electrodes.

    mean (channels, samples). An electrode sees the unit when it holds clearly more energy than the noise of a mean of n_spikes; those
    that only help against correlated noise come with the filter.
    """
    early = mean[:, :length]
    energy = (early**2).sum(1) * np.diag(noise.precision)
    seen = energy > SIGNIFICANT * length / max(n_spikes, 1)
    seen[np.argmax(energy)] = True
    f = noise.precision @ np.where(seen[:, None], early, 0)
    norm = np.linalg.norm(f, axis=1)
    n_used = min(int((norm > PRUNE * norm.max()).sum()), MAX_ELECTRODES)
    return np.flatnonzero(seen), np.sort(np.argsort(-norm, kind="stable")[:n_used]), f


def assemble(
    mean: np.ndarray, noise: Noise, n_spikes: np.ndarray, seconds: float, fs_hz: float, channel_ids: tuple[str, ...],
    positions_um: np.ndarray, amplitude_uv: np.ndarray,
) -> Templates:  # fmt: skip
    """Templates of mean waveforms (units, channels, samples), with first guesses of the limits.

    amplitude_uv (units, channels): the cleaned samples at the trough; the root is where that is lowest.
    """
    before, length = _span(fs_hz)[0], _span(fs_hz)[1]
    n = len(mean)
    per_unit = [_electrodes(mean[u], noise, int(n_spikes[u]), length) for u in range(n)]
    basis = _components(np.concatenate([f[used] for _, used, f in per_unit]))
    roots = amplitude_uv.argmin(1)

    def every(value: float) -> np.ndarray:
        return np.full(n, value, np.float32)

    return Templates(
        fs_hz=fs_hz, channel_ids=channel_ids, positions_um=positions_um, sos=noise.sos, taps=noise.taps, precision=noise.precision,
        before=before, basis=basis, unit_ids=np.arange(n), roots=roots, root_amplitude_uv=amplitude_uv[np.arange(n), roots],
        n_spikes=n_spikes, rate_hz=n_spikes / seconds, amplitude_sd=every(AMPLITUDE_SD), threshold=every(THRESHOLD), low=every(LOW),
        high=every(HIGH), id_confidence=every(0),
        ptr=_pointers([used for _, used, _ in per_unit]), channel=np.concatenate([used for _, used, _ in per_unit]),
        weight=np.concatenate([f[used] @ basis.T for _, used, f in per_unit]),
        wave_ptr=_pointers([seen for seen, _, _ in per_unit]), wave_channel=np.concatenate([seen for seen, _, _ in per_unit]),
        waveform=np.concatenate([mean[u, seen] for u, (seen, _, _) in enumerate(per_unit)]),
    )  # fmt: skip


def _pointers(lists: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(e) for e in lists])])


def _span(fs_hz: float) -> tuple[int, int, int]:
    """Samples before the trough, of a filter, of a waveform."""
    before, late, later = (round(ms * fs_hz / 1000) for ms in (BEFORE_MS, FILTER_MS, WAVEFORM_MS))
    return before, before + late + 1, before + later + 1


def _trough(x: np.ndarray, found: Found, used: np.ndarray, reach: int) -> np.ndarray:
    """(units, channels, 2 reach + 1): mean cleaned samples around the spikes."""
    n, out = found.n_units, np.zeros((found.n_units, len(x), 2 * reach + 1), np.float32)
    lags = np.arange(-reach, reach + 1)
    inside = used & (found.sample >= reach) & (found.sample < x.shape[1] - reach)
    for u in range(n):
        at = found.sample[inside & (found.unit == u)][:, None] + lags
        for c in range(len(x)):
            out[u, c] = x[c][at].mean(0, dtype=np.float32)
    return out


def _aligned(x: np.ndarray, found: Found, used: np.ndarray, reach: int) -> tuple[Found, np.ndarray]:
    """The spikes with every unit's times moved to its mean trough, and the amplitudes there (units, channels)."""
    around = _trough(x, found, used, reach)
    n = len(around)
    at = around.min(2).argmin(1)
    shift = around[np.arange(n), at].argmin(1) - reach
    sample = found.sample + shift[found.unit]
    order = np.argsort(sample, kind="stable")
    return Found(sample[order], found.unit[order]), around[np.arange(n), :, shift + reach]


def learn(
    x: np.ndarray, sample: np.ndarray, unit: np.ndarray, fs_hz: float, positions_um: np.ndarray, channel_ids: tuple[str, ...],
    first_sample: int = 0, source: dict[str, str] | None = None, progress: Progress = lambda _f, _t: None,
) -> Templates:  # fmt: skip
    """Templates of the units whose spikes are given.

    x (channels, n) cleaned microvolts of any float type; sample (spikes,) positions in it, unit (spikes,) any labels. Raises SpikedError
    when no unit has enough spikes.
    """
    found = Found.of(sample, unit)
    if found.n_units == 0:
        raise SpikedError(
            f"no unit has {MIN_SPIKES} spikes in the calibration; record longer (live.calibrate_s) or check the signal"
        )
    seconds = x.shape[1] / fs_hz
    progress(0.0, "measuring the noise")
    noise = measure_noise(x, positions_um, fs_hz)
    before, _, long = _span(fs_hz)
    found, amplitude_uv = _aligned(x, found, _some(found.unit, found.n_units), round(ALIGN_MS * fs_hz / 1000))
    n = found.n_units
    progress(0.2, "averaging waveforms")
    ones = np.ones(len(found.sample))
    used = _some(found.unit, n)
    mean = mean_waveforms(x, noise, found.sample, found.unit, ones, used, before, long, n)
    counts = np.bincount(found.unit, minlength=n)

    def make() -> Templates:
        return assemble(mean, noise, counts, seconds, fs_hz, channel_ids, positions_um, amplitude_uv)

    templates = make()
    progress(0.4, "matching the calibration")
    spikes, amplitude = matched(templates, x)
    agreed = _also_in(spikes, found, round(AGREE_MS * fs_hz / 1000))
    progress(0.7, "averaging waveforms without overlaps")
    used = _some(np.where(agreed, spikes.unit, -1), n)
    again = mean_waveforms(x, noise, spikes.sample, spikes.unit, amplitude, used, before, long, n, mean)
    enough = np.bincount(spikes.unit[used], minlength=n) >= MIN_SPIKES
    mean = np.where(enough[:, None, None], again, mean)
    templates = replace(make(), amplitude_sd=_spread(templates, spikes, amplitude, agreed))
    stop = first_sample + x.shape[1]
    return replace(templates, source=source or {}, first_sample=first_sample, stop_sample=stop)


def _also_in(a: Found, b: Found, reach: int) -> np.ndarray:
    """(spikes of a,) bool: b has a spike of the same unit within `reach` samples."""
    span = int(max(a.sample.max(initial=0), b.sample.max(initial=0))) + 2 * reach + 1
    have, keys = np.sort(b.unit * span + b.sample), a.unit * span + a.sample
    return np.searchsorted(have, keys - reach, "left") < np.searchsorted(have, keys + reach, "right")


def _spread(t: Templates, spikes: Found, amplitude: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """(units,) SD of a spike's amplitude about the unit's, without what the noise adds; robust."""
    energy, out = t.gram.energy, np.full(len(t), AMPLITUDE_SD, np.float32)
    for u in range(len(t)):
        a = amplitude[sure & (spikes.unit == u)]
        if len(a) >= MIN_SPIKES:
            sd = np.median(np.abs(a - np.median(a))) / 0.6745
            out[u] = np.sqrt(max(sd**2 - 1 / max(energy[u], 1.0), LEAST_SD**2))
    return out


def matched(templates: Templates, x: np.ndarray, piece: int = 1 << 15) -> tuple[Found, np.ndarray]:
    """Every spike the live sorter finds in x (channels, n): positions and unit index, and the amplitudes."""
    sorter = TemplateSorter(templates.with_ids(np.arange(len(templates))), track=False)
    parts = [
        sorter.process(np.ascontiguousarray(x[:, a : a + piece], np.float32), None, a)
        for a in range(0, x.shape[1], piece)
    ]
    spikes = np.concatenate([*parts, sorter.flush()])
    spikes = spikes[np.argsort(spikes["sample"], kind="stable")]
    unit = spikes["unit"].astype(np.int64)
    amplitude = spikes["amplitude_uv"] / templates.root_amplitude_uv[unit]
    return Found(spikes["sample"].astype(np.int64), unit), amplitude.astype(np.float64)
