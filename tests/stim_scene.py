"""Noise, spikes and stimulation artifacts that are known apart: what the tests of artifact removal look at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spiked.stream import StreamInfo

FS = 20000
N_CHANNELS = 16
FREE = 4  # channels far from the stimulating electrode


class Scene(NamedTuple):
    info: StreamInfo
    codes: np.ndarray
    clean: np.ndarray  # the same without artifacts
    stims: np.ndarray
    patterns: np.ndarray
    carries: np.ndarray


def info(
    dtype: str = "uint16", gain: float = 6.0, zero: float = 512.0, low: float = 0.0, high: float = 1023.0
) -> StreamInfo:
    n = N_CHANNELS
    positions = tuple((17.5 * (i % 4), 17.5 * (i // 4)) for i in range(n))
    return StreamInfo("s", FS, tuple(map(str, range(n))), positions, dtype, (gain,) * n, zero, low, high)


def artifact(rng: np.random.Generator, size: np.ndarray, tau: np.ndarray, n: int = 2000) -> np.ndarray:
    """(n, channels) codes: a biphasic pulse, clipping where it is large, two decays."""
    t = np.arange(n)[:, None]
    clip = np.where(size > 512, 8 + 12 * np.log(np.maximum(size / 512, 1)) * np.exp(0.1 * rng.normal()), 8)
    y = np.maximum(t - clip, 0)
    start = np.where(size > 512, 500, 0.35 * size)
    w = start * (0.6 * np.exp(-y / (tau * np.exp(0.03 * rng.normal()))) + 0.4 * np.exp(-y / (8 * tau)))
    w = np.where(t < clip, 1.3 * size, w)
    return np.where(t < 4, -size, w)


def scene(seed: int, seconds: float, stims: tuple[int, ...] | None = None) -> Scene:
    """Every 200 ms from 100 ms on a stimulus, the third doubled after 8 ms; 16 channels, of which 4 carry no artifact."""
    rng = np.random.default_rng(seed)
    n = round(seconds * FS)
    x = rng.normal(0, 1.2, (n, N_CHANNELS)) + 512 + rng.integers(-5, 6, N_CHANNELS)
    shape = -np.exp(-0.5 * ((np.arange(24) - 8) / 2.5) ** 2)
    for c in range(N_CHANNELS):
        for k in rng.integers(0, n - 24, round(8 * seconds)):
            x[k : k + 24, c] += 14 * shape
    if stims is None:
        every = list(range(2000, n - 2000, 4000))
        stims = tuple(sorted([*every, *(k + 160 for k in every[2:3])]))
    size = np.where(np.arange(N_CHANNELS) < N_CHANNELS - FREE, np.geomspace(4000, 60, N_CHANNELS), 0)
    tau = rng.uniform(12, 50, N_CHANNELS)
    y = x.copy()
    for k in stims:
        w = artifact(rng, size, tau)
        y[k : k + 2000] += w[: n - k]

    def codes(v: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(v), 0, 1023).astype(np.uint16)

    at = np.array(stims, np.int64)
    return Scene(info(), codes(y), codes(x), at, np.arange(len(at)) % 2 + 1, size > 0)
