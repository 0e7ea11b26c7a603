"""Session folders for the offline tests: a small array with known neurons, as the recorder writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np

from spiked import config as configuration
from spiked.record import nwbfile
from spiked.stream import StreamInfo
from spiked_client.protocol import SPIKE

FS = 20_000.0
FIRST = 70_000
GAIN_UV = 2.0
ZERO = 512.0


def stream(side: int = 4, dtype: str = "uint16") -> StreamInfo:
    positions = tuple((20.0 * (i % side), 20.0 * (i // side)) for i in range(side * side))
    is_float = dtype == "float32"
    return StreamInfo(
        name="mea",
        fs_hz=FS,
        channel_ids=tuple(f"e{i}" for i in range(side * side)),
        positions_um=positions,
        dtype=dtype,
        gain_uv=(1.0 if is_float else GAIN_UV,) * side * side,
        zero_code=ZERO if dtype == "uint16" else 0.0,
        source="replay",
    )


def neurons(
    info: StreamInfo, seconds: float, n_units: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples (n, channels) microvolt float32, spike samples, spike units): spikes in white noise."""
    rng = np.random.default_rng(seed)
    n = round(seconds * FS)
    x = rng.normal(0, 5.0, (n, info.n_channels)).astype(np.float32)
    t = np.arange(-20, 40) / FS * 1000
    places = rng.permutation(info.n_channels)[:n_units]
    samples, units = [], []
    for u in range(n_units):
        width = rng.uniform(0.08, 0.16)
        wave = -np.exp(-((t / width) ** 2)) + rng.uniform(0.2, 0.5) * np.exp(
            -(((t - 4 * width) / (2 * width)) ** 2)
        )
        distance = np.hypot(*(info.positions - info.positions[places[u]] - rng.uniform(-4, 4, 2)).T)
        strength = rng.uniform(110, 200)
        template = (wave[:, None] * np.exp(-distance / 14.0) * strength).astype(np.float32)
        gaps = 60 + rng.exponential(FS / 12.0 - 60, round(30 * seconds))
        at = np.cumsum(gaps).astype(np.int64)
        at = at[(at > 100) & (at < n - 100)]
        for a in at:
            x[a - 20 : a + 40] += template * rng.normal(1, 0.05)
        samples.append(at)
        units.append(np.full(len(at), u))
    order = np.argsort(np.concatenate(samples), kind="stable")
    return x, np.concatenate(samples)[order], np.concatenate(units)[order]


def codes(info: StreamInfo, microvolt: np.ndarray) -> np.ndarray:
    """What the device would have stored."""
    x = microvolt / info.gains + info.zero_code
    return x.astype(np.float32) if info.dtype == "float32" else np.rint(x).astype(info.dtype)


def session(
    folder: Path,
    info: StreamInfo,
    data: np.ndarray,
    gaps: tuple[tuple[int, int, tuple[int, ...]], ...] = (),
) -> Path:
    """A session folder holding `data` (samples, channels) in device codes.

    `gaps` are (start, stop, channels) as indices into the data, no channels meaning all; they become zero.
    """
    folder.mkdir(parents=True)
    config = configuration.parse({"stream": [{"name": info.name, "source": "replay", "path": "x"}]})
    (folder / "session.toml").write_text(configuration.dump(config))
    path = folder / f"{info.name}.nwb"
    nwbfile.create(path, info, config, datetime(2026, 1, 2, tzinfo=UTC), folder.name, FIRST)
    data = data.copy()
    with h5py.File(path, "r+") as f:
        table = f[nwbfile.GAPS]
        for column in table.values():
            column.resize(len(gaps), 0)
        for k, (start, stop, channels) in enumerate(gaps):
            listed = np.zeros(info.n_channels, bool)
            listed[list(channels) or slice(None)] = True
            data[start:stop, listed] = 0
            table["start_sample"][k], table["stop_sample"][k] = start + FIRST, stop + FIRST
            table["start_time"][k], table["stop_time"][k] = start / FS, stop / FS
            table["n_channels"][k] = listed.sum()
            table["reason"][k] = b"partial" if channels else b"lost"
            table["channels"][k] = np.packbits(listed)
        f[nwbfile.DATA].resize(len(data), 0)
        f[nwbfile.DATA][:] = data
        f[nwbfile.POSITION][1] = len(data)
    return folder


def live(folder: Path, info: StreamInfo, samples: np.ndarray, units: np.ndarray) -> None:
    """The live sorter's spikes; `samples` are indices into the recording."""
    spikes = np.zeros(len(samples), SPIKE)
    spikes["sample"], spikes["unit"] = samples + FIRST, units
    spikes.tofile(folder / f"{info.name}.spikes.bin")
