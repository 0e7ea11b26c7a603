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
from spiked.sort.buffer import BASE, DROPPED, FILL, FINAL, N_PENDING, NEXT, SLICE, StreamBuffer, as_mask
from spiked.sort.candidates import evaluate, noise_row, rival_announced
from spiked.sort.conflicts import PENDING, UNDECIDED, resolve
from spiked.sort.geometry import distances, neighbour_lists
from spiked.sort.parameters import RTSortParameters
from spiked.sort.peaks import ElectrodePeaks
from spiked.sort.sequences import LOOSE, Sequences
from spiked.sort.window import any_above, is_inside, is_peak
from spiked_client.protocol import SPIKE

# mypy: disable-error-code="no-untyped-def"

__all__ = ["ElectrodePeaks", "RTSort", "warm_up"]

MAX_PENDING = 16384  # candidates waiting for a decision; more are dropped and counted
MAX_OUT = 65536  # spikes kept before they are handed on
PIECE = 8192  # samples to give at a time where all of them are there
TROUGH_MS = 0.1
NO_SPIKES = np.zeros(0, SPIKE)


@njit(nogil=True, cache=True)
def _advance(n_out, cleaned, noise, size, oldest, newest, half, ahead, reach, loose, array_limit, lim,
             bx, bq, bad, n_bad, n_above, state, roots, root_ptr, root_units, near_ptr, near,
             ptr, electrode, latency, amp, w_lat, w_amp, flags, min_loose, min_inner, root_mean, root_sd,
             roots_of, window, shadow, rival_ptr, rival, longest, pending, order, contested, out, mark, lag, level, value):  # fmt: skip
    """Evaluate what the buffer holds and put after out[:n_out] what becomes final. Returns how many there are then."""
    last = state[FILL] - ahead
    while state[NEXT] - state[BASE] < last:
        begin = state[NEXT] - state[BASE]
        stop = min(last, begin + SLICE)
        for r in range(len(roots)):
            if not any_above(bq, roots[r], begin, stop, loose):
                continue
            for t in range(begin, stop):
                if is_peak(bq, roots[r], t, loose):
                    sample = state[BASE] + t
                    row = noise_row(sample, size, oldest, newest, len(noise))
                    if row < 0:
                        continue
                    limits = 1 if is_inside(sample, cleaned) else 0
                    mark[-1] += 1
                    evaluate(
                        r, t, sample, half, ahead, reach, noise[row], bx, bq, bad, n_bad, n_above,
                        roots, root_ptr, root_units, near_ptr, near, ptr, electrode, latency, amp, w_lat, w_amp, flags,
                        min_loose, min_inner, root_mean, root_sd, loose, array_limit, lim[limits], pending, state,
                        mark, lag, level, value, mark[-1],
                    )  # fmt: skip
        state[NEXT] = state[BASE] + stop
        for i in range(state[N_PENDING]):
            contested[i] = pending[i].state == UNDECIDED and rival_announced(
                pending[i].unit, pending[i].sample, state, noise, size, oldest, newest, bx, bq, loose, lim[0],
                roots_of, root_mean, root_sd, window, rival_ptr, rival,
            )  # fmt: skip
        state[N_PENDING], n_out, state[FINAL] = resolve(
            pending, state[N_PENDING], window, shadow, longest, state[NEXT], contested, out, n_out, order
        )
    return n_out


@njit(nogil=True, cache=True)
def _tell(found, n, unit_ids, roots, spikes):
    """found[:n] (PENDING) as spikes[:n] (SPIKE)."""
    for i in range(n):
        u = found[i].unit
        spikes[i].sample = found[i].sample
        spikes[i].unit = unit_ids[u]
        spikes[i].channel = roots[u]
        spikes[i].amplitude_uv = found[i].amplitude_uv
        spikes[i].score = found[i].score


def conflict_windows(sequences: Sequences, params: RTSortParameters, hurry: bool = True) -> np.ndarray:
    """(units, units) int16: within how many samples two units cannot both have fired; -1: they may.

    Units that share electrodes conflict within `shared_overlap_ms`, in a `hurry` no longer than a spike of either can
    take between their roots.
    """
    n, fs = len(sequences), sequences.fs_hz
    d = distances(sequences.positions_um[sequences.roots])
    has = np.zeros((n, sequences.n_channels), np.float32)
    unit = np.repeat(np.arange(n), np.diff(sequences.ptr))
    loose = (sequences.flags & LOOSE) > 0
    has[unit[loose], sequences.electrode[loose]] = 1
    shared = has @ has.T
    size = has.sum(1)
    share = shared / np.maximum(1, np.minimum(size[:, None], size[None]))
    overlap, most = (round(ms * fs / 1000) for ms in (params.overlap_ms, params.shared_overlap_ms))
    out = np.full((n, n), -1, np.int16)
    both = (d <= params.outer_radius_um) & (share >= params.shared_fraction)
    out[both] = np.minimum(np.ceil(root_lags(sequences)) + overlap, most)[both] if hurry else most
    out[(d <= params.inner_radius_um) & (out < 0)] = overlap
    for u, v, samples in sequences.echoes:
        out[u, v] = out[v, u] = max(out[u, v], samples)
    np.fill_diagonal(out, overlap)
    return out


