"""Online assignment: which unit fired, decided sample by sample from samples and logits.

After RT-Sort (van der Molen, Lim et al. 2024). A unit is a candidate at a detection peak on its own root
electrode, however small as long as it is loose; it must match in which electrodes saw the spike, in latencies and in amplitudes; of conflicting candidates
the best score wins. What differs from the published code, and why, is in docs/rtsort-mends.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from spiked.clean.noise import NoiseTracker
from spiked.sort.buffer import (
    BASE,
    DROPPED,
    FILL,
    FINAL,
    N_PENDING,
    NEXT,
    SLICE,
    StreamBuffer,
    any_bad,
    append,
    as_mask,
    bad_near,
)
from spiked.sort.conflicts import PENDING, UNDECIDED, resolve
from spiked.sort.geometry import distances, neighbour_lists
from spiked.sort.parameters import RTSortParameters
from spiked.sort.peaks import ElectrodePeaks
from spiked.sort.sequences import INNER, LOOSE, Sequences
from spiked.sort.window import is_peak, peak_near, refined, trough
from spiked_client.protocol import SPIKE

# mypy: disable-error-code="no-untyped-def"

__all__ = ["ElectrodePeaks", "RTSort", "warm_up"]

MAX_PENDING = 16384  # candidates waiting for a decision; more are dropped and counted
MAX_OUT = 65536  # spikes of one call
PIECE = 8192  # samples of one call
TROUGH_MS = 0.1


@njit(nogil=True, cache=True)
def _match(u, at, half, noise, bx, bq, bad, careful, root_offset, ptr, electrode, latency, amp, w_lat, w_amp, flags,
           min_loose, min_inner, loose, lim, mark, lag, level, value, stamp):  # fmt: skip
    """(fits, sum of the two distances in units of their limits, loose electrodes) of unit u at column `at`."""
    d_lat = d_amp = seen_lat = seen_amp = 0.0
    n_loose = n_inner = 0
    for k in range(ptr[u], ptr[u + 1]):
        e = electrode[k]
        if mark[e] != stamp:
            mark[e] = stamp
            value[e] = np.nan
            if not (careful and bad_near(bad, e, at, half)) and noise[e] > 0:
                t, level[e] = peak_near(bq, e, at, half) if k > ptr[u] else (at, bq[e, at])
                lag[e] = t - at + refined(bq, e, t, at - half, at + half) - root_offset
                value[e] = abs(bx[e, t]) / noise[e]
        if np.isnan(value[e]):
            continue
        if level[e] >= loose:
            if flags[k] & LOOSE:
                n_loose += 1
            if flags[k] & INNER:
                n_inner += 1
        d_lat += w_lat[k] * min(abs(lag[e] - latency[k]), lim[0])
        d_amp += w_amp[k] * min(abs(value[e] - amp[k]) / amp[k], lim[1])
        seen_lat += w_lat[k]
        seen_amp += w_amp[k]
    if n_loose < min_loose[u] or n_inner < min_inner[u] or seen_lat < 0.5 or seen_amp < 0.5:
        return False, 0.0, 0
    d_lat /= seen_lat * lim[2]
    d_amp /= seen_amp * lim[3]
    return d_lat <= 1 and d_amp <= 1, d_lat + d_amp, n_loose


@njit(nogil=True, cache=True)
def _score(distance, n_loose, r, at, half, bq, near_ptr, near, loose):
    """Published score over its largest value: closeness, plus how many of the electrodes seen belong to the unit."""
    crossed = 0
    for k in range(near_ptr[r], near_ptr[r + 1]):
        if peak_near(bq, near[k], at, half)[1] >= loose:
            crossed += 1
    return (2.1 - distance + 0.5 * min(1.0, n_loose / max(1, crossed))) / 2.6


@njit(nogil=True, cache=True)
def _evaluate(r, at, sample, half, reach, noise, bx, bq, bad, n_bad, roots, root_ptr, root_units, near_ptr, near,
              ptr, electrode, latency, amp, w_lat, w_amp, flags, min_loose, min_inner, root_mean, root_sd,
              loose, array_limit, lim, pending, state, mark, lag, level, value, stamp):  # fmt: skip
    """Append to `pending` the units rooted at roots[r] that fit the peak at column `at`."""
    root = roots[r]
    careful = any_bad(n_bad, at, half)
    if (careful and bad_near(bad, root, at, half)) or not noise[root] > 0:
        return
    count = 0
    if bq.shape[0] > array_limit:
        for e in range(bq.shape[0]):
            count += bq[e, at] >= loose
        if count > array_limit:
            return
    offset = refined(bq, root, at, at - half, at + half)
    a = abs(bx[root, at]) / noise[root]
    for i in range(root_ptr[r], root_ptr[r + 1]):
        u = root_units[i]
        if abs(a - root_mean[u]) > lim[4] * root_sd[u]:
            continue
        fits, distance, n_loose = _match(
            u, at, half, noise, bx, bq, bad, careful, offset, ptr, electrode, latency, amp, w_lat, w_amp, flags,
            min_loose, min_inner, loose, lim, mark, lag, level, value, stamp,
        )  # fmt: skip
        if not fits:
            continue
        n = state[N_PENDING]
        if n >= len(pending):
            state[DROPPED] += 1
            continue
        pending[n].sample = sample
        pending[n].unit = u
        pending[n].state = UNDECIDED
        pending[n].score = _score(distance, n_loose, r, at, half, bq, near_ptr, near, loose)
        pending[n].amplitude_uv = trough(bx, root, at, reach)
        state[N_PENDING] = n + 1


@njit(nogil=True, cache=True)
def _advance(x, q, valid, noise, first_block, block_samples, half, reach, loose, array_limit, lim,
             bx, bq, bad, n_bad, state, keep, roots, root_ptr, root_units, near_ptr, near,
             ptr, electrode, latency, amp, w_lat, w_amp, flags, min_loose, min_inner, root_mean, root_sd,
             window, longest, pending, order, out, mark, lag, level, value):  # fmt: skip
    """Take in x, q, valid (channels, n) and put into `out` what becomes final. Returns how many."""
    n_out = 0
    at = 0
    while at < x.shape[1]:
        m = min(SLICE, x.shape[1] - at)
        append(bx, bq, bad, n_bad, state, keep, x, q, valid, at, m)
        at += m
        begin = state[NEXT] - state[BASE]
        stop = state[FILL] - half - 1
        if stop <= begin:
            continue
        for r in range(len(roots)):
            for t in range(begin, stop):
                if is_peak(bq, roots[r], t, loose):
                    sample = state[BASE] + t
                    mark[-1] += 1
                    _evaluate(
                        r, t, sample, half, reach, noise[sample // block_samples - first_block], bx, bq, bad, n_bad,
                        roots, root_ptr, root_units, near_ptr, near, ptr, electrode, latency, amp, w_lat, w_amp, flags,
                        min_loose, min_inner, root_mean, root_sd, loose, array_limit, lim, pending, state,
                        mark, lag, level, value, mark[-1],
                    )  # fmt: skip
        state[NEXT] = state[BASE] + stop
        state[N_PENDING], n_out, state[FINAL] = resolve(
            pending, state[N_PENDING], window, longest, state[NEXT], out, n_out, order
        )
    return n_out


def conflict_windows(sequences: Sequences, params: RTSortParameters) -> np.ndarray:
    """(units, units) int16: within how many samples two units cannot both have fired; -1: they may."""
    n, fs = len(sequences), sequences.fs_hz
    d = distances(sequences.positions_um[sequences.roots])
    has = np.zeros((n, sequences.n_channels), np.float32)
    unit = np.repeat(np.arange(n), np.diff(sequences.ptr))
    loose = (sequences.flags & LOOSE) > 0
    has[unit[loose], sequences.electrode[loose]] = 1
    shared = has @ has.T
    size = has.sum(1)
    share = shared / np.maximum(1, np.minimum(size[:, None], size[None]))
    out = np.full((n, n), -1, np.int16)
    out[(d <= params.outer_radius_um) & (share >= params.shared_fraction)] = round(
        params.shared_overlap_ms * fs / 1000
    )
    near = (d <= params.inner_radius_um) & (out < 0)
    out[near] = round(params.overlap_ms * fs / 1000)
    np.fill_diagonal(out, round(params.overlap_ms * fs / 1000))
    return out


def warm_up() -> None:
    """Compile the assignment (seconds, once per machine) so that a later swap of sequences does not wait for it."""
    one = np.ones(1)
    arrays: dict[str, Any] = dict.fromkeys(
        (
            "root_amp_mean",
            "root_amp_sd",
            "root_amplitude_uv",
            "min_loose",
            "min_inner",
            "n_spikes",
            "rate_hz",
        ),
        one,
    )
    arrays |= dict.fromkeys(("latency", "latency_sd", "amp", "amp_sd", "prob", "flags"), one)
    arrays |= dict.fromkeys(("unit_ids", "roots", "electrode"), np.zeros(1)) | {"ptr": np.arange(2)}
    one_unit = Sequences(20_000.0, ("0",), np.zeros((1, 2)), -1.0, -2.0, RTSortParameters(), **arrays)
    RTSort(one_unit, one_unit.fs_hz, 1)


class RTSort:
    """Streaming assignment to known sequences.

    `process(x, logits, valid, noise, first_sample)` takes consecutive samples, any number of them, and returns the
    spikes (SPIKE records, ordered by sample, then unit) that became final; all up to `decided_until` are. The
    concatenated result does not depend on how the stream was cut. A spike is final `lookahead_samples` after its
    trough unless a chain of better and better overlapping candidates makes it wait.
    """

    def __init__(
        self, sequences: Sequences, fs_hz: float, n_channels: int, params: RTSortParameters | None = None
    ) -> None:
        if n_channels != sequences.n_channels:
            raise ValueError(f"{n_channels} channels, but sequences of {sequences.n_channels}")
        self.sequences, self.params, self.fs_hz = sequences, params or sequences.parameters, float(fs_hz)
        p, per_ms = self.params, fs_hz / 1000
        self.half = max(1, round(p.coincidence_ms * per_ms))
        self._reach = min(self.half, max(1, round(TROUGH_MS * per_ms)))
        self._window = conflict_windows(sequences, p)
        self._longest = int(self._window.max(initial=0))
        self._array_limit = int(max(p.array_noise_min, p.array_noise_fraction * n_channels))
        limit = p.max_latency_diff_ms * per_ms
        self._limits = np.array(
            [
                p.clip_factor * limit,
                p.clip_factor * p.max_amplitude_diff,
                limit,
                p.max_amplitude_diff,
                p.max_root_amplitude_sd,
            ]
        )
        self._tables()
        self._buffer = StreamBuffer(n_channels, self.half)
        self._pending = np.zeros(MAX_PENDING, PENDING)
        self._order = np.zeros(MAX_PENDING, np.int64)
        self._out = np.zeros(MAX_OUT, PENDING)
        self._mark = np.zeros(n_channels + 1, np.int64)  # the last one counts
        self._scratch = tuple(np.zeros(n_channels, np.float64) for _ in range(3))
        self._next: int | None = None
        self._late: list[np.ndarray] = []
        # Compiled here, not when the first samples wait for it.
        nothing = np.zeros((n_channels, 0), np.float32)
        self._piece(nothing, nothing, as_mask(None), NoiseTracker(n_channels, fs_hz), 0)

    def _tables(self) -> None:
        s = self.sequences
        unit = np.repeat(np.arange(len(s)), np.diff(s.ptr))
        is_root = np.zeros(len(s.electrode), bool)
        is_root[s.ptr[:-1]] = True
        w_lat = np.where(is_root, 0.0, s.prob.astype(float))
        w_amp = s.prob.astype(float)
        total_lat, total_amp = (np.bincount(unit, w, len(s)) for w in (w_lat, w_amp))
        self._w_lat = w_lat / np.maximum(total_lat, 1e-12)[unit]
        self._w_amp = w_amp / np.maximum(total_amp, 1e-12)[unit]
        self._amp = np.maximum(s.amp, 0.1).astype(np.float64)
        self._roots, self._root_of = np.unique(s.roots, return_inverse=True)
        self._root_units = np.argsort(self._root_of, kind="stable").astype(np.int64)
        self._root_ptr = np.concatenate(
            [[0], np.cumsum(np.bincount(self._root_of, minlength=len(self._roots)))]
        )
        used = np.unique(s.electrode)
        self._near_ptr, self._near = neighbour_lists(
            s.positions_um, self._roots, used, self.params.outer_radius_um
        )

    @property
    def lookahead_samples(self) -> int:
        """Samples that must follow a trough before its spike can be final."""
        return self.half + self._longest + 2

    @property
    def decided_until(self) -> int:
        """Everything before this sample number is final."""
        return int(self._buffer.state[FINAL])

    @property
    def dropped(self) -> int:
        """Candidates dropped because more than MAX_PENDING waited."""
        return int(self._buffer.state[DROPPED])

    def process(
        self,
        x: np.ndarray,
        logits: np.ndarray,
        valid: np.ndarray | None,
        noise: NoiseTracker,
        first_sample: int,
    ) -> np.ndarray:
        """Samples [first_sample, first_sample + n) of x and logits, (channels, n); SPIKE records.

        `valid`: None, (n,) or (channels, n) bool; no spike is reported whose root was invalid within 0.5 ms.
        `noise` must have seen these samples. A jump in sample numbers ends what came before, as `flush` does.
        """
        if self._next != first_sample:
            if self._next is not None:
                self._late.append(self.flush())
            self._buffer.start(first_sample)
            self._next = first_sample
        n = x.shape[1]
        mask = as_mask(valid)
        found = self._late
        self._late = []
        for a in range(0, n, PIECE):
            b = min(n, a + PIECE)
            found.append(
                self._piece(
                    x[:, a:b], logits[:, a:b], mask[:, a:b] if len(mask) else mask, noise, first_sample + a
                )
            )
        self._next = first_sample + n
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, SPIKE), *found])

    def _piece(
        self, x: np.ndarray, logits: np.ndarray, mask: np.ndarray, noise: NoiseTracker, first_sample: int
    ) -> np.ndarray:
        s, b = self.sequences, self._buffer
        if len(s) == 0:
            b.state[FINAL] = first_sample + x.shape[1]
            return np.zeros(0, SPIKE)
        size = noise.block_samples
        first_block = int(b.state[NEXT]) // size
        table = noise.table(first_block, (first_sample + x.shape[1]) // size)
        n = _advance(
            np.ascontiguousarray(x, np.float32), np.ascontiguousarray(logits, np.float32), np.ascontiguousarray(mask),
            table, first_block, size, self.half, self._reach, s.loose_logit, self._array_limit, self._limits,
            b.x, b.q, b.bad, b.n_bad, b.state, b.keep, self._roots, self._root_ptr, self._root_units, self._near_ptr, self._near,
            s.ptr, s.electrode, s.latency, self._amp, self._w_lat, self._w_amp, s.flags, s.min_loose, s.min_inner,
            s.root_amp_mean, s.root_amp_sd, self._window, self._longest, self._pending, self._order, self._out,
            self._mark, *self._scratch,
        )  # fmt: skip
        return self._records(n)

    def _records(self, n: int) -> np.ndarray:
        spikes = np.zeros(n, SPIKE)
        got = self._out[:n]
        spikes["sample"], spikes["amplitude_uv"], spikes["score"] = (
            got["sample"],
            got["amplitude_uv"],
            got["score"],
        )
        spikes["unit"], spikes["channel"] = (
            self.sequences.unit_ids[got["unit"]],
            self.sequences.roots[got["unit"]],
        )
        return spikes

    def flush(self) -> np.ndarray:
        """Decide all candidates there are, as at the end of the stream; SPIKE records."""
        state = self._buffer.state
        late = self._late
        self._late = []
        end = np.iinfo(np.int64).max // 2
        state[N_PENDING], n, _ = resolve(
            self._pending, state[N_PENDING], self._window, self._longest, end, self._out, 0, self._order
        )
        state[N_PENDING] = 0
        state[FINAL] = self._buffer.end
        self._next = None
        return np.concatenate([np.zeros(0, SPIKE), *late, self._records(int(n))])

    def reset(self, first_sample: int) -> None:
        """Forget the past; what was decided by it comes with the next call. The next sample is `first_sample`."""
        if self._next is not None:
            self._late.append(self.flush())
        self._buffer.start(first_sample)
        self._next = first_sample
