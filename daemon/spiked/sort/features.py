"""All that calibration needs of the raw signal, read off it in one pass.

For every detection peak on every electrode: when each electrode within reach peaked, how surely, and how large it
was then. Clusters, statistics and merges work on these tables, never on samples again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit

from spiked.clean.noise import NoiseTracker
from spiked.sort.geometry import neighbour_lists
from spiked.sort.window import is_peak, peak_near, refined, trough

# mypy: disable-error-code="no-untyped-def"

UNSEEN_LOGIT = -50_000.0  # logits below are of samples that could not be seen
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every float16 there is
TROUGH_MS = 0.1  # a detection peak may miss its trough by this much
Progress = Callable[[float, str], None]


@dataclass
class PeakTable:
    """Detection peaks with one root electrode. Columns are the electrodes in `near` (the root first).

    `frame` (peaks,) int64 index into the calibrated samples, ascending; `logit`, `lag` (samples after the root,
    sub-sample) and `amp` (noise SDs, at the electrode's own peak) are (peaks, near) float16; `largest` (peaks,) says
    that no electrode within reach deflected more; `width` (peaks,) counts the electrodes of the whole array that
    exceeded loose around it; `root_uv` is the deflection at the root.
    """

    near: np.ndarray
    frame: np.ndarray
    logit: np.ndarray
    lag: np.ndarray
    amp: np.ndarray
    largest: np.ndarray
    width: np.ndarray
    root_uv: np.ndarray

    def rows_at(self, frames: np.ndarray, reach: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the peaks nearest to `frames`, at most `reach` samples off: (rows, which of the frames)."""
        if not len(self.frame):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        k = np.searchsorted(self.frame, frames)
        before, after = np.maximum(k - 1, 0), np.minimum(k, len(self.frame) - 1)
        nearer = np.where(
            np.abs(self.frame[before] - frames) <= np.abs(self.frame[after] - frames), before, after
        )
        ok = np.flatnonzero(np.abs(self.frame[nearer] - frames) <= reach)
        rows, first = np.unique(nearer[ok], return_index=True)
        return rows, ok[first]


@njit(nogil=True, cache=True)
def _widen(codes, table, out):
    """float16 bit patterns to float32; numpy's own conversion takes three times as long."""
    for c in range(codes.shape[0]):
        for t in range(codes.shape[1]):
            out[c, t] = table[codes[c, t]]


def as_float32(a: np.ndarray) -> np.ndarray:
    """A contiguous float32 copy of a (channels, samples) piece."""
    if a.dtype != np.float16:
        return np.ascontiguousarray(a, dtype=np.float32)
    out = np.empty(a.shape, np.float32)
    _widen(np.asarray(a).view(np.uint16), HALVES, out)
    return out


def seen_in(logits: np.ndarray, valid: np.ndarray | None) -> np.ndarray | None:
    """(channels, samples) bool of what could be seen; None when everything was."""
    seen = logits > UNSEEN_LOGIT
    if valid is not None:
        seen &= valid
    return None if seen.all() else seen


@njit(nogil=True, cache=True)
def _width(q, loose, half, array_count, wide_count):
    """Electrodes at or above loose per column, at that sample and anywhere within half of it."""
    n = q.shape[1]
    for c in range(q.shape[0]):
        until = 0
        for t in range(n):
            if q[c, t] >= loose:
                array_count[t] += 1
                for k in range(max(until, t - half), min(n, t + half + 1)):
                    wide_count[k] += 1
                until = min(n, t + half + 1)


@njit(nogil=True, cache=True)
def _enough(q, t, half, threshold, near, begin, stop, need):
    """True if `need` of the electrodes near[begin:stop] reach the threshold within half of column t."""
    n = 0
    for k in range(begin, stop):
        if peak_near(q, near[k], t, half, half)[1] >= threshold:
            n += 1
            if n >= need:
                return True
    return False


@njit(nogil=True, cache=True)
def _find(q, seen, lo, hi, half, threshold, array_count, limit, ptr, near, inner, need, electrode, column):
    """Peaks in columns [lo, hi) that no array-wide event made and that enough inner electrodes saw; how many."""
    n = 0
    for c in range(q.shape[0]):
        for t in range(lo, hi):
            if not is_peak(q, c, t, threshold) or array_count[t] > limit:
                continue
            if not _enough(q, t, half, threshold, near, ptr[c], ptr[c] + inner[c], need):
                continue
            ok = True
            for k in range(t - half, t + half + 1):
                if not seen[c, k]:
                    ok = False
                    break
            if ok and n < len(electrode):
                electrode[n], column[n] = c, t
                n += 1
    return n


@njit(nogil=True, cache=True)
def _measure(
    x, q, noise, block_of, electrode, column, n, half, close, ptr, near, at, logit, lag, amp, largest, root_uv
):
    """Fill rows at[i]: at[i] + neighbours of the flat tables for peak i."""
    for i in range(n):
        r, t = electrode[i], column[i]
        s = noise[block_of[t]]
        offset = refined(q, r, t, t - half, t + half)
        top = 0.0
        own = 0.0
        for j in range(ptr[r + 1] - ptr[r]):
            e = near[ptr[r] + j]
            k, v = (t, q[r, t]) if j == 0 else peak_near(q, e, t, half, half)
            logit[at[i] + j] = max(v, -60.0)
            lag[at[i] + j] = k - t + refined(q, e, k, t - half, t + half) - offset
            amp[at[i] + j] = min(abs(x[e, k]) / s[e], 60000.0) if s[e] > 0 else 0.0
            extreme = 0.0
            for u in range(t - half, t + half + 1):
                extreme = max(extreme, abs(x[e, u]))
            extreme = extreme / s[e] if s[e] > 0 else 0.0
            top = max(top, extreme)
            if j == 0:
                own = abs(trough(x, e, t, close)) / s[e] if s[e] > 0 else 0.0
        largest[i] = own >= top
        root_uv[i] = x[r, t]


class _Builder:
    """Collects the pieces of every electrode's table."""

    def __init__(self, ptr: np.ndarray, near: np.ndarray) -> None:
        self.ptr, self.near = ptr, near
        self.parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(len(ptr) - 1)]

    def add(
        self, electrode: np.ndarray, at: np.ndarray, flat: list[np.ndarray], each: list[np.ndarray]
    ) -> None:
        edges = np.searchsorted(electrode, np.arange(len(self.parts) + 1))
        ends = np.append(at, len(flat[0]))
        for c in np.flatnonzero(np.diff(edges)):
            a, b = edges[c], edges[c + 1]
            shape = (b - a, self.ptr[c + 1] - self.ptr[c])
            tables = [f[ends[a] : ends[b]].reshape(shape).astype(np.float16) for f in flat]
            self.parts[c].append((each[0][a:b], *tables, *(e[a:b] for e in each[1:])))

    def table(self, c: int) -> PeakTable:
        near = self.near[self.ptr[c] : self.ptr[c + 1]]
        if not self.parts[c]:
            no, flat = np.zeros(0, np.int64), np.zeros((0, len(near)), np.float16)
            return PeakTable(near, no, flat, flat, flat, no.astype(bool), no, no.astype(np.float32))
        joined = [np.concatenate(p) for p in zip(*self.parts[c], strict=True)]
        self.parts[c] = []
        return PeakTable(near, *joined)


