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
    append,
    as_mask,
)
from spiked.sort.candidates import evaluate, rival_announced
from spiked.sort.conflicts import PENDING, UNDECIDED, resolve
from spiked.sort.geometry import distances, neighbour_lists
from spiked.sort.parameters import RTSortParameters
from spiked.sort.peaks import ElectrodePeaks
from spiked.sort.sequences import LOOSE, Sequences
from spiked.sort.window import is_peak
from spiked_client.protocol import SPIKE

# mypy: disable-error-code="no-untyped-def"

__all__ = ["ElectrodePeaks", "RTSort", "warm_up"]

MAX_PENDING = 16384  # candidates waiting for a decision; more are dropped and counted
MAX_OUT = 65536  # spikes of one call
PIECE = 8192  # samples of one call
TROUGH_MS = 0.1


@njit(nogil=True, cache=True)
def _advance(x, q, valid, noise, first_block, block_samples, half, reach, loose, array_limit, lim,
             bx, bq, bad, n_bad, state, keep, roots, root_ptr, root_units, near_ptr, near,
             ptr, electrode, latency, amp, w_lat, w_amp, flags, min_loose, min_inner, root_mean, root_sd,
             roots_of, window, rival_ptr, rival, longest, pending, order, contested, out, mark, lag, level, value):  # fmt: skip
    """Take in x, q, valid (channels, n) and put into `out` what becomes final. Returns how many."""
    n_out = 0
    at = 0
    while at < x.shape[1]:
        m = min(SLICE, x.shape[1] - at)
        append(bx, bq, bad, n_bad, state, keep, x, q, valid, at, m)
        at += m
        begin = state[NEXT] - state[BASE]
        stop = state[FILL] - half
        if stop <= begin:
            continue
        for r in range(len(roots)):
            for t in range(begin, stop):
                if is_peak(bq, roots[r], t, loose):
                    sample = state[BASE] + t
                    mark[-1] += 1
                    evaluate(
                        r, t, sample, half, reach, noise[sample // block_samples - first_block], bx, bq, bad, n_bad,
                        roots, root_ptr, root_units, near_ptr, near, ptr, electrode, latency, amp, w_lat, w_amp, flags,
                        min_loose, min_inner, root_mean, root_sd, loose, array_limit, lim, pending, state,
                        mark, lag, level, value, mark[-1],
                    )  # fmt: skip
        state[NEXT] = state[BASE] + stop
        for i in range(state[N_PENDING]):
            contested[i] = pending[i].state == UNDECIDED and rival_announced(
                pending[i].unit, pending[i].sample, state, noise, first_block, block_samples, bx, bq, loose, lim,
                roots_of, root_mean, root_sd, window, rival_ptr, rival,
            )  # fmt: skip
        state[N_PENDING], n_out, state[FINAL] = resolve(
            pending, state[N_PENDING], window, longest, state[NEXT], contested, out, n_out, order
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
    concatenated result does not depend on how the stream was cut. A spike is final once `lookahead_samples` are there,
    its trough's own the first, unless it waits for a peak that may become a better candidate, or behind a spike
    that does.
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
        self._rival_ptr = np.concatenate([[0], np.cumsum((self._window >= 0).sum(1))]).astype(np.int64)
        self._rival = np.nonzero(self._window >= 0)[1].astype(np.int64)
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
        self._contested = np.zeros(MAX_PENDING, np.bool_)
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
        """Samples from a trough on, its own included, with which its spike is final if no rival is announced."""
        return max(self.half, self._longest) + 1

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
            s.root_amp_mean, s.root_amp_sd, s.roots, self._window, self._rival_ptr, self._rival, self._longest,
            self._pending, self._order, self._contested, self._out, self._mark, *self._scratch,
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
        self._contested[:] = False
        state[N_PENDING], n, _ = resolve(
            self._pending,
            state[N_PENDING],
            self._window,
            self._longest,
            end,
            self._contested,
            self._out,
            0,
            self._order,
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
