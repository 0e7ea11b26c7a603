"""Noise, multi-unit, good or undetermined: one label and one reason for every unit.

Contamination is judged by refractory-period violations. Among N spikes in T seconds a unit that is a neuron
and a share C of another's spikes shows about 2 C (1 - C) N^2 tau / T intervals shorter than the refractory
period tau (Hill et al. 2011, J Neurosci 31:8699). The count is Poisson, so the same numbers say how sure one
can be (in the manner of the sliding refractory metric, Steinmetz lab / IBL 2022): too few spikes to tell is
its own answer, 'undetermined', and stays in. A unit most of whose spikes coincide with those of a better kept
one is a second detection of the same spikes and counts as noise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import chi2, poisson

from spiked.offline.truth import Trains, coincidences, pair_lags

KEPT = ("good", "undetermined")
ECHO_MS = 0.5
MOST_SURE = 0.95


@dataclass(frozen=True)
class LabelRules:
    """Thresholds of the labels."""

    min_spikes: int = 20  # fewer: noise
    min_snr: float = 3.0  # peak of the average waveform over the channel's noise; less: noise
    max_footprint: float = 0.6  # share of channels at half the peak or more; more, on >= 16 channels: noise
    max_width_ms: float = 1.8  # trough to following peak; longer: noise
    refractory_ms: float = 1.5
    censored_ms: float = ECHO_MS  # shorter intervals do not count: see without_echoes
    max_contamination: float = 0.2
    sure: float = 0.8  # confidence that contamination is below the limit, for 'good'
    convicted: float = 0.95  # confidence that it is above, for 'mua'
    min_violations: int = 3  # fewer convict nobody
    kilosort_contamination: float = 0.5  # at least this much, and Kilosort's mua counts
    min_presence: float = 0.5  # share of tenths of the session with spikes, for 'good'
    duplicate_share: float = 0.5  # of a unit's spikes coincide with a better unit's: a duplicate of it
    duplicate_window_ms: float = 0.25
    duplicate_lag_ms: float = 1.5


def without_echoes(samples: np.ndarray, units: np.ndarray, fs_hz: float) -> np.ndarray:
    """(spikes,) bool: False for a spike at most ECHO_MS after another of its unit.

    No neuron fires twice within half a millisecond; a sorter that subtracts templates finds the remainder of a
    large spike again, mostly at one fixed lag (Kilosort4 drops such pairs within 0.25 ms only).
    """
    order = np.lexsort((samples, units))
    close = (np.diff(samples[order]) <= ECHO_MS * fs_hz / 1000) & (np.diff(units[order]) == 0)
    keep = np.ones(len(samples), bool)
    keep[order[1:][close]] = False
    return keep


@dataclass(frozen=True)
class UnitLabel:
    """A unit's label with its reason, and the numbers behind it."""

    unit: int
    label: str  # noise, mua, good, undetermined
    reason: str
    n_spikes: int
    rate_hz: float
    presence: float
    violations: int
    contamination: float  # point estimate, 0 to 0.5 (half or more)
    contamination_most: float | None  # at most so much, 95 % sure; None: there are too few spikes to say
    ks_label: str
    shape: dict[str, float]
    duplicate_of: int | None = None
    criteria: dict[str, float | None] = field(default_factory=dict)  # the lab's figures, where it set bounds

    def as_dict(self) -> dict[str, Any]:
        flat = asdict(self)
        return {**{k: v for k, v in flat.items() if k != "shape"}, **flat["shape"]}


def refractory(samples: np.ndarray, fs_hz: float, seconds: float, rules: LabelRules) -> tuple[int, float]:
    """(violations, intervals expected below the refractory period if all spikes were foreign) of one train.

    `samples` in time order. All pairs closer than refractory_ms and farther than censored_ms count.
    """
    low, high = rules.censored_ms * fs_hz / 1000, rules.refractory_ms * fs_hz / 1000
    reach = np.searchsorted(samples, samples + high, "left") - np.searchsorted(
        samples, samples + low, "right"
    )
    expected = len(samples) ** 2 * (rules.refractory_ms - rules.censored_ms) / 1000 / max(seconds, 1e-9)
    return int(np.maximum(reach, 0).sum()), float(expected)


