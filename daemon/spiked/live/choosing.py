"""Templates for the live path, and what to expect of each live sorter, unit by unit.

Runs in the calibrating process. Units are found by whatever `live.templates_from` names, their templates learned and judged
by inject and recover; RT-Sort, calibrated on the same samples, is judged on the same injected spikes. So an
experimenter knows which units are safe to close a loop on, and with which sorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from spiked.clean.noise import NoiseTracker
from spiked.detect.detector import Detector
from spiked.errors import SpikedError
from spiked.sort.assign import RTSort
from spiked.sort.sequences import Sequences
from spiked.stream import StreamInfo
from spiked.templates.averages import mean_waveforms
from spiked.templates.expected import MATCH_MS, Expectation, add_spikes, expect, gains_of, planned
from spiked.templates.learn import learn, matched
from spiked.templates.library import Templates
from spiked.templates.noise import Noise
from spiked_client.protocol import SPIKE

LEAST_ACCURACY = 0.3  # expected of a unit that is kept
JUDGED_S = 20.0  # of the calibration, for RT-Sort
CHUNK_S = 0.1
GOOD, POOR = 0.9, 0.7

Progress = Callable[[float, str], None]


def find_templates(
    x: np.ndarray, logits: np.ndarray, sequences: Sequences, info: StreamInfo, meta: dict[str, Any], folder: Path,
    progress: Progress,
) -> Templates:  # fmt: skip
    """Templates of the calibration's units, each with its threshold and what to expect of it.

    x, logits (channels, n): what the pipeline gave; sequences: RT-Sort's calibration on them; meta: as Recalibration writes it.
    Raises SpikedError when no units are found.
    """
    found_by = str(meta.get("templates_from", "auto"))
    if found_by == "auto":
        found_by = "lupin" if find_spec("spikeinterface") else "rt_sort"
    if found_by == "rt_sort":
        spikes = run_rt_sort(sequences, x, logits, info)
        sample, unit, source = spikes["sample"], spikes["unit"], {"sorter": "rt_sort"}
    else:
        from spiked.templates.find import find_spikes

        sample, unit, source = find_spikes(
            x, info.fs_hz, info.positions, info.channel_ids, folder, found_by, lambda f, text: progress(0.5 * f, text)
        )  # fmt: skip
    templates = learn(
        x, sample, unit, info.fs_hz, info.positions, info.channel_ids, int(meta["first_sample"]), source,
        lambda f, text: progress(0.5 + 0.2 * f, text),
    )  # fmt: skip
    progress(0.7, "injecting spikes to see which come back")
    expectation = expect(templates, x)
    good = expectation.accuracy >= LEAST_ACCURACY
    if not good.any():
        raise SpikedError(
            "no unit stands out from the noise; check the signal or record longer (live.calibrate_s)"
        )
    templates = replace(
        templates, threshold=np.where(good, expectation.threshold, 1e6), rate_hz=expectation.rate_hz
    )
    templates = templates.keep(good)
    templates = templates.with_ids(np.arange(len(templates)))
    kept = Expectation(*(getattr(expectation, k)[good] for k in Expectation.__dataclass_fields__))
    progress(0.9, "judging rt_sort on the same spikes")
    judged = expect_rt_sort(x, logits, sequences, templates, kept, info, meta)
    own = {k: _rounded(getattr(kept, k)) for k in ("accuracy", "recall", "precision")}
    return replace(templates, expected={"templates": own, "rt_sort": judged})


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]


def run_rt_sort(sequences: Sequences, x: np.ndarray, logits: np.ndarray, info: StreamInfo) -> np.ndarray:
    """SPIKE records of RT-Sort over samples and logits (channels, n), counted from 0."""
    noise, sorter = NoiseTracker(info.n_channels, info.fs_hz), RTSort(sequences, info.fs_hz, info.n_channels)
    step, out = info.samples(CHUNK_S * 1000), [np.zeros(0, SPIKE)]
    for a in range(0, x.shape[1], step):
        part = np.ascontiguousarray(x[:, a : a + step], np.float32)
        noise.process(part, None, a)
        found = np.ascontiguousarray(logits[:, a : a + step], np.float32)
        out.append(sorter.process(part, found, None, noise, a))
    return np.concatenate([*out, sorter.flush()])


def _logits(x: np.ndarray, info: StreamInfo, meta: dict[str, Any]) -> np.ndarray:
    """(channels, n) of the session's network on cleaned samples, aligned; low where it had not enough of them."""
    from spiked_models import networks

    name, asked = str(meta["network"]["name"]), str(meta.get("network_from", ""))
    network = networks.load(asked if Path(asked).is_dir() else name)
    detector = Detector(network, info.n_channels, info.fs_hz)
    detector.set_scaling(float(meta["scaling"]))
    step, out = info.samples(CHUNK_S * 1000), np.full(x.shape, -100.0, np.float32)
    valid = np.ones((info.n_channels, step), bool)
    for a in range(0, x.shape[1], step):
        part = np.ascontiguousarray(x[:, a : a + step], np.float32)
        found = detector.process(a, part, valid[:, : part.shape[1]], True)
        out[:, found.first_sample : found.first_sample + found.x.shape[1]] = found.logits
    return out


