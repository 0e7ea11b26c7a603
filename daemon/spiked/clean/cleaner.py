"""Device codes in, baseline-free microvolts and a validity mask out; any cut of the stream gives the same.

Order per sample: code -> microvolt, optional causal filter, trailing-median baseline, optional common median
reference. The baseline of the samples in one hop of an absolute grid is the median of the valid samples of the
10 ms before the hop (the window RT-Sort's networks were trained with; the published online code takes the
median of each chunk instead, which makes the result depend on the chunk length). Samples of gaps, clipped
samples and those just after clipping are invalid: they read 0 uV and take no part in the baseline.
"""

from __future__ import annotations

import numba
import numpy as np

from spiked.clean.noise import lower_median
from spiked.stream import StreamInfo

WINDOW_MS = 10.0
HOP_MS = 2.0
CLIP_HOLD_MS = 0.2


@numba.njit(cache=True, nogil=True)
def _filter_in_place(
    x: np.ndarray, valid: np.ndarray, sos: np.ndarray, state: np.ndarray, last: np.ndarray
) -> None:
    """Biquads (direct form II transposed) along each row; invalid samples hold the last valid input."""
    for c in range(x.shape[0]):
        for t in range(x.shape[1]):
            if valid[c, t]:
                last[c] = x[c, t]
            v = last[c]
            for s in range(sos.shape[0]):
                b0, b1, b2, a1, a2 = sos[s, 0], sos[s, 1], sos[s, 2], sos[s, 4], sos[s, 5]
                y = b0 * v + state[c, s, 0]
                state[c, s, 0] = b1 * v - a1 * y + state[c, s, 1]
                state[c, s, 1] = b2 * v - a2 * y
                v = y
            x[c, t] = v


@numba.njit(cache=True, nogil=True)
def _to_microvolt(codes, gain, zero, low, high, hold, hold_samples, dead, x, valid):  # type: ignore[no-untyped-def]
    """Codes (n, C) to x (C, n) with the clip mask; returns how many samples are invalid."""
    bad = 0
    n, channels = codes.shape
    for t in range(n):
        for c in range(channels):
            code = codes[t, c]
            if not dead[t, c] and (code <= low or code >= high or not np.isfinite(code)):
                hold[c] = hold_samples + 1
            ok = hold[c] == 0 and not dead[t, c]
            if hold[c] > 0:
                hold[c] -= 1
            valid[c, t] = ok
            if ok:
                x[c, t] = (code - zero) * gain[c]
            else:
                x[c, t] = 0.0
                bad += 1
    return bad


@numba.njit(cache=True, nogil=True)
def _remove_baseline(x, valid, first, hop, past, past_valid, baseline, ready, scratch):  # type: ignore[no-untyped-def]
    """Subtract the hop's baseline in place; the past (C, window) is indexed by sample number modulo window."""
    channels, n = x.shape
    window = past.shape[1]
    for c in range(channels):
        slot, phase = first % window, first % hop
        base = baseline[c]
        for t in range(n):
            if phase == 0:
                k = 0
                for i in range(window):
                    if past_valid[c, i]:
                        scratch[k] = past[c, i]
                        k += 1
                if k * 2 >= window or (k * 4 >= window and ready[c]):
                    base = lower_median(scratch, k)
                    ready[c] = True
            past[c, slot] = x[c, t]
            past_valid[c, slot] = valid[c, t]
            if valid[c, t] and ready[c]:
                x[c, t] -= base
            else:
                x[c, t] = 0.0
                valid[c, t] = False
            slot = slot + 1 if slot + 1 < window else 0
            phase = phase + 1 if phase + 1 < hop else 0
        baseline[c] = base


def _highpass(hz: float, fs_hz: float) -> np.ndarray:
    """Causal first-order Butterworth high-pass as second-order sections."""
    from scipy import signal  # slow to import, and most streams have no filter

    return np.asarray(signal.butter(1, hz, "high", fs=fs_hz, output="sos"))


class Cleaner:
    """Streaming cleaning of one stream. `process` keeps all state; `reset` forgets it."""

    def __init__(self, info: StreamInfo, highpass_hz: float = 0.0, reference: str = "none") -> None:
        self.info, self.reference = info, reference
        c = info.n_channels
        self.window, self.hop = info.samples(WINDOW_MS), max(1, info.samples(HOP_MS))
        self._hold_samples = info.samples(CLIP_HOLD_MS)
        self._gain = info.gains
        low = -np.inf if info.code_min is None else float(info.code_min)
        high = np.inf if info.code_max is None else float(info.code_max)
        self._rails = (low, high)
        self.sos = _highpass(highpass_hz, info.fs_hz) if highpass_hz else None
        self._hold = np.zeros(c, np.int64)
        self._past = np.zeros((c, self.window), np.float32)
        self._past_valid = np.zeros((c, self.window), bool)
        self._baseline = np.zeros(c, np.float32)
        self._ready = np.zeros(c, bool)
        self._scratch = np.zeros(self.window, np.float32)
        self._last = np.zeros(c, np.float32)
        self._state = np.zeros((c, 0 if self.sos is None else len(self.sos), 2), np.float64)
        self._dead = np.zeros((0, c), bool)

    def process(
        self, first_sample: int, data: np.ndarray, dead: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(n, C) codes -> microvolts (C, n) float32, valid (C, n) bool, and whether all of it is valid.

        `dead` (n, C) bool marks samples that never arrived.
        """
        n, c = data.shape
        x, valid = np.empty((c, n), np.float32), np.empty((c, n), bool)
        if dead is None:
            if len(self._dead) < n:
                self._dead = np.zeros((n, c), bool)
            dead = self._dead[:n]
        _to_microvolt(
            data,
            self._gain,
            np.float32(self.info.zero_code),
            *self._rails,
            self._hold,
            self._hold_samples,
            dead,
            x,
            valid,
        )
        if self.sos is not None:
            _filter_in_place(x, valid, self.sos, self._state, self._last)
        _remove_baseline(
            x,
            valid,
            first_sample,
            self.hop,
            self._past,
            self._past_valid,
            self._baseline,
            self._ready,
            self._scratch,
        )
        all_valid = bool(valid.all())
        if self.reference == "median":
            x -= np.median(x, axis=0, keepdims=True)
            if not all_valid:
                x[~valid] = 0.0
        return x, valid, all_valid

    def reset(self) -> None:
        """Forget the past: the next samples are a new stream."""
        self._hold[:] = 0
        self._past_valid[:] = False
        self._ready[:] = False
        self._state[:] = 0.0
