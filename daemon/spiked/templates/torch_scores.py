"""Projections and scores on a GPU: the dense part of template matching, as two matrix products.

Filtered samples go to the device once, scores come back once per piece; matching and subtracting, which are a few hundred operations
per spike, stay on the CPU. The same lines run on any torch device.
"""

from __future__ import annotations

import numpy as np
import torch

from spiked.templates.library import Templates


class TorchScores:
    """Scores of all units on a torch device.

    `scores(y)` takes (channels, length - 1 + n) filtered samples and gives (units, n) float32: the scores whose filters
    begin at each of the first n samples. The array it gives is overwritten by the next call.
    """

    def __init__(self, t: Templates, device: str, most: int) -> None:
        self.templates, self.device = t, torch.device(device)
        pinned, c = self.device.type == "cuda", t.n_channels
        self._length = t.length
        self._basis = torch.from_numpy(t.basis.copy()).to(self.device)
        self._weight = torch.zeros(len(t), c * len(t.basis), device=self.device)
        self._there = torch.zeros(c, t.length - 1 + most, device=self.device)
        self._up = torch.zeros(c, t.length - 1 + most, pin_memory=pinned)
        self._down = torch.zeros(len(t), most, pin_memory=pinned)
        for u in range(len(t)):
            self.renew(u, t.weight)

    def renew(self, u: int, weight: np.ndarray) -> None:
        """Unit u's filter is now what weight (entries of all units, components) says."""
        t = self.templates
        mine = slice(t.ptr[u], t.ptr[u + 1])
        row = np.zeros((t.n_channels, weight.shape[1]), np.float32)
        row[t.channel[mine]] = weight[mine]
        self._weight[u] = torch.from_numpy(row.reshape(-1)).to(self.device)

    @torch.inference_mode()
    def scores(self, y: np.ndarray) -> np.ndarray:
        m = y.shape[1]
        n = m - self._length + 1
        self._up[:, :m].copy_(torch.from_numpy(y))
        there = self._there[:, :m]
        there.copy_(self._up[:, :m], non_blocking=True)
        projected = there.unfold(1, self._length, 1) @ self._basis.T  # (channels, n, components)
        found = self._weight @ projected.transpose(1, 2).reshape(-1, n)
        down = self._down[:, :n]
        down.copy_(found, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return down.numpy()
