"""`spiked bench stim`: spikes after stimuli, and what the removal of artifacts costs.

Accuracy: a recording with known spikes and stimuli whose start is free of stimuli passes through the live pipeline; units are
found in that start, the rest is sorted with them. The true spikes of the units that are found well outside the time after
stimuli are counted by the time since clipping ended on all electrodes. With `--control`, the same spikes without artifacts tell
how much of what is missing the artifact is to blame for: evoked spikes overlap, with or without it.
Cost: processor time of the removal alone, noise with clipping artifacts at 50 Hz on every channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiked.bench.figures import WINDOW_MS, head, row, spread
from spiked.bench.machine import conditions
from spiked.bench.passes import feed, find_matching, find_units
from spiked.clean.stim import StimCleaner
from spiked.config import Live, Stim
from spiked.errors import ConfigError
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline, Units
from spiked.live.process import load_network
from spiked.live.taken import Taken
from spiked.sources.recordings import Recording, open_recording
from spiked.stream import EventKind, StreamInfo
from spiked_client.protocol import SPIKE

BINS_MS = (
    (0.0, 1.0),
    (1.0, 2.0),
    (2.0, 20.0),
    (2.0, 4.0),
    (4.0, 8.0),
    (8.0, 20.0),
    (20.0, 60.0),
    (60.0, 200.0),
)
AFAR_MS = 200.0  # outside the time after stimuli
WELL = 0.5  # recall and precision there of the units that are counted
FALSE_MS = 20.0


def bench(
    recording: Path, calibrate_s: float, network: str = "auto", control: Path | None = None, half_window_ms: float | None = None,
    chunk_ms: float = 5.0, threads: int = 1, channels: int = 1024, sorter: str = "rt_sort", say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Recall and precision by time since clipping, with the removal, without it, and of `control`; the removal's cost."""
    torch.set_num_threads(threads)
    machine = conditions()
    settings = Stim() if half_window_ms is None else Stim(half_window_ms=half_window_ms)
    with open_recording(recording) as rec:
        stims = [(e.sample, e.line) for e in rec.events if e.kind is EventKind.STIM]
        start = rec.info.samples(calibrate_s * 1000)
        if rec.ground_truth is None or not stims or stims[0][0] < start + rec.first_sample:
            raise ConfigError(
                f"{recording}: this benchmark needs known spikes, and stimuli only after the first {calibrate_s:g} s"
            )
        ended = clipped_until(rec, np.array([s for s, _ in stims]))
        sort = _Sorting(rec, start, network, chunk_ms, threads, sorter)
        say(f"{len(sort.units)} units in {calibrate_s:g} s without stimuli; {len(stims)} stimuli")
        runs = {"cleaned": (rec, settings), "as it came": (rec, Stim(enabled=False))}
        by_time = {}
        if control is not None:
            with open_recording(control) as other:
                by_time["no artifact"] = after_stimuli(
                    rec, sort.run(other, Stim(enabled=False), stims), stims, ended, start
                )
        for name, (source, how) in runs.items():
            by_time[name] = after_stimuli(rec, sort.run(source, how, stims), stims, ended, start)
        info = rec.info
    for line in shown(by_time):
        say(line)
    return {
        "bench": "stim", "machine": machine, "recording": str(recording), "channels": info.n_channels, "fs_hz": info.fs_hz,
        "sorter": sorter, "network": sort.network.name, "half_window_ms": settings.half_window_ms, "stimuli": len(stims), "units": len(sort.units),
        "after_stimuli": by_time, "cost": cost(channels, settings),
    }  # fmt: skip


def shown(by_time: dict[str, Any]) -> list[str]:
    """A table: recall and precision by time since clipping."""
    names = [f"{lo:g} to {hi:g} ms" for lo, hi in BINS_MS]
    lines = head("samples", "units", "outside", *names, "false per stimulus and 100 el.")
    for name, r in by_time.items():
        cells = [f"{b['recall']} / {b['precision']}" for b in r["bins"]]
        outside = f"{r['recall_outside']} / {r['precision_outside']}"
        lines.append(row(name, r["units"], outside, *cells, r["false_per_stimulus_and_100_electrodes"]))
    return lines


