"""Small recordings with known neurons, and analyzers of them with units split on purpose."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from offline_rig import FS, neurons, stream

SECONDS = 20.0


def recording(x: np.ndarray, positions: np.ndarray, fs: float = FS) -> Any:
    """SpikeInterface's recording of microvolt (samples, channels)."""
    import probeinterface
    import spikeinterface.core as si

    n = x.shape[1]
    out = si.NumpyRecording([np.rint(x / 0.5).astype(np.int16)], fs)
    out.set_channel_gains([0.5] * n)
    out.set_channel_offsets([0.0] * n)
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(positions, shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(n))
    return out.set_probe(probe)


def scene(
    n_units: int = 5, seconds: float = SECONDS, side: int = 4, seed: int = 0
) -> tuple[Any, np.ndarray, np.ndarray]:
    """(SpikeInterface recording, spike samples, true units)."""
    info = stream(side)
    x, samples, units = neurons(info, seconds, n_units, seed)
    return recording(x, info.positions), samples, units


def split(units: np.ndarray, unit: int, into: int) -> np.ndarray:
    """Every other spike of `unit` is `into`'s."""
    out = units.copy()
    mine = np.flatnonzero(units == unit)
    out[mine[::2]] = into
    return out


def analyzer(rec: Any, samples: np.ndarray, units: np.ndarray, folder: Path) -> Any:
    """As a job builds it."""
    from spiked.offline import analyze

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return analyze.build(rec, samples, units, folder, lambda _f, _t: None)
