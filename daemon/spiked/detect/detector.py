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
def _trust(line, at, guard, trusted):
    """trusted[c, t]: no invalid sample within `guard` of it.

    The line (channels, length) is a ring whose oldest column is `at`; trusted's first column is `guard` after that.
    Returns whether all of it is.
    """
    length = line.shape[1]
    everything = True
    for c in range(trusted.shape[0]):
        bad_until = 0
        for i in range(2 * guard):
            if not line[c, (at + i) % length]:
                bad_until = i + guard + 1
        for t in range(trusted.shape[1]):
            if not line[c, (at + t + 2 * guard) % length]:
                bad_until = t + 3 * guard + 1
            trusted[c, t] = t + guard >= bad_until
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
        self._history = np.ones((n_channels, 0), bool)
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
        self._history = np.ones((len(self._line), 0), bool)

    def process(self, first_sample: int, x: np.ndarray, valid: np.ndarray, all_valid: bool) -> Detected:
        """x (channels, n) microvolt float32 -> everything whose logit became final."""
        n = x.shape[1]
        logits = self.stream.process_array(x, self.scale)
        delayed, yes, trusted = self._area(n)
        self._at = _delay(self._line, self._at, x, delayed)
        silent = max(0, min(n, self.lookahead - self._seen))
        self._start = first_sample if self._start is None else self._start
        first = max(self._start, first_sample - self.lookahead)
        self._seen += n
        self._clean_for = min(LONG_AGO, self._clean_for + n) if all_valid else 0
        if self._clean_for > n + self.lookahead + 2 * self._guard:
            if self._history.shape[1]:
                self._history = self._history[:, :0]
            return Detected(first, delayed[:, silent:], yes[:, silent:], logits, True)
        all_trusted = self._untrusted(valid, trusted)
        return Detected(first, delayed[:, silent:], trusted[:, silent:], logits, all_trusted)

    def _area(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = self._areas.get(n)
        if found is None:
            if len(self._areas) >= 8:
                del self._areas[next(iter(self._areas))]
            shape = len(self._line), n
            found = self._areas[n] = np.zeros(shape, np.float32), np.ones(shape, bool), np.zeros(shape, bool)
        return found

    def _untrusted(self, valid: np.ndarray, trusted: np.ndarray) -> bool:
        """Fill `trusted` for the samples that come out now; rare, so it may allocate."""
        keep = self.lookahead + 2 * self._guard
        missing = keep - self._history.shape[1]
        if missing > 0:  # what is not on record was valid
            past = np.ones((len(valid), missing), bool)
            self._history = np.concatenate([past, self._history], axis=1)
        line = np.concatenate([self._history, valid], axis=1)
        # Column i of the line is i - keep samples from the chunk's start; the first one out is lookahead before it.
        at = keep - self.lookahead - self._guard
        everything = bool(_trust(line, at, self._guard, trusted))
        self._history = line[:, -keep:]
        return everything
