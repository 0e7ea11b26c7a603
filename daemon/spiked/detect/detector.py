"""The streaming network with its input scale and its delay line: microvolts in, aligned logits out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spiked_models.networks import DetectionNetwork
from spiked_models.streaming import StreamingNetwork

IQR_OF_SD = 1.3489795  # interquartile range of a Gaussian of SD 1
GUARD_MS = 0.5  # detections this close to a blanked sample are not trusted


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


@dataclass(frozen=True)
class Detected:
    """Samples whose logits are final: all arrays (channels, n), starting at `first_sample`."""

    first_sample: int
    x: np.ndarray
    valid: np.ndarray
    logits: np.ndarray
    all_valid: bool


class Detector:
    """Runs the network on every electrode and delays samples and mask by its lookahead."""

    def __init__(self, network: DetectionNetwork, n_channels: int, fs_hz: float, device: str = "cpu") -> None:
        self.network, self.device = network, device
        self._stream = StreamingNetwork(network, n_channels, device)
        self.lookahead = network.lookahead
        self.scale = network.input_scale
        self._guard = max(1, round(GUARD_MS * fs_hz / 1000))
        self._x = np.zeros((n_channels, 0), np.float32)
        self._valid = np.zeros((n_channels, 0), bool)
        self._next = 0
        self._tail = np.zeros((n_channels, 0), bool)
        self._clean_for = 1 << 40

    def set_scaling(self, factor: float) -> None:
        """Use this inference scaling from the next sample on."""
        self.scale = self.network.input_scale * factor

    def reset(self) -> None:
        """Forget the past: the next sample starts a new stream (the input scale stays)."""
        self._stream.reset()
        self._x, self._valid, self._tail = self._x[:, :0], self._valid[:, :0], self._tail[:, :0]

    def process(self, first_sample: int, x: np.ndarray, valid: np.ndarray, all_valid: bool) -> Detected:
        """x (channels, n) microvolt -> everything whose logit became final."""
        if self._x.shape[1] == 0:
            self._next = first_sample
        with torch.inference_mode():
            scaled = torch.from_numpy(x).to(self.device) * self.scale
            logits = self._stream.process(scaled).cpu().numpy()
        x = np.concatenate([self._x, x], axis=1) if self._x.shape[1] else x
        valid = np.concatenate([self._valid, valid], axis=1) if self._valid.shape[1] else valid
        n = logits.shape[1]
        self._clean_for = self._clean_for + valid.shape[1] - self._valid.shape[1] if all_valid else 0
        first, trusted = self._next, self._trusted(valid, n)
        out = Detected(first, x[:, :n], trusted, logits, bool(trusted.all()) if trusted.size else True)
        keep = max(0, n - self._guard)
        self._tail = np.concatenate([self._tail, valid[:, keep:n]], axis=1)[:, -self._guard :]
        self._x, self._valid, self._next = x[:, n:], valid[:, n:], first + n
        return out

    def _trusted(self, valid: np.ndarray, n: int) -> np.ndarray:
        """The first n columns, with every invalid sample widened by the guard on both sides."""
        before = self._tail.shape[1]
        if self._clean_for > self._guard * 2 + valid.shape[1]:
            return valid[:, :n]
        bad = ~np.concatenate([self._tail, valid], axis=1)
        count = np.cumsum(np.pad(bad, ((0, 0), (self._guard + 1, self._guard))), axis=1, dtype=np.int32)
        width = 2 * self._guard + 1
        near = count[:, width:] - count[:, :-width]
        return near[:, before : before + n] == 0
