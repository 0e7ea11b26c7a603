"""The session file: valid NWB, read back sample by sample by others' readers."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from record_rig import FIRST, Feed, config, samples, stream

from spiked.errors import RecordingError
from spiked.record.finalize import finalize
from spiked.record.nwbfile import DATA, EVENTS, GAPS, create
from spiked.record.recover import recover
from spiked.record.writer import SessionWriter
from spiked.ring import Ring
from spiked.stream import StreamInfo
from spiked_client.protocol import BLIND, SPIKE, UNIT

QUIET = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


def record(folder: Path, info: StreamInfo, busy: bool = True) -> Path:
    """Two seconds through a ring into a closed file; with a gap, a partial gap and events if `busy`."""
    ring = Ring.create(folder / "ring", info, 4.0)
    feed = Feed(ring)
    writer = SessionWriter(folder / "probe.nwb", ring, config(), session_id="session")
    feed.put(info.samples(500))
    if busy:
        feed.event(3)
        feed.gap(info.samples(100))
        mask = np.zeros(info.n_channels, bool)
        mask[[1, info.n_channels - 1]] = True
        feed.writer.add_gap(feed.writer.next_sample, feed.writer.next_sample + 10, "partial", mask)
        feed.event(0, "µ-opto on")
    writer.step()
    feed.put(info.samples(1500))
    ring.end()
    writer.run()
    return writer.path


def live_results(folder: Path, n_channels: int) -> None:
    """What the live path leaves: two units, unsorted spikes, a repeated spike, a torn record."""
    rng = np.random.default_rng(0)
    spikes = np.zeros(300, SPIKE)
    spikes["sample"] = FIRST + np.sort(rng.choice([*range(10000), *range(12000, 42000)], 300))
    spikes["unit"] = rng.choice([-1, 4, 9], 300)
    spikes["channel"] = np.where(spikes["unit"] == 4, 2, 5)
    spikes["amplitude_uv"] = -80
    torn = np.concatenate([spikes, spikes[-20:]]).tobytes() + b"\x01\x02\x03"
    (folder / "probe.spikes.bin").write_bytes(torn)
    blind = np.zeros(4, BLIND)
    blind["start"] = [FIRST - 50, FIRST + 100, FIRST + 100, FIRST + 9000]
    blind["stop"] = [FIRST + 50, FIRST + 200, FIRST + 200, FIRST + 9100]
    blind["channel"] = [-1, 3, 4, -1]
    blind["reason"] = [4, 2, 2, 0]
    (folder / "probe.blind.bin").write_bytes(blind.tobytes())
    units = np.zeros(1, UNIT)
    units["unit"], units["channel"], units["amplitude_uv"] = 9, n_channels - 1, -123
    (folder / "probe.units.bin").write_bytes(units.tobytes())


def problems(path: Path) -> list[str]:
    """What pynwb and nwbinspector hold against a file: schema errors, CRITICAL findings and violations.

    But one: the rig does not know the brain area, so the electrodes' location is not a term of an atlas.
    """
    from nwbinspector import Importance, inspect_nwbfile
    from pynwb import validate

    serious = (
        Importance.ERROR,
        Importance.PYNWB_VALIDATION,
        Importance.CRITICAL,
        Importance.BEST_PRACTICE_VIOLATION,
    )
    found = [m for m in inspect_nwbfile(nwbfile_path=path) if m.importance in serious]
    found = [m for m in found if m.check_function_name != "check_electrodes_location_allen_ccf"]
    return [str(e) for e in validate(path=str(path))] + [
        f"{m.check_function_name}: {m.message}" for m in found
    ]


STREAMS = {
    "maxwell": stream(),
    "neuropixels": stream(24, 30000.0, "int16", source="openephys"),
    "float": stream(16, 30000.0, "float32", gain_uv=(1.0,) * 16, source="openephys"),
    "gains": stream(8, 20000.0, "int16", gain_uv=tuple(1.0 + 0.1 * i for i in range(8)), zero_code=100.0),
}


@QUIET
@pytest.mark.parametrize("name", STREAMS)
def test_others_read_the_same_samples(tmp_path: Path, name: str) -> None:
    from spikeinterface.extractors import read_nwb_recording

    info = STREAMS[name]
    path = record(tmp_path, info)
    finalize(path)
    assert problems(path) == []
    expected = samples(FIRST, FIRST + info.samples(2100), info)
    expected[info.samples(500) : info.samples(600)] = 0
    recording = read_nwb_recording(path, electrical_series_path="acquisition/ElectricalSeries")
    assert recording.get_sampling_frequency() == info.fs_hz
    assert recording.get_dtype() == np.dtype(info.dtype)
    np.testing.assert_array_equal(recording.get_traces(), expected)
    np.testing.assert_allclose(recording.get_channel_gains(), info.gain_uv)
    np.testing.assert_allclose(recording.get_channel_offsets(), -info.zero_code * info.gains, rtol=1e-6)
    np.testing.assert_allclose(recording.get_channel_locations(), info.positions)
    assert list(recording.get_channel_ids()) == list(info.channel_ids)


@QUIET
def test_live_units_gaps_and_events_are_in_the_file(tmp_path: Path) -> None:
    from pynwb import NWBHDF5IO

    info = stream()
    path = record(tmp_path, info)
    live_results(tmp_path, info.n_channels)
    assert finalize(path) is True
    assert problems(path) == []
    spikes = np.fromfile(tmp_path / "probe.spikes.bin", SPIKE, 300)
    with NWBHDF5IO(path, "r") as io:
        nwb = io.read()
        assert nwb.session_id == "session"
        assert nwb.acquisition["ElectricalSeries"].data.maxshape == (None, info.n_channels)
        gaps = nwb.invalid_times.to_dataframe()
        assert gaps["reason"].tolist() == ["lost", "partial"]
        assert gaps["start_sample"].tolist() == [FIRST + 10000, FIRST + 12000]
        assert gaps["stop_sample"].tolist() == [FIRST + 12000, FIRST + 12010]
        assert gaps["n_channels"].tolist() == [info.n_channels, 2]
        partial = np.unpackbits(gaps["channels"].iloc[1])[: info.n_channels]
        assert np.flatnonzero(partial).tolist() == [1, info.n_channels - 1]
        np.testing.assert_allclose(gaps["start_time"], [0.5, 0.6])
        events = nwb.acquisition["events"].to_dataframe()
        assert events["kind"].tolist() == ["ttl", "ttl"]
        assert events["line"].tolist() == [3, 0]
        assert events["text"].tolist() == ["", "µ-opto on"]
        np.testing.assert_allclose(events["timestamp"], [0.5, 0.6])
        units = nwb.units.to_dataframe()
        assert units.index.tolist() == [4, 9]
        for unit in (4, 9):
            expected = np.unique(spikes["sample"][spikes["unit"] == unit]) - FIRST
            np.testing.assert_array_equal(np.round(units["spike_times"][unit] * info.fs_hz), expected)
            np.testing.assert_allclose(units["obs_intervals"][unit], [[0, 0.5], [0.6, 2.1]])
        assert units["channel"].tolist() == [info.channel_ids[2], info.channel_ids[-1]]
        assert units["amplitude_uv"].tolist() == [-80, -123]
        assert units["label"].tolist() == ["live", "live"]
        blind = nwb.intervals["blind"].to_dataframe()
        assert blind["reason"].tolist() == ["uncalibrated", "artifact", "gap"]
        assert blind["start_sample"].tolist() == [FIRST, FIRST + 100, FIRST + 9000]
        assert [len(c) for c in blind["channels"]] == [info.n_channels, 2, info.n_channels]


@QUIET
def test_a_quiet_session_is_valid_too(tmp_path: Path) -> None:
    path = record(tmp_path, stream(), busy=False)
    finalize(path)
    assert problems(path) == []
    with h5py.File(path) as f:
        assert GAPS not in f and EVENTS not in f


@QUIET
def test_unknown_geometry_gives_no_probe(tmp_path: Path) -> None:
    from spikeinterface.extractors import read_nwb_recording

    path = record(tmp_path, stream(geometry_known=False))
    finalize(path)
    assert problems(path) == []
    recording = read_nwb_recording(path, electrical_series_path="acquisition/ElectricalSeries")
    assert not recording.has_probe()


@QUIET
def test_finalizing_twice_changes_nothing(tmp_path: Path) -> None:
    path = record(tmp_path, stream())
    live_results(tmp_path, 32)
    assert finalize(path) is True
    before = hashlib.sha256(path.read_bytes()).digest()
    assert finalize(path) is False
    report = recover(tmp_path / "probe.nwb")
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert not report.repaired and report.samples == 42000
    assert "nothing to do" in str(report)


@QUIET
def test_finalizing_waits_for_no_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record(tmp_path, stream())
    live_results(tmp_path, 32)
    monkeypatch.setattr("spiked.record.edit.WAIT_S", 0.2)
    before = path.read_bytes()
    with h5py.File(path), pytest.raises(RecordingError, match="another program has"):
        finalize(path)
    assert path.read_bytes() == before
    assert finalize(path) is True


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "probe.nwb"
    path.write_text("precious")
    with pytest.raises(RecordingError, match="exists"):
        create(path, stream(), config(), datetime.now(UTC), "s", 0)
    assert path.read_text() == "precious"


def test_the_recording_starts_at_the_first_sample(tmp_path: Path) -> None:
    info = stream()
    before = datetime.now(UTC)
    path = record(tmp_path, info)
    with h5py.File(path) as f:
        start = datetime.fromisoformat(f["session_start_time"][()].decode())
        assert f["acquisition/ElectricalSeries"].attrs["first_sample"] == FIRST
        assert len(f[DATA]) == info.samples(2100)
        rows = f[DATA].chunks[0]
    assert 0 <= (start - before).total_seconds() < 10
    assert rows * info.n_channels * 2 <= 1 << 20
