"""Wave families beside the cable of cells.py: drawn lobes, and axons that carry a triphasic wave (numpy only).

No simulator stands behind these: they are there so that a network does not learn the habits of one. All shapes
and ranges are drawn from parameters; no recorded or published waveform enters.
"""

from __future__ import annotations

import numpy as np

LEAST_DISTANCE_UM = 8.0


def _lobe(t_ms: np.ndarray, at_ms: np.ndarray | float, before_ms: float, after_ms: float) -> np.ndarray:
    """A bell of height 1 at `at_ms` with different widths (SD) on its two sides."""
    late = t_ms - at_ms
    return np.exp(-0.5 * np.where(late < 0, late / before_ms, late / after_ms) ** 2)


def lobes(
    positions_um: np.ndarray, soma_um: np.ndarray, t_ms: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(channels, len(t_ms)): a trough between a small earlier and a later positive lobe, arbitrary unit.

    It decays, widens and is delayed with distance, faster in one direction than in the other; the later lobe is
    stronger on one side of the cell than on the other, as over its dendrites.
    """
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.4, 1.0)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    away = (positions_um - soma_um[:2]) @ turn.T * (1.0, squeeze)
    r = np.sqrt((away**2).sum(1) + max(soma_um[2], LEAST_DISTANCE_UM) ** 2)[:, None]
    side = away[:, :1] / r
    height = 1 / (1 + (r / rng.uniform(12, 60)) ** rng.uniform(1.2, 3.0))
    t = (t_ms[None] - r / 1000 / np.exp(rng.uniform(np.log(0.2), np.log(2.0)))) / (
        1 + r / 1000 * rng.uniform(0, 4)
    )
    stretch = np.exp(rng.uniform(np.log(0.6), np.log(1.8)))
    before, after = stretch * rng.uniform(0.04, 0.14), stretch * rng.uniform(0.06, 0.25)
    early = rng.choice([0.0, rng.uniform(0, 0.7)]) * (1 + rng.uniform(-1, 1) * side)
    late = rng.uniform(0.05, 0.7) * (1 + rng.uniform(-1, 1) * side)
    gap = stretch * rng.uniform(0.2, 0.8)
    wave = -_lobe(t, 0, before, after)
    wave += early * _lobe(t, -2.2 * before, stretch * rng.uniform(0.05, 0.25), before)
    wave += late * _lobe(t, after + gap, 0.5 * gap + 0.03, stretch * rng.uniform(0.2, 0.8))
    return np.asarray(height * wave)


def axon(
    positions_um: np.ndarray, soma_um: np.ndarray, t_ms: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(channels, len(t_ms)): a wandering fibre along which a current source, sink and source travel."""
    step = 15.0
    n = round(rng.uniform(100, 700) / step)
    heading = np.cumsum(rng.normal(0, 0.25, n)) + rng.uniform(0, 2 * np.pi)
    path = np.stack([np.cos(heading), np.sin(heading), rng.normal(0, 0.2, n)], 1).cumsum(0) * step + soma_um
    late = np.arange(n) * step / 1000 / rng.uniform(0.2, 1.5) - rng.uniform(0, 1)
    width = rng.uniform(0.05, 0.16)
    t = (t_ms[None] - late[:, None]) / width
    skew = 1 + rng.uniform(-0.4, 0.4) * np.tanh(t)
    current = -(1 - t**2) * np.exp(-0.5 * t**2) * skew * np.exp(-0.5 * (late[:, None] / 1.0) ** 2)
    apart = np.sqrt(((positions_um[:, None] - path[None, :, :2]) ** 2).sum(2)
                    + np.maximum(np.abs(path[:, 2]), LEAST_DISTANCE_UM) ** 2)  # fmt: skip
    return np.asarray((1 / apart) @ current)


FAMILIES = {"lobes": lobes, "axon": axon}
