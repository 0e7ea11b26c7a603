"""A small made-up array for the sorter's tests: spikes with latencies and amplitudes, and the logits a good network would give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FS = 20_000.0
STRINGENT, LOOSE = -0.97, -2.2
QUIET = -8.0


@dataclass(frozen=True)
class Scene:
    x: np.ndarray  # (channels, samples) float32 microvolt
    logits: np.ndarray
    positions: np.ndarray
    samples: np.ndarray  # true spikes
    units: np.ndarray


def grid(side: int, pitch: float = 17.5) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * pitch


def scene(
    seconds: float, n_units: int, seed: int = 0, side: int = 5, rate_hz: float = 8.0, noise_uv: float = 5.0
) -> Scene:
    """Units at random places; a logit is the deflection's size in noise SDs, less 4, at its own trough."""
    rng = np.random.default_rng(seed)
    pos = grid(side)
    n = round(seconds * FS)
    x = rng.normal(0, noise_uv, (len(pos), n)).astype(np.float32)
    logits = (QUIET + rng.normal(0, 1, x.shape)).astype(np.float32)
    shape = -np.exp(-0.5 * (np.arange(-12, 13) / 2.5) ** 2)
    spikes, labels = [], []
    for u in range(n_units):
        home = rng.uniform(0, pos.max(), 2)
        d = np.hypot(*(pos - home).T)
        amp = rng.uniform(60, 160) * np.exp(-d / rng.uniform(18, 30))
        lag = np.rint(d / rng.uniform(8, 30) * rng.choice([1, 1, -1])).astype(int).clip(-6, 6)
        t = np.cumsum(60 + rng.exponential(FS / rate_hz, round(seconds * rate_hz * 2) + 10)).astype(int)
        t = t[(t > 200) & (t < n - 200)]
        for s in t:
            size = amp * rng.normal(1, 0.07)
            for c in np.flatnonzero(size > 5):
                k = s + lag[c]
                x[c, k - 12 : k + 13] += size[c] * shape
                peak = min(size[c] / noise_uv - 4 + rng.normal(0, 0.5), 12.0)
                bump = peak - np.array([4.0, 1.5, 0.0, 1.5, 4.0]) - rng.uniform(0, 0.2, 5)
                logits[c, k - 2 : k + 3] = np.maximum(logits[c, k - 2 : k + 3], bump)
        spikes.append(t)
        labels.append(np.full(len(t), u))
    return Scene(x, logits, pos, np.concatenate(spikes), np.concatenate(labels))


def cuts(rng: np.random.Generator, n: int, ones: int = 3) -> list[int]:
    """Borders of a random cut of n samples: short, long and single-sample pieces."""
    out = [0]
    while out[-1] < n:
        step = int(rng.choice([1, 7, 20, 63, 64, 65, 200, 1000, 9000]))
        for _ in range(ones if step == 1 else 1):
            out.append(min(n, out[-1] + step))
    return sorted(set(out))