class _Sorting:
    """Units of the recording's start, and the rest sorted with them."""

    def __init__(
        self, rec: Recording, start: int, network: str, chunk_ms: float, threads: int, sorter: str
    ) -> None:
        info = rec.info
        self.start, self.step = start, max(1, info.samples(chunk_ms))
        self.config = Live(chunk_ms=chunk_ms, threads=threads)
        self.network = load_network(network, info.fs_hz, "cpu", info.n_channels, threads)
        taken = Taken(info.n_channels, start)
        pipeline = LivePipeline(info, self.network, self.config, tap=taken.add)
        feed(pipeline, rec, 0, start, self.step, Latency())
        self.units: Units = (
            find_matching(pipeline, taken, "auto", network)
            if sorter == "templates"
            else find_units(pipeline, taken)
        )
        self.scaling = pipeline.scaling

    def run(self, rec: Recording, settings: Stim, stims: list[tuple[int, int]]) -> np.ndarray:
        """SPIKE records of the recording after its start; a second more is passed first, to know the noise."""
        p = LivePipeline(rec.info, self.network, self.config, self.units, scaling=self.scaling, stim=settings)
        for sample, line in stims:
            p.mark_stim(sample - rec.first_sample, line + 1)
        before = max(0, self.start - rec.info.samples(1000))
        found = [*feed(p, rec, before, rec.n_samples, self.step, Latency()), p.flush()]
        spikes = np.concatenate([np.zeros(0, SPIKE), *found])
        return spikes[spikes["sample"] >= self.start]


def clipped_until(rec: Recording, stims: np.ndarray) -> np.ndarray:
    """(stimuli,) the sample, from 0, at which the last electrode leaves the rails; before the next stimulus."""
    at, n = stims - rec.first_sample, rec.info.samples(20)
    low, high = rec.info.code_min, rec.info.code_max
    out = at.copy()
    for i, k in enumerate(at):
        stop = min(rec.n_samples, k + n, at[i + 1] if i + 1 < len(at) else rec.n_samples)
        x = rec.read(int(k), int(stop))
        bad = (x <= (-np.inf if low is None else low)) | (x >= (np.inf if high is None else high))
        rows = np.flatnonzero(bad.any(1))
        out[i] = k + (rows[-1] + 1 if len(rows) else 0)
    return out


def after_stimuli(
    rec: Recording, spikes: np.ndarray, stims: list[tuple[int, int]], ended: np.ndarray, start: int
) -> dict[str, Any]:
    """Recall and precision by time since clipping, of the units that are well outside, and false spikes per stimulus."""
    truth, ms = rec.ground_truth, rec.info.fs_hz / 1000
    assert truth is not None
    reach = round(WINDOW_MS * ms)
    at = np.array([s for s, _ in stims]) - rec.first_sample
    samples = truth.samples - rec.first_sample
    inside = samples >= start
    samples, units = samples[inside], truth.units[inside]

    def since(t: np.ndarray) -> np.ndarray:
        i = np.searchsorted(at, t, "right") - 1
        return np.where(i < 0, np.inf, (t - ended[np.maximum(i, 0)]) / ms)

    counts = {b: np.zeros(4, np.int64) for b in (*BINS_MS, (AFAR_MS, np.inf))}
    used = 0
    for unit in np.unique(units):
        true = samples[units == unit]
        far = true[since(true) > AFAR_MS]
        found = _partner(far, spikes, reach)
        told, right = match(true, found, reach)
        a, b = since(true), since(found)
        if not (a > AFAR_MS).any() or told[a > AFAR_MS].mean() < WELL or right[b > AFAR_MS].mean() < WELL:
            continue
        used += 1
        for (lo, hi), c in counts.items():
            i, j = (a >= lo) & (a < hi), (b >= lo) & (b < hi)
            c += told[i].sum(), i.sum(), right[j].sum(), j.sum()
    ref = counts[(AFAR_MS, np.inf)]
    recall, precision = ref[0] / max(1, ref[1]), ref[2] / max(1, ref[3])
    rows = [
        {"from_ms": lo, "to_ms": hi, "spikes": int(c[1]), "recall": _share(c[0], c[1]), "precision": _share(c[2], c[3]),
         "recall_of_outside": _share(c[0], c[1] * recall), "precision_of_outside": _share(c[2], c[3] * precision)}
        for (lo, hi), c in counts.items() if np.isfinite(hi)
    ]  # fmt: skip
    wrong = ~match(samples, np.unique(spikes["sample"]), reach, one_to_one=False)[1]
    times = np.unique(spikes["sample"])[wrong]
    i = np.searchsorted(at, times, "right") - 1
    soon = (i >= 0) & (times - at[np.maximum(i, 0)] < FALSE_MS * ms)
    return {
        "units": used, "recall_outside": round(float(recall), 4), "precision_outside": round(float(precision), 4), "bins": rows,
        "false_per_stimulus_and_100_electrodes": round(float(soon.sum()) / len(at) * 100 / rec.info.n_channels, 4),
    }  # fmt: skip