def shadows(sequences: Sequences, params: RTSortParameters) -> np.ndarray:
    """(units, units) int16: within how many samples after a spike of one unit the other's is not reported; -1: it is.

    A unit shadows itself, and those that share its electrodes with smaller roots: they see its late phases.
    """
    out = conflict_windows(sequences, params, hurry=False)
    out[sequences.root_amp_mean[:, None] < sequences.root_amp_mean[None]] = -1
    np.fill_diagonal(out, round(params.refractory_ms * sequences.fs_hz / 1000))
    return out


def root_lags(sequences: Sequences) -> np.ndarray:
    """(units, units): samples between the troughs that a spike of either unit has on the two roots; 0 where unknown."""
    n = len(sequences)
    lag = np.zeros((n, sequences.n_channels))
    lag[np.repeat(np.arange(n), np.diff(sequences.ptr)), sequences.electrode] = np.abs(sequences.latency)
    at_root = lag[:, sequences.roots]
    return np.asarray(np.maximum(at_root, at_root.T))


def samples_ahead(sequences: Sequences, half: int, clip: float) -> int:
    """Samples after a trough in which a companion's peak can still matter, at most `half`.

    A lag that differs from the unit's by more than `clip` counts as one that differs by `clip`.
    """
    return min(half, int(np.ceil(sequences.latency.max(initial=0) + clip)))


def one_unit(fs_hz: float, channel_ids: tuple[str, ...], positions_um: np.ndarray) -> Sequences:
    """A unit on the first channel alone, that no spike is: for what needs sequences, whichever."""
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
    return Sequences(fs_hz, channel_ids, positions_um, -1.0, -2.0, RTSortParameters(), **arrays)


def warm_up() -> None:
    """Compile the assignment (seconds, once per machine) so that a later swap of sequences does not wait for it."""
    RTSort(one_unit(20_000.0, ("0",), np.zeros((1, 2))), 20_000.0, 1)


