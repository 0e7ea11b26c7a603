"""Device codes in, baseline-free microvolts and a validity mask out; any cut of the stream gives the same.

Order per sample: code -> microvolt, optional causal filter, trailing-median baseline, optional common median
reference. The baseline of the samples in one hop of an absolute grid is the median of the valid samples of the
10 ms before the hop (the window RT-Sort's networks were trained with; the published online code takes the
median of each chunk instead, which makes the result depend on the chunk length). Samples of gaps, clipped
samples and those just after clipping are invalid: they read 0 uV and take no part in the baseline.
"""

from __future__ import annotations

import numpy as np

from spiked.clean.kernels import any_at_rail, clean, clean_doubted, reference_to_median
from spiked.clean.medians import FEW
from spiked.errors import ConfigError
from spiked.stream import StreamInfo

WINDOW_MS = 10.0
HOP_MS = 2.0
CLIP_HOLD_MS = 0.2


def _highpass(hz: float, fs_hz: float) -> np.ndarray:
    """Causal first-order Butterworth high-pass as second-order sections."""
    if not 0 < hz < fs_hz / 2:
        raise ConfigError(
            f"highpass_hz = {hz:g} must be above 0 and below half the rate, {fs_hz / 2:g} Hz; 0 is no filter"
        )
    from scipy import signal  # slow to import, and most streams have no filter

    return np.asarray(signal.butter(1, hz, "high", fs=fs_hz, output="sos"))


def _rails(info: StreamInfo) -> np.ndarray:
    """Lowest and highest code that say nothing, in a type that compares at once with the stream's own."""
    low = -np.inf if info.code_min is None else float(info.code_min)
    high = np.inf if info.code_max is None else float(info.code_max)
    if info.dtype == "float32":
        return np.array([low, high])
    widest = np.iinfo(np.int32)
    return np.array([max(np.floor(low), widest.min), min(np.ceil(high), widest.max)]).astype(np.int32)


class Cleaner:
    """Streaming cleaning of one stream. `process` keeps all state; `reset` forgets it."""

    def __init__(self, info: StreamInfo, highpass_hz: float = 0.0, reference: str = "none") -> None:
        self.info, self.reference = info, reference
        c = info.n_channels
        self.window, self.hop = info.samples(WINDOW_MS), max(1, info.samples(HOP_MS))
        self._hold_samples = info.samples(CLIP_HOLD_MS)
        self._gain, self._zero = info.gains, np.array([info.zero_code], np.float32)
        self._rails = _rails(info)
        self.sos = _highpass(highpass_hz, info.fs_hz) if highpass_hz else np.zeros((0, 6))
        self._hold = np.zeros(c, np.int64)
        self._holding = False
        self._past = np.full((c, self.window), np.inf, np.float32)  # infinite where unknown
        self._known = np.zeros(c, np.int64)
        self._baseline = np.zeros(c, np.float32)
        self._ready = np.zeros(c, bool)
        self._last = np.zeros(c, np.float32)
        self._state = np.zeros((c, len(self.sos), 2), np.float64)
        self._scratch = np.zeros(max(self.window + FEW, c), np.float32)
        self._row = np.zeros(0)
        self._none_dead = np.zeros((0, 0), bool)
        self._store = np.zeros(0, np.float32), np.zeros(0, bool)
        self._out = np.zeros((c, 0), np.float32), np.zeros((c, 0), bool)

    def process(
        self, first_sample: int, data: np.ndarray, dead: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """(n, C) codes -> microvolts (C, n) float32, valid (C, n) bool, and whether all of it is valid.

        `dead` (n, C) bool marks samples that never arrived. The arrays are overwritten by the next call.
        """
        x, valid = self._out if self._out[0].shape[1] == len(data) else self._room(len(data))
        common = (
            data, first_sample, self._gain, self._zero, self.sos, self._state, self.hop, self._past, self._known,
            self._baseline, self._ready, self._last, self._scratch, self._row, x, valid,
        )  # fmt: skip
        if dead is None and not self._holding and not any_at_rail(data, self._rails):
            bad = clean(*common)
        else:
            none = self._none_dead if dead is None else dead
            bad, holding = clean_doubted(*common, none, self._rails, self._hold, self._hold_samples)
            self._holding = holding > 0
        if self.reference == "median":
            reference_to_median(x, valid, self._scratch)
        return x, valid, bad == 0

    def _room(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Where n samples of every channel are put."""
        c = self.info.n_channels
        if len(self._row) < n:
            self._row = np.zeros(n)
            self._store = np.zeros(c * n, np.float32), np.zeros(c * n, bool)
        x, valid = self._store
        self._out = x[: c * n].reshape(c, n), valid[: c * n].reshape(c, n)
        return self._out

    def reset(self) -> None:
        """Forget the past: the next samples are a new stream."""
        self._hold[:] = 0
        self._holding = False
        self._past[:] = np.inf
        self._known[:] = 0
        self._ready[:] = False
        self._state[:] = 0.0