def peak_tables(
    x: np.ndarray, logits: np.ndarray, valid: np.ndarray | None, fs_hz: float, positions_um: np.ndarray,
    loose: float, half: int, reach_um: float, inner_um: float, need: int, array_limit: int, first_sample: int,
    tracker: NoiseTracker, progress: Progress,
) -> list[PeakTable]:  # fmt: skip
    """One PeakTable per electrode of x, logits (channels, samples); `valid` (samples,) bool or None.

    A fresh `tracker` is fed with all samples. Peaks that fewer than `need` electrodes within `inner_um` (the root counts) saw are left out: no unit can claim them.
    """
    n_channels, n = x.shape
    ptr, near = neighbour_lists(positions_um, np.arange(n_channels), None, reach_um)
    build = _Builder(ptr, near)
    step = max(round(fs_hz), 4 * half)
    close = min(half, max(1, round(TROUGH_MS * fs_hz / 1000)))
    sizes = np.diff(ptr)
    centre = np.repeat(positions_um, sizes, axis=0)
    close_by = np.hypot(*(positions_um[near] - centre).T) <= inner_um
    inner = np.add.reduceat(close_by, ptr[:-1]).astype(np.int64)
    for a in range(0, n, step):
        progress(a / n, "reading spikes off the signal")
        b = min(n, a + step)
        lo, hi = max(0, a - half - 1), min(n, b + half + 1)
        xs, q = as_float32(x[:, lo:hi]), as_float32(logits[:, lo:hi])
        seen = seen_in(q, None if valid is None else valid[lo:hi])
        tracker.process(
            xs[:, a - lo : b - lo], None if seen is None else seen[:, a - lo : b - lo], first_sample + a
        )
        block = (first_sample + np.arange(lo, hi)) // tracker.block_samples
        noise = tracker.table(int(block[0]), tracker.newest_block)
        block_of = np.minimum(block - block[0], len(noise) - 1)
        counts = np.zeros((2, hi - lo), np.int32)
        _width(q, loose, half, counts[0], counts[1])
        electrode, column = (np.zeros(n_channels * (b - a) // 2 + 1, np.int64) for _ in range(2))
        first = max(a - lo, half + 1)
        last = min(b - lo, hi - lo - half - 1)
        m = _find(
            q,
            np.ones(q.shape, bool) if seen is None else seen,
            first,
            last,
            half,
            loose,
            counts[0],
            array_limit,
            ptr,
            near,
            inner,
            need,
            electrode,
            column,
        )
        electrode, column = electrode[:m], column[:m]
        known = noise[block_of[column], electrode] > 0
        electrode, column = electrode[known], column[known]
        at = np.concatenate([[0], np.cumsum(sizes[electrode])])
        flat = [np.zeros(at[-1], np.float32) for _ in range(3)]
        largest, root_uv = np.zeros(len(electrode), bool), np.zeros(len(electrode), np.float32)
        _measure(
            xs,
            q,
            noise,
            block_of,
            electrode,
            column,
            len(electrode),
            half,
            close,
            ptr,
            near,
            at,
            *flat,
            largest,
            root_uv,
        )
        build.add(electrode, at[:-1], flat, [lo + column, largest, counts[1][column], root_uv])
    return [build.table(c) for c in range(n_channels)]
