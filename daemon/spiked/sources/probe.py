"""Probe files: where each channel's contact sits, from probeinterface's JSON format.

The format is that of Garcia et al. 2022 (doi:10.3389/fninf.2022.823056), read with their library, which is
imported only when a probe file is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spiked.errors import ConfigError

UM_PER = {"um": 1.0, "mm": 1e3, "m": 1e6}


class ProbeFile(NamedTuple):
    """The contacts of a probe file, in the file's order (all probes of a group one after the other)."""

    positions: np.ndarray  # (contacts, 2) float64, x and y in micrometre
    device_channel_indices: (
        np.ndarray
    )  # (contacts,) int64: the recorded channel; -1 where a contact is not wired
    ids: tuple[str, ...]  # contact ids, or "0", "1" ... where the file has none


def load_probe(path: Path | str) -> ProbeFile:
    """Contacts of a probeinterface JSON file. Raises ConfigError when it cannot be read or makes no sense."""
    path = Path(os.path.expanduser(path))
    try:
        import probeinterface
    except ImportError as e:
        raise ConfigError(f"{path} needs probeinterface; pip install 'spiked[daemon]'") from e
    try:
        probes = probeinterface.read_probeinterface(path).probes
        parts = [_contacts(probe) for probe in probes]
    except OSError as e:
        raise ConfigError(f"cannot read probe file {path}: {e.strerror or e}; check the probe setting") from e
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, OverflowError, RecursionError,
    ) as e:  # fmt: skip
        why = " ".join(f"{type(e).__name__} {e}".split())[:120]
        raise ConfigError(
            f"probe file {path} is not probeinterface JSON ({why}); write it again with probeinterface"
        ) from e
    if not parts:
        raise ConfigError(f"probe file {path} holds no probe; write it again with probeinterface")
    positions = np.concatenate([p[0] for p in parts])
    device = np.concatenate([p[1] for p in parts])
    ids = tuple(i for p in parts for i in p[2])
    wired = device[device >= 0]
    if len(np.unique(wired)) != len(wired):
        values, counts = np.unique(wired, return_counts=True)
        raise ConfigError(
            f"probe file {path}: device channel {values[counts > 1][0]} has several contacts; "
            "give each its own"
        )
    if not np.isfinite(positions).all():
        raise ConfigError(f"probe file {path}: a contact position is not a number; correct contact_positions")
    return ProbeFile(positions, device, ids)


def _contacts(probe: Any) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """One probe's positions in micrometre, device channels (-1: not wired) and contact ids."""
    xy = np.asarray(probe.contact_positions, np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"contact_positions of shape {xy.shape}, not (contacts, 2)")
    units = probe.si_units
    if units not in UM_PER:
        raise ValueError(f"si_units {units!r}, not um, mm or m")
    device, ids = probe.device_channel_indices, probe.contact_ids
    wired = np.full(len(xy), -1, np.int64) if device is None else np.asarray(device, np.int64)
    names = [str(i) for i in (range(len(xy)) if ids is None else ids)]
    if wired.shape != (len(xy),) or len(names) != len(xy):
        raise ValueError(f"{len(xy)} contacts with {wired.size} device channels and {len(names)} ids")
    return xy * UM_PER[units], wired, tuple(names)


def positions_for(path: Path | str, n_channels: int) -> tuple[tuple[float, float], ...]:
    """(x, y) in micrometre of channels 0 .. n_channels-1 of the stream.

    A contact belongs to the channel its device_channel_indices names; a file without any wiring is taken in
    contact order. Raises ConfigError when a channel has no contact.
    """
    probe = load_probe(path)
    n = len(probe.positions)
    if n < n_channels:
        raise ConfigError(
            f"probe file {path} has {n} contacts but the stream has {n_channels} channels; "
            "give the right probe file"
        )
    if (probe.device_channel_indices < 0).all():
        xy = probe.positions[:n_channels]
    else:
        at = {int(c): i for i, c in enumerate(probe.device_channel_indices) if c >= 0}
        bare = [c for c in range(n_channels) if c not in at]
        if bare:
            raise ConfigError(
                f"probe file {path} wires {n_channels - len(bare)} of the stream's {n_channels} channels "
                f"(channel {bare[0]} has no contact); correct its device_channel_indices"
            )
        xy = probe.positions[[at[c] for c in range(n_channels)]]
    return tuple((float(x), float(y)) for x, y in xy)


def placeholder_line(n_channels: int, pitch_um: float = 20.0) -> tuple[tuple[float, float], ...]:
    """Positions to carry when the geometry is unknown: a line. Use with StreamInfo(geometry_known=False)."""
    return tuple((0.0, pitch_um * c) for c in range(n_channels))