def contamination(violations: float, expected: float) -> float:
    """Share of foreign spikes, 0 to 0.5 (half or more); `expected` as `refractory` returns it."""
    ratio = min(violations / expected, 0.5) if expected > 0 else 0.0
    return float(1 - np.sqrt(1 - 2 * ratio)) / 2


def contamination_most(violations: int, expected: float) -> float | None:
    """The share of foreign spikes that is not exceeded with MOST_SURE confidence; None where that is half or more."""
    count = chi2.ppf(MOST_SURE, 2 * (violations + 1)) / 2  # of violations, at most (Poisson)
    return contamination(count, expected) if expected > 0 and count < 0.5 * expected else None


def confidence(violations: int, expected: float, limit: float) -> tuple[float, float]:
    """How sure it is that contamination is (below, above) `limit`, each 0 to 1."""
    at_limit = expected * 2 * limit * (1 - limit)
    return float(1 - poisson.cdf(violations, at_limit)), float(poisson.cdf(violations - 1, at_limit))


def presence(samples: np.ndarray, n_samples: int, bins: int = 10) -> float:
    """Share of equal parts of the session in which the unit fired."""
    return float((np.histogram(samples, bins, (0, n_samples))[0] > 0).mean())


def duplicates(
    samples: np.ndarray, units: np.ndarray, peaks: dict[int, float], fs_hz: float, rules: LabelRules
) -> dict[int, tuple[int, float]]:
    """{unit: (the unit it repeats, share of its spikes that coincide)}; a constant lag is allowed.

    Of two units that share most spikes the one stays that has more of the neuron and less of anything else, by `likely_accuracy`: a
    sorter's second unit of a neuron may well have more spikes than the first, those of a neighbour. A unit that is itself a duplicate
    does not make others one.
    """
    trains = Trains.of(samples, units)
    window = round(rules.duplicate_window_ms * fs_hz / 1000)
    lags, _ = pair_lags(trains, trains, round(rules.duplicate_lag_ms * fs_hz / 1000))
    matched = coincidences(trains, trains, window, lags)
    n, ids = trains.counts, trains.ids.tolist()
    height = np.array([abs(peaks[u]) for u in ids])
    found: dict[int, tuple[int, float]] = {}
    for k in np.argsort(n * height, kind="stable").tolist():
        better = [
            j
            for j in range(len(n))
            if j != k
            and ids[j] not in found
            and matched[k, j] >= rules.duplicate_share * n[k]
            and _stays(n[[j, k]], height[[j, k]], (j, k))
        ]
        if better:
            j = max(better, key=lambda j: matched[k, j])
            found[ids[k]] = (ids[j], float(matched[k, j] / n[k]))
    return found


def _stays(n: np.ndarray, height: np.ndarray, at: tuple[int, int]) -> bool:
    """Whether the first of two units that share spikes is the one to keep."""
    first, second = likely_accuracy(n, height)
    return (first, n[0], -at[0]) > (second, n[1], -at[1])


def likely_accuracy(n: np.ndarray, height: np.ndarray) -> np.ndarray:
    """(units,) what share of one neuron's spikes and their own is right, for units of `n` spikes that follow the same neuron.

    A spike that is not the neuron's adds nothing to the average waveform: the average's `height` is the neuron's times the share of its
    spikes in the unit. The neuron has at least the height of the highest, and as many spikes as the unit that has most of them.
    """
    true = n * height / max(height.max(), 1e-12)
    return np.asarray(true / (n + true.max() - true))


