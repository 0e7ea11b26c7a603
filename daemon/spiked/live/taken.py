"""What passed through a pipeline, kept whole for finding units in it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

UNSEEN = -60000.0  # logit where nothing could be seen


class Taken:
    """The first `n` samples, cleaned, and their logits, (channels, n) float16, as a pipeline hands them to its tap.

    In memory, or in files under `folder` that `close` removes.
    """

    def __init__(self, n_channels: int, n: int, folder: Path | None = None) -> None:
        shape = n_channels, n
        self._files: list[Path] = []
        if folder is None:
            self.x, self.logits = np.zeros(shape, np.float16), np.full(shape, UNSEEN, np.float16)
        else:
            self._files = [folder / "calibration.x.npy", folder / "calibration.logits.npy"]
            self.x, self.logits = (np.lib.format.open_memmap(f, "w+", np.float16, shape) for f in self._files)
        self.filled, self.first = 0, 0

    def add(self, found: Any) -> None:
        """One stretch (Detected); what is over `n` is left out."""
        n = min(found.x.shape[1], self.x.shape[1] - self.filled)
        if n <= 0:
            return
        if self.filled == 0:
            self.first = found.first_sample
        at = slice(self.filled, self.filled + n)
        self.x[:, at] = found.x[:, :n]
        self.logits[:, at] = np.where(found.valid[:, :n], found.logits[:, :n], UNSEEN)
        self.filled += n

    def close(self) -> None:
        del self.x, self.logits
        for file in self._files:
            file.unlink(missing_ok=True)