def _share(a: float, b: float) -> float | None:
    return round(float(a / b), 4) if b else None


def _partner(true: np.ndarray, spikes: np.ndarray, reach: int) -> np.ndarray:
    """Samples of the sorted unit that shares most with these true spikes."""
    best, most = np.zeros(0, np.int64), 0
    for unit in np.unique(spikes["unit"]):
        own = np.sort(spikes["sample"][spikes["unit"] == unit])
        n = int(match(true, own, reach)[0].sum())
        if n > most:
            best, most = own, n
    return best


def match(
    true: np.ndarray, found: np.ndarray, reach: int, one_to_one: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the true and of the found samples (both ascending) have a partner within `reach`."""
    told, right = np.zeros(len(true), bool), np.zeros(len(found), bool)
    if not one_to_one:
        right[:] = np.searchsorted(true, found + reach, "right") > np.searchsorted(
            true, found - reach, "left"
        )
        return told, right
    i = j = 0
    while i < len(true) and j < len(found):
        if abs(true[i] - found[j]) <= reach:
            told[i] = right[j] = True
            i, j = i + 1, j + 1
        elif true[i] < found[j]:
            i += 1
        else:
            j += 1
    return told, right


def cost(channels: int, settings: Stim, fs_hz: float = 20000.0, seconds: int = 3) -> dict[str, Any]:
    """Share of one core (processor time) that the removal takes in 1-ms chunks, without stimuli and at 50 Hz."""
    side = int(np.ceil(np.sqrt(channels)))
    place = np.arange(channels)
    positions = tuple((17.5 * (i % side), 17.5 * (i // side)) for i in range(channels))
    info = StreamInfo(
        "cost", fs_hz, tuple(map(str, place)), positions, "uint16", (6.3,) * channels, 512.0, 0.0, 1023.0
    )
    n, period, chunk = round(fs_hz * (seconds + 2)), round(fs_hz / 50), max(1, info.samples(1))
    distance = np.hypot(place % side - side / 2, place // side - side / 2) * 17.5
    x = np.random.default_rng(0).normal(0, 1.1, (n, channels)).astype(np.float32)
    t = np.arange(period)[:, None]
    size = 4800 / (1 + (distance / 40) ** 1.6)
    free = 8 + 15 * np.log(np.maximum(size / 512, 1))
    gone = np.maximum(t - free, 0)
    wave = np.where(
        t < free, size, np.minimum(size, 512) * (0.6 * np.exp(-gone / 20) + 0.4 * np.exp(-gone / 200))
    )
    stims = np.arange(round(fs_hz), n - period, period)
    for k in stims:
        x[k : k + period] += wave
    codes = np.clip(np.rint(x + 512), 0, 1023).astype(np.uint16)
    cleaner = StimCleaner(info, settings)
    for k in stims:
        cleaner.mark(int(k))
    took = np.zeros(n // chunk)
    for i in range(len(took)):
        before = time.thread_time()
        cleaner.process(i * chunk, codes[i * chunk : (i + 1) * chunk])
        took[i] = time.thread_time() - before
    per_s = round(fs_hz / chunk)
    quiet, busy = took[per_s // 2 : per_s - 1], took[2 * per_s : -chunk]
    return {
        "channels": channels, "stimuli_hz": 50, "core_without_stimuli": round(float(quiet.mean() * fs_hz / chunk), 4),
        "core": round(float(busy.mean() * fs_hz / chunk), 4), "chunk_ms": spread(busy * 1e3),
    }  # fmt: skip
