"""Units of recordings that were sorted as one, split back: per recording its spike trains, times from 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spiked.offline.foreign import Epoch
from spiked.offline.manifest import write_json


def split(folder: Path, epochs: tuple[Epoch, ...], fs_hz: float) -> list[dict[str, Any]]:
    """Write `folder`/epochs/NN_NAME.npz for each epoch from `folder`/units.npz, and epochs.json over all.

    Each file holds `samples` (spikes,) int64 counted from the epoch's first sample, `times_s` (spikes,), `units`
    (spikes,) with the ids of the whole, `unit_ids` (units,) of the whole, also those silent here, and `fs_hz`.
    Returns the rows of epochs.json: name, path, start and stop (samples of the whole), seconds, spikes, file,
    rate_hz {unit: spikes per second}.
    """
    with np.load(folder / "units.npz") as z:
        samples, units = z["samples"], z["units"]
    ids = np.unique(units)
    target = folder / "epochs"
    target.mkdir(exist_ok=True)
    rows = []
    for k, e in enumerate(epochs):
        here = (samples >= e.start) & (samples < e.stop)
        file = target / f"{k:02d}_{e.name}.npz"
        at, who = samples[here] - e.start, units[here]
        np.savez(file, samples=at, times_s=at / fs_hz, units=who, unit_ids=ids, fs_hz=fs_hz)
        seconds = (e.stop - e.start) / fs_hz
        rows.append(
            {
                "name": e.name, "path": str(e.path), "start": e.start, "stop": e.stop, "seconds": seconds,
                "spikes": len(at), "file": str(file.relative_to(folder)),
                "rate_hz": {str(u): round(float((who == u).sum()) / seconds, 4) for u in ids.tolist()},
            }
        )  # fmt: skip
    write_json(folder / "epochs.json", rows)
    return rows
