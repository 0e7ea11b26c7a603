"""The streaming network with its input scale and its delay line: microvolts in, aligned logits out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from spiked_models.networks import DetectionNetwork
from spiked_models.sentinel import Sentinel
from spiked_models.streaming import StreamingNetwork

# mypy: disable-error-code="no-untyped-def"

IQR_OF_SD = 1.3489795  # interquartile range of a Gaussian of SD 1
GUARD_MS = 0.5  # detections this close to a blanked sample are not trusted
LONG_AGO = 1 << 40


def inference_scaling(network: DetectionNetwork, noise_uv: np.ndarray) -> float:
    """The factor that brings this array's noise to what the network was trained on.

    RT-Sort's rule (van der Molen et al. 2024) divides a constant by the median interquartile range of the
    first 50 ms; here the range comes from the robust noise estimate, which a burst or a flat line cannot spoil.
    """
    if network.inference_scaling_numerator is None:
        return 1.0
    good = noise_uv[np.isfinite(noise_uv) & (noise_uv > 0.6)]
    iqr = IQR_OF_SD * (float(np.median(good)) if len(good) else 10.0)
    return float(network.inference_scaling_numerator) / iqr


@dataclass
class Detected:
    """Samples whose logits are final: all arrays (channels, n), starting at `first_sample`.

    The arrays are views that the next call may overwrite.
    """

    first_sample: int
    x: np.ndarray
    valid: np.ndarray
    logits: np.ndarray
    all_valid: bool


@njit(nogil=True, cache=True)
def _delay(line, at, new, out):
    """out = what `new` pushes out of the line (channels, length), a ring that starts at column `at`; new start."""
    length, n = line.shape[1], new.shape[1]
    p = at
    for c in range(new.shape[0]):
        p = at
        for t in range(n):
            out[c, t] = line[c, p]
            line[c, p] = new[c, t]
            p = p + 1 if p + 1 < length else 0
    return p


@njit(nogil=True, cache=True)
def _trust(ring, at, valid, lookahead, guard, trusted):
    """Put `valid` (channels, n) into the ring at column `at`; trusted[c, t]: no invalid sample within `guard`.

    Column t of `trusted` is the sample `lookahead` before column t of `valid`. Returns whether all of it is trusted.
    """
    size, n = ring.shape[1], valid.shape[1]
    everything = True
    for c in range(valid.shape[0]):
        for t in range(n):
            ring[c, (at + t) % size] = valid[c, t]
        first = at - lookahead
        bad_until = first
        for p in range(first - guard, first + guard):
            if not ring[c, p % size]:
                bad_until = p + guard + 1
        for t in range(n):
            p = first + t + guard
            if not ring[c, p % size]:
                bad_until = p + guard + 1
            trusted[c, t] = first + t >= bad_until
            everything &= trusted[c, t]
    return everything


class Detector:
    """Runs the network on every electrode and delays samples and mask by its lookahead.

    `precision` and `threads` as for StreamingNetwork.
    """

    def __init__(
        self, network: DetectionNetwork, n_channels: int, fs_hz: float, device: str = "cpu",
        precision: str = "auto", threads: int = 1,
    ) -> None:  # fmt: skip
        self.network, self.device = network, device
        self.stream = StreamingNetwork(network, n_channels, device, precision, threads)
        self.lookahead = network.lookahead
        self.scale = network.input_scale
        self._guard = max(1, round(GUARD_MS * fs_hz / 1000))
        self._line = np.zeros((n_channels, self.lookahead), np.float32)
        self._areas: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._valid = np.ones((n_channels, 0), bool)  # a ring, current only while something is invalid
        self.reset()

    def set_scaling(self, factor: float) -> None:
        """Use this inference scaling from the next sample on."""
        self.scale = self.network.input_scale * factor

    def watch(self, sentinel: Sentinel | None) -> None:
        """Let a sentinel close the gate where nothing will be found, from the next sample on."""
        self.stream.watch(sentinel)

    def reset(self) -> None:
        """Forget the past: the next sample starts a new stream (the input scale stays)."""
        self.stream.reset()
        self._at, self._seen, self._clean_for = 0, 0, LONG_AGO
        self._start: int | None = None
        self._dirty = False
        self._valid[:] = True

    def process(self, first_sample: int, x: np.ndarray, valid: np.ndarray, all_valid: bool) -> Detected:
        """x (channels, n) microvolt float32 -> everything whose logit became final."""
        n = x.shape[1]
        logits = self.stream.process_array(x, self.scale)
        delayed, yes, trusted = self._area(n)
        self._at = _delay(self._line, self._at, x, delayed)
        silent = max(0, min(n, self.lookahead - self._seen))
        self._start = first_sample if self._start is None else self._start
        first = max(self._start, first_sample - self.lookahead)
        self._clean_for = min(LONG_AGO, self._clean_for + n) if all_valid else 0
        everything = self._clean_for > n + self.lookahead + 2 * self._guard
        if everything:
            if self._dirty:
                self._valid[:], self._dirty = True, False
            trusted = yes
        else:
            self._dirty = True
            everything = bool(_trust(self._ring(n), self._seen, valid, self.lookahead, self._guard, trusted))
        self._seen += n
        return Detected(first, delayed[:, silent:], trusted[:, silent:], logits, everything)

    def _ring(self, n: int) -> np.ndarray:
        """The validity ring, with room for n more samples."""
        need = n + self.lookahead + 2 * self._guard + 1
        if self._valid.shape[1] < need:
            old, size = self._valid, self._valid.shape[1]
            self._valid = np.ones((len(old), 2 * need), bool)
            for k in range(max(0, self._seen - size), self._seen):
                self._valid[:, k % (2 * need)] = old[:, k % size]
        return self._valid

    def _area(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._areas.get(n)
        if found is None:
            if len(self._areas) >= 8:
                del self._areas[next(iter(self._areas))]
            shape = len(self._line), n
            found = self._areas[n] = np.zeros(shape, np.float32), np.ones(shape, bool), np.zeros(shape, bool)
        return found
