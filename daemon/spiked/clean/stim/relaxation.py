"""What an amplifier does after a pulse, as a sum of decaying exponentials, and how such a sum is fitted to few samples.

The time constants are fixed (log-spaced); the amplitudes are fitted with a Gaussian prior around the template's, whose width
is one of a few multiples of the noise, so that every fit is one matrix made beforehand. A sum of slow decays cannot follow a
spike a few milliseconds after the pulse, so a template of them cannot learn spikes that are locked to the stimulus.
"""

from __future__ import annotations

import numpy as np

TAUS_MS = (0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 25.0)
WIDTHS = tuple(
    3.0**k for k in range(6)
)  # of the prior, in noise SDs: wider ones let slow decays cancel each other


def decays(fs_hz: float) -> np.ndarray:
    """(K,) float32: what is left of each component one sample later."""
    return np.exp(-1000.0 / (fs_hz * np.array(TAUS_MS))).astype(np.float32)


def curves(fs_hz: float, n: int) -> np.ndarray:
    """(K, n) float32: every component from its start, 1 at sample 0."""
    t_ms = np.arange(n) * 1000.0 / fs_hz
    return np.exp(-t_ms[None] / np.array(TAUS_MS)[:, None]).astype(np.float32)


def gains(fs_hz: float, n: int) -> np.ndarray:
    """(widths, K, n) float32: amplitudes = gains[w] @ samples (n,), for every width of the prior."""
    e = curves(fs_hz, n).astype(np.float64)
    out = [np.linalg.solve(e @ e.T + np.eye(len(e)) / w**2, e) for w in WIDTHS]
    return np.array(out, np.float32)


def cubic(half: int) -> tuple[float, float]:
    """(a, b): the least-squares cubic over samples -half to half has the centre value a * W0 - b * W2.

    W0 and W2 are the sums of the samples and of samples times n squared (Wagenaar and Potter 2002).
    """
    n = np.arange(-half, half + 1, dtype=np.float64)
    t0, t2, t4 = len(n), (n**2).sum(), (n**4).sum()
    det = t0 * t4 - t2 * t2
    return float(t4 / det), float(t2 / det)


def edge(half: int) -> np.ndarray:
    """(2,): the least-squares line through samples -half to half is e0 W0 + e1 W1 one sample later."""
    n = np.arange(-half, half + 1, dtype=np.float64)
    return np.array([1 / len(n), (half + 1) / (n**2).sum()])


def teaching(fs_hz: float, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples after the end of clipping teach a template (n,) int64, dense at first, and (n, K) what they teach."""
    at = np.unique(
        np.concatenate([np.arange(first, min(first + 24, last)), np.geomspace(first + 24, last, 36)]).astype(
            np.int64
        )
    )
    e = np.exp(-at[None] * 1000.0 / fs_hz / np.array(TAUS_MS)[:, None])
    weights = np.gradient(at.astype(float)) ** 0.5  # each for the samples it stands for, the early ones more
    gain = np.linalg.solve((e * weights) @ e.T + 1e-5 * np.eye(len(e)), e * weights).T
    return at, gain.astype(np.float32)


def projections(lengths: int, order: int = 3) -> np.ndarray:
    """(order + 1, lengths) float32: orthonormal polynomials over `lengths` samples; fit = p.T @ (p @ samples)."""
    n = np.linspace(-1, 1, lengths)
    q, _ = np.linalg.qr(np.vander(n, order + 1, increasing=True))
    return np.ascontiguousarray(q.T, np.float32)
