"""Calibration: find the units of a recording's first minutes.

RT-Sort's sequence detection (van der Molen, Lim et al. 2024, PLoS ONE 19:e0312438): clusters of detection peaks per
root electrode, statistics, reassignment of all spikes by the online rule, merging within and across roots. What
differs from the published code, and why, is in docs/rtsort-mends.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spiked.clean.noise import BLOCK_MS, NoiseTracker
from spiked.errors import ConfigError
from spiked.sort.assign import PIECE, RTSort
from spiked.sort.clusters import Splitter
from spiked.sort.echoes import NO_ECHOES, echoes, renumbered
from spiked.sort.features import Progress, as_float32, peak_tables, seen_in
from spiked.sort.merge import best_root, merge, near_roots
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import Sequences
from spiked.sort.statistics import Cluster, Context, as_sequences, describe
from spiked_models.sentinel import learn

MAX_ROUNDS = 6
Intervals = Sequence[tuple[int, int]]


def calibrate(
    x: np.ndarray, logits: np.ndarray, valid: np.ndarray | Intervals | None, fs_hz: float, positions_um: np.ndarray,
    params: RTSortParameters | None, stringent_logit: float, loose_logit: float, first_sample: int = 0,
    progress: Progress | None = None, channel_ids: Sequence[str] | None = None, network: dict[str, Any] | None = None,
    inference_scaling: float | None = None, input_scale: float | None = None,
) -> Sequences:  # fmt: skip
    """Units found in x (microvolt, baseline removed) with its logits, both (channels, samples), float16 or float32.

    Memory-mapped arrays are read once or twice, a second at a time. Logits below -50000 say that the sample was not
    seen; `valid` adds to that: None, (samples,) bool, or intervals [start, stop) of sample numbers that are NOT
    valid. `input_scale` (microvolt to network input, all factors) asks for a sentinel as well. `progress(fraction, text)` may raise to cancel. No unit found gives empty Sequences. ConfigError when the
    arrays do not fit together.
    """
    positions = np.asarray(positions_um, np.float64).reshape(-1, 2)
    n_channels, n = x.shape
    if logits.shape != x.shape or len(positions) != n_channels:
        raise ConfigError(
            f"calibration got samples {x.shape}, logits {logits.shape}, {len(positions)} positions; they must agree"
        )
    ids = tuple(channel_ids) if channel_ids is not None else tuple(str(c) for c in range(n_channels))
    params = params or RTSortParameters.default(fs_hz)
    tell = progress or (lambda _fraction, _text: None)
    mask = _mask(valid, n, first_sample)
    half = max(1, round(params.coincidence_ms * fs_hz / 1000))
    limit = int(max(params.array_noise_min, params.array_noise_fraction * n_channels))
    size = round(fs_hz * BLOCK_MS / 1000)
    noise = NoiseTracker(n_channels, fs_hz, keep_blocks=n // size + 2)
    tables = peak_tables(
        x, logits, mask, fs_hz, positions, loose_logit, half, params.outer_radius_um, params.inner_radius_um,
        params.min_inner_loose, limit, first_sample, noise, _part(tell, 0, 0.3),
    )  # fmt: skip
    ctx = Context(tables, positions, params, fs_hz, n / fs_hz, stringent_logit, loose_logit)
    header = {
        "channel_ids": ids, "network": {k: str(v) for k, v in (network or {}).items()}, "inference_scaling": inference_scaling,
        "first_sample": first_sample, "stop_sample": first_sample + n,
    }  # fmt: skip
    clusters = _form(ctx, _part(tell, 0.3, 0.5))
    clusters, known = _reassign(ctx, clusters, header, x, logits, mask, noise, _part(tell, 0.5, 0.7))
    rounds = max(1, int(params.rounds))
    for k in range(rounds):
        start = 0.7 + 0.3 * k / rounds
        tell(start, f"merging {len(clusters)} clusters")
        clusters = _merge(ctx, clusters)
        clusters, known = _reassign(
            ctx, clusters, header, x, logits, mask, noise, _part(tell, start, start + 0.3 / rounds)
        )
    order = sorted(range(len(clusters)), key=lambda k: (clusters[k].root, -clusters[k].root_amp))
    clusters, known = [clusters[k] for k in order], renumbered(known, np.argsort(order))
    known = _known_live(ctx, clusters, known, header, x, logits, mask, noise)
    sentinel = None
    if input_scale is not None:
        tell(0.99, "learning where the network need not run")
        sentinel = learn(
            lambda a, b: (x[:, a:b], logits[:, a:b]),
            n_channels,
            n,
            fs_hz,
            input_scale,
            stringent_logit,
            loose_logit,
        )
    tell(1.0, f"{len(clusters)} units")
    return as_sequences(ctx, clusters, sentinel=sentinel, echoes=known, **header)


def _part(tell: Progress, start: float, stop: float) -> Progress:
    """Progress of a step that takes `start` to `stop` of the whole."""
    return lambda fraction, text: tell(start + (stop - start) * fraction, text)


def _mask(valid: np.ndarray | Intervals | None, n: int, first_sample: int) -> np.ndarray | None:
    if valid is None:
        return None
    if isinstance(valid, np.ndarray) and valid.dtype == bool:
        if valid.shape != (n,):
            raise ConfigError(f"calibration got a validity mask of shape {valid.shape} for {n} samples")
        return valid
    mask = np.ones(n, bool)
    for start, stop in valid:
        mask[max(0, int(start) - first_sample) : max(0, int(stop) - first_sample)] = False
    return mask


def _form(ctx: Context, tell: Progress) -> list[Cluster]:
    """Clusters of every root that have enough electrodes."""
    out = []
    min_active = ctx.params.min_rate_hz * ctx.seconds
    for c, table in enumerate(ctx.tables):
        tell(c / len(ctx.tables), "forming clusters")
        splitter = Splitter(table, ctx.positions_um, ctx.params, ctx.stringent, min_active)
        for part in splitter.clusters():
            cluster = describe(ctx, c, np.sort(part.rows), part.split)
            if cluster is not None:
                out.append(cluster)
    return out


def _assign(
    ctx: Context, sequences: Sequences, x: np.ndarray, logits: np.ndarray, mask: np.ndarray | None,
    noise: NoiseTracker, first: int, tell: Progress,
) -> list[np.ndarray]:  # fmt: skip
    """Per unit the frames of the spikes that the online rule gives it, ascending."""
    sorter = RTSort(sequences, ctx.fs_hz, ctx.n_channels, hurry=False)
    n, step = x.shape[1], PIECE
    found = []
    for a in range(0, n, step):
        tell(a / n, f"assigning spikes to {len(sequences)} clusters")
        xs, q = as_float32(x[:, a : a + step]), as_float32(logits[:, a : a + step])
        seen = seen_in(q, None if mask is None else mask[a : a + step])
        found.append(sorter.process(xs, q, seen, noise, first + a))
    found.append(sorter.flush())
    spikes = np.concatenate(found)
    order = np.argsort(spikes["unit"], kind="stable")
    edges = np.searchsorted(spikes["unit"][order], np.arange(len(sequences) + 1))
    return [np.sort(spikes["sample"][order[edges[k] : edges[k + 1]]]) - first for k in range(len(sequences))]


def _echoes(ctx: Context, frames: list[np.ndarray]) -> np.ndarray:
    p = ctx.params
    return (
        NO_ECHOES if p.echo_fraction > 1 else echoes(frames, ctx.fs_hz, p.shared_overlap_ms, p.echo_fraction)
    )


def _known_live(
    ctx: Context, clusters: list[Cluster], known: np.ndarray, header: dict[str, Any], x: np.ndarray, logits: np.ndarray,
    mask: np.ndarray | None, noise: NoiseTracker,
) -> np.ndarray:  # fmt: skip
    """The echoes of these units, those included that only the live rule brings: it asks for fewer electrodes."""
    if not clusters or ctx.params.echo_fraction > 1:
        return known
    live = as_sequences(ctx, clusters, echoes=known, **header)
    first = int(header["first_sample"])
    frames = _assign(ctx, live, x, logits, mask, noise, first, lambda _fraction, _text: None)
    return np.concatenate([known, _echoes(ctx, frames)])


def _reassign(
    ctx: Context, clusters: list[Cluster], header: dict[str, Any], x: np.ndarray, logits: np.ndarray,
    mask: np.ndarray | None, noise: NoiseTracker, tell: Progress,
) -> tuple[list[Cluster], np.ndarray]:  # fmt: skip
    """The same clusters with the spikes that the online rule gives them, and their echoes; those with too few are gone."""
    if not clusters:
        return [], NO_ECHOES
    first = int(header["first_sample"])
    strict = as_sequences(ctx, clusters, strict=True, **header)
    frames = _assign(ctx, strict, x, logits, mask, noise, first, _part(tell, 0, 0.5))
    known = _echoes(ctx, frames)
    if len(known):
        strict = as_sequences(ctx, clusters, strict=True, echoes=known, **header)
        frames = _assign(ctx, strict, x, logits, mask, noise, first, _part(tell, 0.5, 1))
    out: list[Cluster] = []
    place = np.full(len(clusters), -1)
    for k, c in enumerate(clusters):
        rows = ctx.tables[c.root].rows_at(frames[k], reach=0)[0]
        new = describe(ctx, c.root, rows, c.split) if len(rows) >= ctx.min_spikes else None
        if new is not None:
            place[k] = len(out)
            out.append(new)
    return out, renumbered(known, place)


def _merge(ctx: Context, clusters: list[Cluster]) -> list[Cluster]:
    """Best roots, then merging within and across roots, until neither changes anything."""
    for _ in range(MAX_ROUNDS):
        before = len(clusters)
        rooted = [best_root(ctx, c) for c in clusters]
        same = all(a is b for a, b in zip(rooted, clusters, strict=True))
        clusters = merge(ctx, rooted, lambda a, b: a.root == b.root)
        clusters = merge(ctx, clusters, near_roots(ctx))
        if same and len(clusters) == before:
            break
    return [c for c in clusters if len(c.rows) >= ctx.min_spikes]
