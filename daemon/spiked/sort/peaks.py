"""Unsorted spikes: detection peaks per electrode, each spike reported once, on its largest electrode."""

from __future__ import annotations

import math

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
    as_mask,
    bad_near,
)
from spiked.sort.conflicts import PENDING, UNDECIDED, resolve
from spiked.sort.geometry import distances
from spiked.sort.window import any_above, is_peak, trough
from spiked_client.protocol import SPIKE

# mypy: disable-error-code="no-untyped-def"

EXCLUDE_UM = 50.0
EXCLUDE_MS = 0.5
TROUGH_MS = 0.1
MAX_PENDING = 32768
MAX_OUT = 131072
NO_SPIKES = np.zeros(0, SPIKE)


@njit(nogil=True, cache=True)
def _advance(
    n_out, half, threshold, bx, bq, bad, n_bad, state, window, shadow, longest, pending, order, contested, out
):  # fmt: skip
    """Take up the peaks that the buffer holds and put after out[:n_out] what becomes final. Returns how many then."""
    last = state[FILL] - half
    while state[NEXT] - state[BASE] < last:
        begin = state[NEXT] - state[BASE]
        stop = min(last, begin + SLICE)
        for e in range(bx.shape[0]):
            if not any_above(bq, e, begin, stop, threshold):
                continue
            for t in range(begin, stop):
                if is_peak(bq, e, t, threshold):
                    if any_bad(n_bad, t, half, half) and bad_near(bad, n_bad, e, t, half, half):
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
            pending, state[N_PENDING], window, shadow, longest, state[NEXT], contested, out, n_out, order
        )
    return n_out


@njit(nogil=True, cache=True)
def _tell(found, n, spikes):
    """found[:n] (PENDING) as spikes[:n] (SPIKE)."""
    for i in range(n):
        spikes[i].sample = found[i].sample
        spikes[i].unit = -1
        spikes[i].channel = found[i].unit
        spikes[i].amplitude_uv = found[i].amplitude_uv
        spikes[i].score = 1 / (1 + math.exp(-found[i].logit))


class ElectrodePeaks:
    """Streaming multi-unit spikes: local peaks of the logits at or above `threshold_logit`.

    Of peaks within 50 um and 0.5 ms of each other the one with the largest deflection is kept. Same promises as
    RTSort: any cut of the stream gives the same spikes, and all before `decided_until` are final. In the records the
    unit is -1 and the score the detection probability. With `reuse` the records that `process` returns are overwritten
    by its next call.
    """

    def __init__(
        self, positions_um: np.ndarray, fs_hz: float, threshold_logit: float, reuse: bool = False
    ) -> None:
        self.threshold = float(threshold_logit)
        d = distances(positions_um)
        self._longest = max(1, round(EXCLUDE_MS * fs_hz / 1000))
        self._window = np.where(d <= EXCLUDE_UM, self._longest, -1).astype(np.int16)
        self._shadow = np.full_like(self._window, -1)
        self._half = max(1, round(TROUGH_MS * fs_hz / 1000))
        self._buffer = StreamBuffer(len(d), self._half)
        self._pending = np.zeros(MAX_PENDING, PENDING)
        self._order = np.zeros(MAX_PENDING, np.int64)
        self._contested = np.zeros(MAX_PENDING, np.bool_)
        self._out = np.zeros(MAX_OUT, PENDING)
        self._spikes = np.zeros(MAX_OUT, SPIKE)
        self._reuse = reuse
        self._next: int | None = None
        self._late: list[np.ndarray] = []
        b = self._buffer
        self._fixed = (
            self._half, self.threshold, b.x, b.q, b.bad, b.n_bad, b.state, self._window, self._shadow, self._longest, self._pending,
            self._order, self._contested, self._out,
        )  # fmt: skip
        # Compiled here, not when the first samples wait for it.
        _advance(0, *self._fixed)
        _tell(self._out, 0, self._spikes)

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
        n, mask, b = x.shape[1], as_mask(valid), self._buffer
        self._next = first_sample + n
        at = n_out = 0
        while at < n:
            at = b.take(x, logits, mask, at)
            n_out = _advance(n_out, *self._fixed)
            if n_out > MAX_OUT // 2:
                self._late.append(self._records(n_out).copy())
                n_out = 0
        found = self._records(n_out)
        if self._late:
            found = np.concatenate([*self._late, found])
            self._late = []
        return found

    def _records(self, n: int) -> np.ndarray:
        """The first n of what was put out, as SPIKE records."""
        if n == 0:
            return NO_SPIKES
        _tell(self._out, n, self._spikes)
        return self._spikes[:n] if self._reuse else self._spikes[:n].copy()

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
