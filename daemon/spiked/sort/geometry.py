"""Distances between electrodes and lists of who is near whom."""

from __future__ import annotations

import numpy as np


def distances(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """(len(a), len(b)) float32 micrometre between points (n, 2)."""
    b = a if b is None else b
    d = np.asarray(a, np.float64)[:, None, :] - np.asarray(b, np.float64)[None, :, :]
    return np.sqrt((d**2).sum(-1)).astype(np.float32)


def neighbour_lists(
    positions_um: np.ndarray, centres: np.ndarray, among: np.ndarray | None, radius_um: float
) -> tuple[np.ndarray, np.ndarray]:
    """CSR (ptr, electrodes): per centre the electrodes of `among` within the radius, nearest first, itself first."""
    among = np.arange(len(positions_um)) if among is None else np.asarray(among)
    ptr = np.zeros(len(centres) + 1, np.int64)
    lists = [np.zeros(0, np.int64)]
    for i, c in enumerate(centres):
        d = distances(positions_um[[c]], positions_um[among])[0]
        near = np.flatnonzero(d <= radius_um)
        near = near[np.lexsort((among[near], among[near] != c, d[near]))]
        lists.append(among[near].astype(np.int64))
        ptr[i + 1] = ptr[i] + len(near)
    return ptr, np.concatenate(lists)
