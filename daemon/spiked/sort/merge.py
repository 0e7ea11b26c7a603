"""Merging clusters that are one neuron, and giving each its best root.

Two clusters are one when they agree in latencies, amplitudes and the electrodes that see them (van der Molen, Lim
et al. 2024). Here both are seen from the same root, and a merged cluster keeps all spikes of both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spiked.sort.geometry import distances
from spiked.sort.statistics import Cluster, Context, describe, moved


def distance(ctx: Context, a: Cluster, b: Cluster) -> float:
    """How far apart two clusters are, in limits (latency + amplitude); infinite when they are not one neuron."""
    p = ctx.params
    if ctx_distance(ctx, a.root, b.root) > p.inner_radius_um:
        return np.inf
    la, lb = a.loose_electrodes(), b.loose_electrodes()
    common = len(np.intersect1d(la, lb, assume_unique=True))
    if common < p.min_loose or common < p.merge_loose_fraction * (len(la) + len(lb) - common):
        return np.inf
    inner = np.intersect1d(a.near[a.inner], b.near[b.inner], assume_unique=True)
    if len(inner) < p.min_inner_loose:
        return np.inf
    _, i, j = np.intersect1d(a.near, b.near, assume_unique=True, return_indices=True)
    keep = a.comp[i] | b.comp[j]
    i, j = i[keep], j[keep]
    electrodes = a.near[i]
    for root in {a.root, b.root}:
        k = np.flatnonzero(electrodes == root)
        if not len(k):
            return np.inf
        ra, rb = i[k[0]], j[k[0]]
        sd = min(a.amp_sd[ra], b.amp_sd[rb])
        if abs(a.amp[ra] - b.amp[rb]) > p.merge_root_amplitude_sd * sd:
            return np.inf
    factor = common_factor(a, b, i, j, p.merge_factor)
    return _shape_distance(ctx, a, b, i, j, electrodes, factor)


def common_factor(a: Cluster, b: Cluster, i: np.ndarray, j: np.ndarray, most: float) -> float:
    """How much larger a's amplitudes are than b's on all electrodes alike, at most `most` times either way.

    The spikes of one cell shrink together when it bursts.
    """
    w = (a.prob[i] + b.prob[j]) / 2
    f = np.sqrt((w * a.amp[i] ** 2).sum() / max((w * b.amp[j] ** 2).sum(), 1e-9))
    return float(np.clip(f, 1 / most, most))


def ctx_distance(ctx: Context, a: int, b: int) -> float:
    """Micrometre between two electrodes."""
    return float(np.hypot(*(ctx.positions_um[a] - ctx.positions_um[b])))


def _shape_distance(
    ctx: Context, a: Cluster, b: Cluster, i: np.ndarray, j: np.ndarray, electrodes: np.ndarray, factor: float
) -> float:
    p = ctx.params
    limit = ctx.samples(p.merge_latency_diff_ms)
    weight = (a.prob[i] + b.prob[j]) / 2
    # Seen from a's root: b's latencies lose b's own latency there.
    here = np.flatnonzero(b.near == a.root)[0]
    lag = np.abs(a.latency[i] - (b.latency[j] - b.latency[here]))
    w = np.where(electrodes == a.root, 0, weight)
    d_lat = (w * np.minimum(lag, p.clip_factor * limit)).sum() / max(w.sum(), 1e-9) / limit
    other = factor * b.amp[j]
    rel = np.abs(a.amp[i] - other) / np.maximum((a.amp[i] + other) / 2, 1e-6)
    d_amp = (weight * np.minimum(rel, p.clip_factor * p.merge_amplitude_diff)).sum() / max(weight.sum(), 1e-9)
    d_amp /= p.merge_amplitude_diff
    return float(d_lat + d_amp) if d_lat <= 1 and d_amp <= 1 else np.inf


def join(ctx: Context, a: Cluster, b: Cluster) -> Cluster | None:
    """All spikes of both, rooted at the one with the larger root amplitude."""
    if b.root_amp > a.root_amp:
        a, b = b, a
    rows = np.union1d(a.rows, moved(ctx, b, a.root))
    frames, sure = ctx.tables[a.root].frame[rows], ctx.tables[a.root].logit[rows, 0]
    # The same spike may be in both, found a sample or two apart: keep the surer.
    while True:
        close = np.flatnonzero(np.diff(frames) <= ctx.samples(ctx.params.overlap_ms))
        if not len(close):
            break
        drop = np.unique(np.where(sure[close] >= sure[close + 1], close + 1, close))
        rows, frames, sure = (np.delete(v, drop) for v in (rows, frames, sure))
    return describe(ctx, a.root, rows, a.split | b.split | {b.root})


def merge(
    ctx: Context, clusters: list[Cluster], allowed: Callable[[Cluster, Cluster], bool]
) -> list[Cluster]:
    """Merge the closest pair until no pair is close enough. `allowed` says which pairs may merge at all."""
    alive: dict[int, Cluster] = dict(enumerate(clusters))
    pairs: dict[tuple[int, int], float] = {}

    def meet(k: int) -> None:
        for other in list(alive):
            if other != k and allowed(alive[k], alive[other]):
                d = distance(ctx, *((alive[k], alive[other]) if k < other else (alive[other], alive[k])))
                if np.isfinite(d):
                    pairs[min(k, other), max(k, other)] = d

    for k in list(alive):
        for other in range(k):
            if allowed(alive[k], alive[other]):
                d = distance(ctx, alive[other], alive[k])
                if np.isfinite(d):
                    pairs[other, k] = d
    while pairs:
        a, b = min(pairs, key=lambda ab: (pairs[ab], ab))
        whole = join(ctx, alive[a], alive[b])
        if whole is None:
            del pairs[a, b]
            continue
        alive[a] = whole
        del alive[b]
        pairs = {ab: d for ab, d in pairs.items() if not {a, b} & set(ab)}
        meet(a)
    return [alive[k] for k in sorted(alive)]


def near_roots(ctx: Context) -> Callable[[Cluster, Cluster], bool]:
    """Pairs whose roots lie within the inner radius."""
    d = distances(ctx.positions_um) <= ctx.params.inner_radius_um
    return lambda a, b: bool(d[a.root, b.root])


def best_root(ctx: Context, c: Cluster) -> Cluster:
    """Rooted at the electrode that sees the spikes most surely; of nearly equals the one with the largest amplitude."""
    for _ in range(len(c.near)):
        sure = c.prob >= ctx.params.reroot_min_prob * c.prob.max()
        k = int(np.argmax(np.where(sure, c.amp, -1)))
        new = _rooted(ctx, c, int(c.near[k])) if k else c
        if new is c or new.root_amp <= c.root_amp:
            return c
        c = new
    return c


def _rooted(ctx: Context, c: Cluster, root: int) -> Cluster:
    new = describe(ctx, root, moved(ctx, c, root), c.split | {c.root})
    return new if new is not None and len(new.rows) >= 0.5 * len(c.rows) else c