class RTSort:
    """Streaming assignment to known sequences.

    `process(x, logits, valid, noise, first_sample)` takes consecutive samples, any number of them, and returns the
    spikes (SPIKE records, ordered by sample, then unit) that became final; all up to `decided_until` are. The
    concatenated result does not depend on how the stream was cut. A spike is final once `lookahead_samples` are there,
    its trough's own the first, unless it waits for a peak that may become a better candidate, or behind a spike
    that does. With `reuse` the records that `process` returns are overwritten by its next call. In a `hurry` (a live stream)
    it looks only as far ahead as a companion's peak can still matter, and a spike's size at its root has the room that it has live.
    """

    def __init__(
        self, sequences: Sequences, fs_hz: float, n_channels: int, params: RTSortParameters | None = None,
        reuse: bool = False, hurry: bool = True,
    ) -> None:  # fmt: skip
        if n_channels != sequences.n_channels:
            raise ValueError(f"{n_channels} channels, but sequences of {sequences.n_channels}")
        self.sequences, self.params, self.fs_hz = sequences, params or sequences.parameters, float(fs_hz)
        p, per_ms = self.params, fs_hz / 1000
        self.half = max(1, round(p.coincidence_ms * per_ms))
        self._window = conflict_windows(sequences, p, hurry)
        self._shadow = shadows(sequences, p)
        self._longest = int(max(self._window.max(initial=0), self._shadow.max(initial=0)))
        self._rival_ptr = np.concatenate([[0], np.cumsum((self._window >= 0).sum(1))]).astype(np.int64)
        self._rival = np.nonzero(self._window >= 0)[1].astype(np.int64)
        self._array_limit = int(max(p.array_noise_min, p.array_noise_fraction * n_channels))
        limit = p.max_latency_diff_ms * per_ms
        factor = p.clip_factor
        self._ahead = max(1, samples_ahead(sequences, self.half, factor * limit)) if hurry else self.half
        self._reach = min(self._ahead, max(1, round(TROUGH_MS * per_ms)))
        root_sd = p.root_amplitude_sd_spike if hurry else p.max_root_amplitude_sd
        self._limits = np.array(
            [
                [factor * limit, factor * diff, limit, diff, root_sd]
                for diff in (p.max_amplitude_diff, p.cleaned_amplitude_diff)
            ]
        )
        self._cleaned = np.zeros((0, 2), np.int64)
        self._tables()
        self._buffer = StreamBuffer(n_channels, self.half)
        self._pending = np.zeros(MAX_PENDING, PENDING)
        self._order = np.zeros(MAX_PENDING, np.int64)
        self._contested = np.zeros(MAX_PENDING, np.bool_)
        self._out = np.zeros(MAX_OUT, PENDING)
        self._spikes = np.zeros(MAX_OUT, SPIKE)
        self._reuse = reuse
        self._mark = np.zeros(n_channels + 1, np.int64)  # the last one counts
        self._scratch = tuple(np.zeros(n_channels, np.float64) for _ in range(3))
        self._next: int | None = None
        self._late: list[np.ndarray] = []
        s, b = self.sequences, self._buffer
        self._fixed = (
            self.half, self._ahead, self._reach, float(s.loose_logit), self._array_limit, self._limits, b.x, b.q, b.bad, b.n_bad, b.n_above, b.state,
            self._roots, self._root_ptr, self._root_units, self._near_ptr, self._near, s.ptr, s.electrode, s.latency,
            self._amp, self._w_lat, self._w_amp, s.flags, s.min_loose, s.min_inner, s.root_amp_mean, s.root_amp_sd, s.roots,
            self._window, self._shadow, self._rival_ptr, self._rival, self._longest, self._pending, self._order, self._contested, self._out,
            self._mark, *self._scratch,
        )  # fmt: skip
        # Compiled here, not when the first samples wait for it.
        self._evaluate(0, NoiseTracker(n_channels, fs_hz))
        _tell(self._out, 0, self.sequences.unit_ids, self.sequences.roots, self._spikes)

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
        return max(self._ahead, int(self._window.max(initial=0))) + 1

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

        `valid`: None, (n,) or (channels, n) bool; no spike is reported whose root is invalid at its trough. A detector's mask
        leaves out what is close to blank samples already.
        `noise` must have seen these samples. A jump in sample numbers ends what came before, as `flush` does.
        """
        if self._next != first_sample:
            self.reset(first_sample)
        n, mask, b = x.shape[1], as_mask(valid), self._buffer
        self._next = first_sample + n
        at = n_out = 0
        if len(self.sequences) == 0:
            at, b.state[FINAL] = n, self._next
        while at < n:
            at = b.take(x, logits, mask, at)
            n_out = self._evaluate(n_out, noise)
            if n_out > MAX_OUT // 2:
                self._late.append(self._records(n_out).copy())
                n_out = 0
        found = self._records(n_out)
        if self._late:
            found = np.concatenate([*self._late, found])
            self._late = []
        return found

    def _evaluate(self, n_out: int, noise: NoiseTracker) -> int:
        return _advance(
            n_out,
            self._cleaned,
            noise.ring,
            noise.block_samples,
            noise.oldest_block,
            noise.newest_block,
            *self._fixed,
        )

    def _records(self, n: int) -> np.ndarray:
        """The first n of what was put out, as SPIKE records."""
        if n == 0:
            return NO_SPIKES
        _tell(self._out, n, self.sequences.unit_ids, self.sequences.roots, self._spikes)
        return self._spikes[:n] if self._reuse else self._spikes[:n].copy()

    def note_cleaned(self, start: int, stop: int) -> None:
        """Say that a stimulus' artifact was removed from the samples [start, stop), in order and before they are processed: amplitudes there are less sure."""
        kept = self._cleaned
        if len(kept) and kept[-1, 1] >= start:
            kept[-1, 1] = max(kept[-1, 1], stop)
        else:
            kept = kept[kept[:, 1] > self._buffer.state[NEXT]]
            self._cleaned = np.concatenate([kept, [[start, stop]]])

    def flush(self) -> np.ndarray:
        """Decide all candidates there are, as at the end of the stream; SPIKE records."""
        state, end = self._buffer.state, np.iinfo(np.int64).max // 2
        self._contested[:] = False
        _, n, _ = resolve(
            self._pending, state[N_PENDING], self._window, self._shadow, self._longest, end, self._contested, self._out, 0, self._order
        )  # fmt: skip
        state[N_PENDING] = 0
        state[FINAL] = self._buffer.end
        self._next = None
        late, self._late = self._late, []
        return np.concatenate([*late, self._records(int(n))])

    def reset(self, first_sample: int) -> None:
        """Forget the past; what was decided by it comes with the next call. The next sample is `first_sample`."""
        if self._next is not None:
            self._late.append(self.flush())
        self._buffer.start(first_sample)
        self._next = first_sample