def expect_rt_sort(
    x: np.ndarray, logits: np.ndarray, sequences: Sequences, templates: Templates, own: Expectation, info: StreamInfo,
    meta: dict[str, Any],
) -> dict[str, list[float]]:  # fmt: skip
    """Accuracy, recall and precision to expect of RT-Sort for each of the templates' units; 0 where it has no such unit.

    The templates' mean waveforms are added to the last of the samples, the network and RT-Sort run on both, and a unit is
    the one of RT-Sort that most of its injected spikes come back as.
    """
    n = len(templates)
    figures = {k: np.zeros(n) for k in ("accuracy", "recall", "precision")}
    span = min(x.shape[1], info.samples(JUDGED_S * 1000))
    if len(sequences) and span > 10 * templates.waveform.shape[1]:
        late, late_logits = np.asarray(x[:, -span:], np.float32), logits[:, -span:]
        sample, unit, amplitude = planned(templates, span, seed=1)
        more = late.copy()
        add_spikes(more, sample, unit, amplitude, *_cleaned_waveforms(templates, x), templates.before)
        plain = run_rt_sort(sequences, late, late_logits, info)
        spikes = run_rt_sort(sequences, more, _logits(more, info, meta), info)
        reach = info.samples(MATCH_MS)
        for u in range(n):
            at, seconds = sample[unit == u], span / info.fs_hz
            figures["recall"][u], partner = _comes_back(spikes, at, reach)
            n_found, n_true = float((plain["unit"] == partner).sum()), own.rate_hz[u] * seconds
            hits = min(n_true * figures["recall"][u], n_found)
            figures["precision"][u] = hits / max(n_found, 1.0)
            figures["accuracy"][u] = hits / max(n_found + n_true - hits, 1e-9)
    return {k: _rounded(v) for k, v in figures.items()}


def _comes_back(spikes: np.ndarray, at: np.ndarray, reach: int) -> tuple[float, int]:
    """(share of the samples `at` that the unit finding most of them finds, that unit; -1: none)."""
    best = (0.0, -1)
    for v in np.unique(spikes["unit"]):
        mine = spikes["sample"][spikes["unit"] == v].astype(float)
        rows = np.stack([np.zeros(len(mine)), mine, mine, np.ones(len(mine))], 1)
        share = float((gains_of(at, np.zeros(len(at)), rows, reach) > 0).mean()) if len(at) else 0.0
        if share > best[0]:
            best = share, int(v)
    return best


def _cleaned_waveforms(t: Templates, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ptr, channel, waveform) like the templates' own, in cleaned microvolts before the filters."""
    spikes, amplitude = matched(t, x)
    plain = Noise(np.zeros((0, 6)), np.ones(1, np.float32), t.precision, np.ones(t.n_channels))
    sure = np.abs(amplitude - 1) < 0.5
    mean = mean_waveforms(
        x, plain, spikes.sample, spikes.unit, amplitude, sure, t.before, t.waveform.shape[1], len(t)
    )
    unit = np.repeat(np.arange(len(t)), np.diff(t.wave_ptr))
    return t.wave_ptr, t.wave_channel, mean[unit, t.wave_channel]


def expectation_lines(templates: Templates) -> list[str]:
    """What the operator should know of the units, in one line for each sorter."""
    out = []
    for sorter, figures in templates.expected.items():
        accuracy = np.array(figures["accuracy"])
        poor = [str(u) for u, a in zip(templates.unit_ids, accuracy, strict=True) if a < POOR]
        safe = f"{int((accuracy >= GOOD).sum())} of {len(accuracy)} units at {GOOD:g} or more"
        below = (
            f"; below {POOR:g}: units {', '.join(poor[:20])}{' ...' if len(poor) > 20 else ''}"
            if poor
            else ""
        )
        out.append(f"expected accuracy with {sorter}: {safe}{below}")
    return out
