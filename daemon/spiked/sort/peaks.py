"""Unsorted spikes: detection peaks per electrode, each spike reported once, on its largest electrode."""

from __future__ import annotations

import numpy as np
from numba import njit

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
from spiked.sort.geometry import distances
from spiked.sort.window import is_peak, trough
from spiked_client.protocol import SPIKE

# mypy: disable-error-code="no-untyped-def"

EXCLUDE_UM = 50.0
EXCLUDE_MS = 0.5
TROUGH_MS = 0.1
MAX_PENDING = 32768
MAX_OUT = 131072
PIECE = 8192


@njit(nogil=True, cache=True)
def _advance(
    x,
    q,
    valid,
    half,
    threshold,
    bx,
    bq,
    bad,
    n_bad,
    state,
    keep,
    window,
    longest,
    pending,
    order,
    contested,
    out,
):
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
        for e in range(bx.shape[0]):
            for t in range(begin, stop):
                if is_peak(bq, e, t, threshold):
                    if any_bad(n_bad, t, half) and bad_near(bad, e, t, half):
                        continue
                    n = state[N_PENDING]
                    if n >= len(pending):
                        state[DROPPED] += 1
                        continue
                    v = trough(bx, e, t, half)
                    pending[n].sample = state[BASE] + t
                    pending[n].unit = e
                    pending[n].state = UNDECIDED
                    pending[n].score = abs(v)
                    pending[n].amplitude_uv = v
                    pending[n].logit = bq[e, t]
                    state[N_PENDING] = n + 1
        state[NEXT] = state[BASE] + stop
        for i in range(state[N_PENDING]):
            contested[i] = pending[i].sample + longest >= state[NEXT]
        state[N_PENDING], n_out, state[FINAL] = resolve(
            pending, state[N_PENDING], window, longest, state[NEXT], contested, out, n_out, order
        )
    return n_out


class ElectrodePeaks:
    """Streaming multi-unit spikes: local peaks of the logits at or above `threshold_logit`.

    Of peaks within 50 um and 0.5 ms of each other the one with the largest deflection is kept. Same promises as
    RTSort: any cut of the stream gives the same spikes, and all before `decided_until` are final. In the records the
    unit is -1 and the score the detection probability.
    """

    def __init__(self, positions_um: np.ndarray, fs_hz: float, threshold_logit: float) -> None:
        self.threshold = float(threshold_logit)
        d = distances(positions_um)
        self._longest = max(1, round(EXCLUDE_MS * fs_hz / 1000))
        self._window = np.where(d <= EXCLUDE_UM, self._longest, -1).astype(np.int16)
        self._half = max(1, round(TROUGH_MS * fs_hz / 1000))
        self._buffer = StreamBuffer(len(d), self._half)
        self._pending = np.zeros(MAX_PENDING, PENDING)
        self._order = np.zeros(MAX_PENDING, np.int64)
        self._contested = np.zeros(MAX_PENDING, np.bool_)
        self._out = np.zeros(MAX_OUT, PENDING)
        self._next: int | None = None
        self._late: list[np.ndarray] = []
        # Compiled here, not when the first samples wait for it.
        nothing = np.zeros((len(d), 0), np.float32)
        self.process(nothing, nothing, None, 0)
        self._next = None

    @property
    def lookahead_samples(self) -> int:
        """Samples that must follow a trough before its spike can be final."""
        return self._half + self._longest + 1

    @property
    def decided_until(self) -> int:
        """Everything before this sample number is final."""
        return int(self._buffer.state[FINAL])

    def process(
        self, x: np.ndarray, logits: np.ndarray, valid: np.ndarray | None, first_sample: int
    ) -> np.ndarray:
        """Samples [first_sample, first_sample + n) of x and logits, (channels, n); SPIKE records with unit -1."""
        if self._next != first_sample:
            self.reset(first_sample)
        mask = as_mask(valid)
        b, found = self._buffer, self._late
        self._late = []
        for a in range(0, x.shape[1], PIECE):
            z = slice(a, min(x.shape[1], a + PIECE))
            n = _advance(
                np.ascontiguousarray(x[:, z], np.float32), np.ascontiguousarray(logits[:, z], np.float32),
                np.ascontiguousarray(mask[:, z]) if len(mask) else mask, self._half, self.threshold, b.x, b.q, b.bad, b.n_bad,
                b.state, b.keep, self._window, self._longest, self._pending, self._order, self._contested, self._out,
            )  # fmt: skip
            found.append(self._records(n))
        self._next = first_sample + x.shape[1]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, SPIKE), *found])

    def _records(self, n: int) -> np.ndarray:
        spikes = np.zeros(n, SPIKE)
        got = self._out[:n]
        spikes["sample"], spikes["channel"], spikes["unit"] = got["sample"], got["unit"], -1
        spikes["amplitude_uv"], spikes["score"] = got["amplitude_uv"], 1 / (1 + np.exp(-got["logit"]))
        return spikes

    def flush(self) -> np.ndarray:
        """Decide all candidates there are, as at the end of the stream; SPIKE records."""
        state = self._buffer.state
        end = np.iinfo(np.int64).max // 2
        self._contested[:] = False
        _, n, _ = resolve(
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
        late, self._late = self._late, []
        return np.concatenate([np.zeros(0, SPIKE), *late, self._records(int(n))])

    def reset(self, first_sample: int) -> None:
        """Forget the past; what was decided by it comes with the next call. The next sample is `first_sample`."""
        if self._next is not None:
            self._late.append(self.flush())
        self._buffer.start(first_sample)
        self._next = first_sample
