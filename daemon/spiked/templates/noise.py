"""The background as template matching sees it: a high-pass, whitening in time, and the noise's precision across electrodes.

Measured on calibration samples where no electrode is in a spike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked.sort.geometry import distances
from spiked.templates.kernels import whiten, whole_vectors

HIGHPASS_HZ, ORDER = 300.0, 2
TAPS = 8  # of the whitening in time, besides the first
NEIGHBOURS = 32  # electrodes that whiten each other
QUIET_SD = 4.0  # noise is measured where nothing exceeds this
NOISE_S = 60.0
SAMPLES = 50_000  # quiet ones, for the covariance of an electrode and its neighbours


@dataclass(frozen=True)
class Noise:
    """What is known of the background: the filters and, after them, the noise's precision across electrodes."""

    sos: np.ndarray
    taps: np.ndarray
    precision: np.ndarray
    sd: np.ndarray  # (channels,) after the filters


def highpass_sections(fs_hz: float) -> np.ndarray:
    """Causal Butterworth high-pass as second-order sections, (sections, 6)."""
    from scipy import signal

    return np.asarray(signal.butter(ORDER, HIGHPASS_HZ, "high", fs=fs_hz, output="sos"))


def filtered(x: np.ndarray, sos: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """x (channels, n) any float type -> (channels, n) float32 after the live path's own filters."""
    out = np.zeros(x.shape, np.float32)
    taps = whole_vectors(np.asarray(taps)[None, ::-1], front=True)[0]
    lead, piece = len(taps) - 1, 1 << 16
    for c in range(len(x)):
        state = np.zeros((1, len(sos), 2))
        room = np.zeros((2, 1, lead + piece), np.float32)
        for a in range(0, x.shape[1], piece):
            part = np.ascontiguousarray(x[c : c + 1, a : a + piece], np.float32)
            n = part.shape[1]
            whiten(part, sos, state, taps, room, lead)
            out[c, a : a + n] = room[1, 0, lead : lead + n]
            room[:, :, :lead] = room[:, :, n : n + lead].copy()
    return out


def _loud(x: np.ndarray, fs_hz: float) -> np.ndarray:
    """(channels, n) bool: where an electrode is in a spike, or just before or after one."""
    from scipy.ndimage import maximum_filter1d

    reach, out = 2 * round(0.0007 * fs_hz) + 1, np.zeros(x.shape, np.uint8)
    for c, row in enumerate(x):
        level = QUIET_SD * max(float(np.median(np.abs(row[::7]))) / 0.6745, 1e-6)
        out[c] = maximum_filter1d((np.abs(row) > level).view(np.uint8), reach)
    return out.view(bool)


def _precision(x: np.ndarray, positions_um: np.ndarray, fs_hz: float) -> np.ndarray:
    """(channels, channels): whitening with each electrode's neighbours (as Kilosort does), applied twice."""
    rng, apart, loud = np.random.default_rng(0), distances(positions_um), _loud(x, fs_hz)
    zca = np.zeros((len(x), len(x)))
    for c in range(len(x)):
        near = np.argsort(apart[c], kind="stable")[:NEIGHBOURS]
        quiet = np.flatnonzero(~loud[near].any(0))
        if len(quiet) < 20 * len(near):  # a busy place: its noise cannot be told from its spikes
            quiet = np.arange(x.shape[1])
        at = np.sort(rng.choice(quiet, min(len(quiet), SAMPLES), replace=False))
        cov = np.cov(x[near][:, at]).reshape(len(near), len(near))
        values, vectors = np.linalg.eigh(cov)
        floor = 1e-3 * max(values.max(), 1e-6)
        zca[c, near] = ((vectors / np.sqrt(np.maximum(values, 0) + floor)) @ vectors.T)[0]
    return zca.T @ zca


def measure_noise(x: np.ndarray, positions_um: np.ndarray, fs_hz: float) -> Noise:
    """From cleaned samples (channels, n), any float type; at most the first minute of them is looked at, of large arrays less."""
    from scipy.linalg import solve_toeplitz

    x = x[:, : round(NOISE_S * fs_hz * min(1.0, 128 / len(x)))]
    sos = highpass_sections(fs_hz)
    high = filtered(x, sos, np.ones(1, np.float32))
    sd = np.maximum(np.median(np.abs(high[:, ::7]), 1) / 0.6745, 1e-3)
    y = np.clip(high / sd[:, None], -QUIET_SD, QUIET_SD)
    n = y.shape[1]
    r = np.array([np.mean(y[:, TAPS:n] * y[:, TAPS - k : n - k]) for k in range(TAPS + 1)], np.float64)
    ahead = solve_toeplitz(r[:TAPS] + np.eye(1, TAPS)[0] * 1e-3 * r[0], r[1:])
    taps = np.concatenate([[1.0], -ahead])
    taps = (taps / np.sqrt(max(r @ taps, 1e-6) / r[0])).astype(np.float32)
    white = filtered(x, sos, taps)
    return Noise(
        sos, taps, _precision(white, positions_um, fs_hz), np.median(np.abs(white[:, ::7]), 1) / 0.6745
    )  # fmt: skip
