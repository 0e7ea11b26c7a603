"""NWB files: what pynwb writes, what the session recorder writes, scale, positions, gaps, clear errors."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pynwb
import pytest
from pynwb.ecephys import ElectricalSeries

from spiked.errors import ConfigError, RecordingError
from spiked.sources.recordings import open_recording
from spiked.stream import EventKind, StreamInfo

N, N_CHANNELS = 4000, 4
XY = np.stack([np.arange(N_CHANNELS) * 17.5, np.arange(N_CHANNELS) * 3.0], 1)


def codes(dtype: str) -> np.ndarray:
    return ((np.arange(N)[:, None] * 3 + np.arange(N_CHANNELS) * 101) % 1001 + 12).astype(dtype)


def write(
    path: Path,
    names: tuple[str, ...] = ("ElectricalSeries",),
    positions: bool = True,
    dtype: str = "int16",
    **series: Any,
) -> Path:
    nwb = pynwb.NWBFile("test", "id", datetime(2026, 1, 1, tzinfo=UTC))
    device = nwb.create_device("d")
    group = nwb.create_electrode_group("g", "d", "unknown", device)
    nwb.add_electrode_column("channel_name", "name")
    for c in range(N_CHANNELS):
        where = {"rel_x": XY[c, 0], "rel_y": XY[c, 1]} if positions else {}
        nwb.add_electrode(group=group, location="unknown", channel_name=f"AP{c}", **where)
    region = nwb.create_electrode_table_region(list(range(N_CHANNELS))[::-1], "reversed")
    if "timestamps" not in series:
        series["rate"] = 30000.0
    for name in names:
        nwb.add_acquisition(ElectricalSeries(name=name, data=codes(dtype), electrodes=region, **series))
    with pynwb.NWBHDF5IO(path, "w") as io:
        io.write(nwb)
    return path


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_codes_scale_and_electrode_order(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "a.nwb", dtype=dtype, conversion=2e-6, offset=-512 * 2e-6)
    with open_recording(path) as rec:
        assert (
            rec.info.dtype == dtype
            and rec.info.zero_code == 512
            and rec.info.gain_uv == pytest.approx((2.0,) * 4)
        )
        assert rec.info.channel_ids == ("AP3", "AP2", "AP1", "AP0")  # the series' region is reversed
        assert np.allclose(rec.info.positions_um, XY[::-1]) and rec.info.geometry_known
        assert np.array_equal(rec.read(100, 3000), codes(dtype)[100:3000])
        assert rec.info.fs_hz == 30000


def test_channel_conversion_multiplies(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nwb", conversion=1e-6, channel_conversion=[1.0, 2.0, 3.0, 4.0])
    with open_recording(path) as rec:
        assert rec.info.gain_uv == pytest.approx((1, 2, 3, 4)) and rec.info.zero_code == 0


def test_zero_that_differs_between_channels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nwb", conversion=1e-6, channel_conversion=[1.0, 2.0, 3.0, 4.0], offset=-1e-4)
    with pytest.raises(RecordingError, match="zero code"):
        open_recording(path)


def test_without_positions_the_geometry_is_unknown(tmp_path: Path) -> None:
    with open_recording(write(tmp_path / "a.nwb", positions=False)) as rec:
        assert not rec.info.geometry_known and rec.info.n_channels == N_CHANNELS


def test_timestamps_give_rate_and_gaps(tmp_path: Path) -> None:
    times = np.arange(N) / 20000.0
    times[700:] += 0.5
    with open_recording(write(tmp_path / "a.nwb", timestamps=times)) as rec:
        assert rec.info.fs_hz == 20000 and rec.gaps == [(700, 10_000)]


def test_several_series_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nwb", ("ap", "lf"))
    with pytest.raises(ConfigError, match=r"ap, .*lf"):
        open_recording(path)
    with open_recording(path, stream="lf") as rec:
        assert rec.info.name == "lf"


def test_file_without_traces_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no ElectricalSeries"):
        open_recording(write(tmp_path / "a.nwb", ()))
    path = write(tmp_path / "b.nwb")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordingError, match="cut off"):
        open_recording(path)
    path.write_bytes(b"text" * 100)
    with pytest.raises(RecordingError, match="not an HDF5 file"):
        open_recording(path)
    with h5py.File(tmp_path / "c.h5", "w") as h:
        h["x"] = 1
    with pytest.raises(RecordingError, match="neither Maxwell's nor NWB"):
        open_recording(tmp_path / "c.h5")


def write_session(path: Path, final: int, gains: tuple[float, ...] = (6.29,) * 4) -> StreamInfo:
    """A file as the session recorder makes it, filled like one whose last rows were not vouched for."""
    nwbfile = pytest.importorskip("spiked.record.nwbfile")
    config = pytest.importorskip("spiked.config").parse({"stream": [{"name": "a", "source": "openephys"}]})
    info = StreamInfo(
        "a", 20000.0, ("5", "9", "700", "3"), tuple(map(tuple, XY.tolist())), "uint16", gains, 512.0, 0, 1023
    )
    nwbfile.create(path, info, config, datetime(2026, 1, 1, tzinfo=UTC), "s1", first_sample=5000)
    with h5py.File(path, "r+") as f:
        f[nwbfile.DATA].resize(N, 0)
        f[nwbfile.DATA][:] = codes("uint16")
        gaps = {
            "start_sample": [5100, 5300],
            "stop_sample": [5200, 5310],
            "n_channels": [4, 2],
            "reason": ["lost", "partial"],
        }
        gaps |= {"start_time": [0.005, 0.015], "stop_time": [0.01, 0.0155]}
        events = {
            "timestamp": [0.002, 0.003, 0.9],
            "sample": [5040, 5060, 23_000],
            "kind": ["ttl", "reset", "stim"],
        }
        events |= {"line": [2, 0, 1], "state": [1, 0, 1], "value": [4.0, 0.0, 2.5], "text": ["", "", "µ"]}
        for table, columns in ((nwbfile.GAPS, gaps), (nwbfile.EVENTS, events)):
            for name, values in columns.items():
                f[table][name].resize(len(values), 0)
                f[table][name][:] = values
        f[nwbfile.POSITION][...] = [5000, N - 100, 2, 3, 0, 0, 5000, final]
    return info


@pytest.mark.parametrize(("final", "n"), [(1, N), (0, N - 100)])
def test_session_file_reads_back_as_it_was_acquired(tmp_path: Path, final: int, n: int) -> None:
    info = write_session(tmp_path / "a.nwb", final)
    with open_recording(tmp_path / "a.nwb") as rec:
        assert rec.info.same_wire(info) and rec.info.zero_code == 512 and rec.info.code_max == 1023
        assert rec.info.positions_um == info.positions_um and rec.info.gain_uv == info.gain_uv
        assert (rec.n_samples, rec.first_sample) == (n, 5000)
        assert np.array_equal(rec.read(0, n), codes("uint16")[:n])
        assert rec.invalid == [(100, 200)]  # the partial gap still has channels with signal
        assert [(e.sample, e.kind, e.line, e.value) for e in rec.events] == [(5040, EventKind.TTL, 2, 4.0)]


def test_session_file_with_different_gains_keeps_them(tmp_path: Path) -> None:
    info = write_session(tmp_path / "a.nwb", 1, (1.0, 2.0, 3.0, 4.0))
    with open_recording(tmp_path / "a.nwb") as rec:
        assert rec.info.gain_uv == info.gain_uv and rec.info.zero_code == 512


def test_session_folder_opens_its_stream(tmp_path: Path) -> None:
    write_session(tmp_path / "a.nwb", 1)
    (tmp_path / "a.sequences.h5").write_bytes(b"x")
    with open_recording(tmp_path) as rec:
        assert rec.info.name == "a"
