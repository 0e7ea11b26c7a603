"""What a cluster of spikes looks like on the electrodes around its root."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked.sort.features import PeakTable
from spiked.sort.geometry import distances
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import INNER, LOOSE, ROOT, Sequences

# A single sample's amplitude is never known better than the noise, and no neuron's spikes are all alike.
AMP_SD_FLOOR, AMP_SD_FRACTION, LAG_SD_FLOOR = 1.0, 0.08, 0.3


@dataclass(frozen=True)
class Context:
    """What all steps of one calibration share. `stringent_p` and `loose_p` are probabilities."""

    tables: list[PeakTable]
    positions_um: np.ndarray
    params: RTSortParameters
    fs_hz: float
    seconds: float
    stringent: float
    loose: float

    @property
    def n_channels(self) -> int:
        return len(self.tables)

    @property
    def min_spikes(self) -> float:
        return max(self.params.min_spikes, self.params.min_rate_hz * self.seconds)

    def samples(self, ms: float) -> float:
        return ms * self.fs_hz / 1000


@dataclass(frozen=True, eq=False)
class Cluster:
    """Spikes rooted at one electrode and their statistics over `near`, the electrodes within reach (root first)."""

    root: int
    rows: np.ndarray  # of the root's PeakTable, ascending
    split: frozenset[int]
    near: np.ndarray
    prob: np.ndarray  # 0 where not seen
    latency: np.ndarray
    latency_sd: np.ndarray
    amp: np.ndarray
    amp_sd: np.ndarray
    loose: np.ndarray  # bool
    inner: np.ndarray
    comp: np.ndarray

    @property
    def root_amp(self) -> float:
        return float(self.amp[0])

    def loose_electrodes(self) -> np.ndarray:
        return self.near[self.loose]


def expit(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def describe(ctx: Context, root: int, rows: np.ndarray, split: frozenset[int]) -> Cluster | None:
    """Statistics of these spikes, or None when too few electrodes see them, or so many that they are noise."""
    t, p = ctx.tables[root], ctx.params
    if len(rows) < 2:
        return None
    limit = max(p.sequence_noise_min, p.sequence_noise_fraction * ctx.n_channels)
    if np.median(t.width[rows]) >= limit:
        return None
    lag, amp = t.lag[rows].astype(np.float32), t.amp[rows].astype(np.float32)
    prob = expit(np.median(t.logit[rows].astype(np.float32), axis=0))
    prob[prob < p.min_prob] = 0
    place = ctx.positions_um[t.near]
    anchor = np.array(sorted({root, *split}))
    near_anchor = (distances(place, ctx.positions_um[anchor]) <= p.inner_radius_um).any(1)
    loose = (prob >= 1 / (1 + np.exp(-ctx.loose))) & near_anchor
    inner = loose & (distances(place, place[:1])[:, 0] <= p.inner_radius_um)
    if loose.sum() < p.min_loose or inner.sum() < p.min_inner_loose:
        return None
    comp = loose | ((prob > 0) & (distances(place, place[loose]) <= p.inner_radius_um).any(1))
    comp[0] = True
    mean_amp = amp.mean(0)
    lag_sd = np.maximum(lag.std(0, ddof=1), LAG_SD_FLOOR)
    amp_sd = np.maximum(amp.std(0, ddof=1), np.hypot(AMP_SD_FLOOR, AMP_SD_FRACTION * mean_amp))
    return Cluster(root, rows, split, t.near, prob, lag.mean(0), lag_sd, mean_amp, amp_sd, loose, inner, comp)


def moved(ctx: Context, c: Cluster, root: int) -> np.ndarray:
    """Rows of the new root's table that are these spikes: their times shift by each spike's own lag."""
    if root == c.root:
        return c.rows
    column = np.flatnonzero(c.near == root)
    if not len(column):
        return np.zeros(0, np.int64)
    t = ctx.tables[c.root]
    frames = t.frame[c.rows] + np.rint(t.lag[c.rows, column[0]].astype(np.float64)).astype(np.int64)
    return ctx.tables[root].rows_at(frames)[0]


def as_sequences(ctx: Context, clusters: list[Cluster], strict: bool = False, **header: object) -> Sequences:
    """The portable form, units in the order given, ids from 0."""
    p = ctx.params
    n_loose, n_inner, fraction = p.min_loose_spike, p.min_inner_spike, p.spike_loose_fraction
    if strict:
        n_loose, n_inner, fraction = p.min_loose, p.min_inner_loose, p.min_loose_fraction
    picked = [np.concatenate([[0], 1 + np.flatnonzero(c.comp[1:])]) for c in clusters]
    join = lambda name, dtype: np.concatenate(  # noqa: E731
        [
            np.zeros(0, dtype),
            *(getattr(c, name)[k].astype(dtype) for c, k in zip(clusters, picked, strict=True)),
        ]
    )
    flags = [
        (LOOSE * c.loose + INNER * c.inner + ROOT * (np.arange(len(c.near)) == 0))[k]
        for c, k in zip(clusters, picked, strict=True)
    ]
    spikes = np.array([len(c.rows) for c in clusters], np.int64)
    latency = join("latency", np.float32)
    ptr = np.concatenate([[0], np.cumsum([len(k) for k in picked])]).astype(np.int64)
    latency[ptr[:-1]] = 0
    return Sequences(
        fs_hz=ctx.fs_hz, positions_um=ctx.positions_um, stringent_logit=ctx.stringent, loose_logit=ctx.loose, parameters=p,
        unit_ids=np.arange(len(clusters)),
        roots=np.array([c.root for c in clusters], np.int32),
        root_amp_mean=np.array([c.amp[0] for c in clusters], np.float32),
        root_amp_sd=np.array([c.amp_sd[0] for c in clusters], np.float32),
        root_amplitude_uv=np.array([ctx.tables[c.root].root_uv[c.rows].mean() for c in clusters], np.float32),
        min_loose=np.array([max(n_loose, int(np.ceil(c.loose.sum() * fraction))) for c in clusters], np.int32),
        min_inner=np.full(len(clusters), n_inner, np.int32),
        n_spikes=spikes, rate_hz=spikes / max(ctx.seconds, 1e-9), ptr=ptr,
        electrode=join("near", np.int32), latency=latency, latency_sd=join("latency_sd", np.float32),
        amp=join("amp", np.float32), amp_sd=join("amp_sd", np.float32), prob=join("prob", np.float32),
        flags=np.concatenate([np.zeros(0, np.uint8), *flags]).astype(np.uint8),
        **header,  # type: ignore[arg-type]
    )  # fmt: skip