def label_units(
    samples: np.ndarray,
    units: np.ndarray,
    shapes: dict[int, dict[str, float]],
    ks_label: dict[int, str],
    ks_contamination: dict[int, float],
    n_samples: int,
    fs_hz: float,
    n_channels: int,
    rules: LabelRules | None = None,
) -> list[UnitLabel]:
    """One label per unit of `units`, in order of the id. `samples` are indices into the recording."""
    rules = rules or LabelRules()
    out = []
    for unit in np.unique(units).tolist():
        train = np.sort(samples[units == unit])
        seconds = n_samples / fs_hz
        violations, expected = refractory(train, fs_hz, seconds, rules)
        facts = UnitLabel(
            unit=unit,
            label="",
            reason="",
            n_spikes=len(train),
            rate_hz=len(train) / seconds,
            presence=presence(train, n_samples),
            violations=violations,
            contamination=contamination(violations, expected),
            contamination_most=contamination_most(violations, expected),
            ks_label=ks_label.get(unit, ""),
            shape=shapes[unit],
        )
        label, reason = judge(facts, expected, ks_contamination.get(unit, 0.0), n_channels, rules)
        out.append(replace(facts, label=label, reason=reason))
    kept = np.isin(units, [u.unit for u in out if u.label in KEPT])
    peaks = {u.unit: u.shape["peak_uv"] for u in out}
    repeated = duplicates(samples[kept], units[kept], peaks, fs_hz, rules)
    return [_repeat(u, repeated) for u in out]


def _repeat(u: UnitLabel, repeated: dict[int, tuple[int, float]]) -> UnitLabel:
    if u.unit not in repeated:
        return u
    of, share = repeated[u.unit]
    reason = f"duplicate: {share:.0%} of its spikes are also in unit {of}"
    return replace(u, label="noise", reason=reason, duplicate_of=of)


def judge(u: UnitLabel, expected: float, ks: float, n_channels: int, rules: LabelRules) -> tuple[str, str]:
    """(label, reason) of one unit; `ks` is Kilosort's own contamination estimate.

    Kilosort counts the same violations, so its mua keeps a unit from being good, but convicts none that they alone do not.
    """
    noise = _noise(u, n_channels, rules)
    if noise:
        return "noise", noise
    below, above = confidence(u.violations, expected, rules.max_contamination)
    limit = f"{rules.max_contamination:.0%}"
    kilosort_says_mua = u.ks_label == "mua" and ks >= rules.kilosort_contamination
    enough = u.violations >= rules.min_violations
    if enough and above >= rules.convicted:
        share = f"{u.contamination:.0%}" if u.contamination < 0.5 else "half or more"
        return "mua", f"contamination {share}, limit {limit} ({u.violations} violations)"
    if below < rules.sure:
        theirs = "; Kilosort says mua" if kilosort_says_mua else ""
        return "undetermined", f"{u.n_spikes} spikes are too few to exclude {limit} contamination{theirs}"
    if kilosort_says_mua:
        return "undetermined", f"Kilosort says mua ({ks:.0%} contamination), the intervals do not"
    if u.presence < rules.min_presence:
        return "undetermined", f"fires in {u.presence:.0%} of the session only"
    return "good", f"contamination below {limit} with {below:.0%} confidence"


def _noise(u: UnitLabel, n_channels: int, rules: LabelRules) -> str:
    """Why a unit is no neuron's spikes, or ''."""
    if u.n_spikes < rules.min_spikes:
        return f"only {u.n_spikes} spikes"
    if u.shape["snr"] < rules.min_snr:
        return f"average waveform is {u.shape['snr']:.1f} times the noise only"
    if u.shape["edge"]:
        return "waveform has its extremum at the edge of the window"
    if n_channels >= 16 and u.shape["footprint"] > rules.max_footprint:
        return f"at half its peak or more on {u.shape['footprint']:.0%} of the channels"
    if u.shape["width_ms"] > rules.max_width_ms:
        return f"waveform {u.shape['width_ms']:.1f} ms wide"
    return ""
