"""Open Ephys binary recordings: streams, numbers, TTL edges, and the same samples as neo reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import probeinterface
import pytest

from spiked.errors import ConfigError, RecordingError
from spiked.sources.recordings import open_recording
from spiked.stream import EventKind

N, FIRST, BIT_UV = 5000, 40_000, 0.195


def samples(n_channels: int) -> np.ndarray:
    return ((np.arange(N)[:, None] * 3 + np.arange(n_channels) * 101) % 4001 - 2000).astype("<i2")


def channel(name: str, units: str = "uV", bit: float = BIT_UV) -> dict[str, Any]:
    return {
        "channel_name": name,
        "bit_volts": bit,
        "units": units,
        "description": "",
        "identifier": "",
        "history": "",
    }


def write(
    root: Path,
    streams: tuple[str, ...] = ("AP",),
    n_channels: int = 8,
    adc: int = 0,
    numbers: np.ndarray | None = None,
    where: str = "Record Node 101/experiment1/recording1",
) -> Path:
    """A recording node's folder; line 1 rises at 1000 and falls at 1500, line 3 rises at 2000."""
    folder = root / where
    structure: dict[str, Any] = {"GUI version": "1.0.1", "continuous": [], "events": [], "spikes": []}
    for name in streams:
        own = f"Probe-100.{name}"
        path = folder / "continuous" / own
        path.mkdir(parents=True)
        samples(n_channels + adc).tofile(path / "continuous.dat")
        sn = FIRST + np.arange(N) if numbers is None else numbers
        np.save(path / "sample_numbers.npy", sn.astype("<i8"))
        np.save(path / "timestamps.npy", sn / 30000)
        channels = [channel(f"CH{i + 1}") for i in range(n_channels)]
        channels += [channel(f"ADC{i + 1}", "V", 0.00015) for i in range(adc)]
        structure["continuous"].append(
            {"folder_name": own + "/", "sample_rate": 30000, "stream_name": name, "channels": channels,
             "num_channels": n_channels + adc, "source_processor_name": "Probe", "source_processor_id": 100,
             "recorded_processor": "Record Node", "recorded_processor_id": 101}
        )  # fmt: skip
        ttl = folder / "events" / own / "TTL"
        ttl.mkdir(parents=True)
        np.save(ttl / "states.npy", np.array([1, -1, 3], "<i2"))
        np.save(ttl / "sample_numbers.npy", FIRST + np.array([1000, 1500, 2000], "<i8"))
        np.save(ttl / "timestamps.npy", (FIRST + np.array([1000, 1500, 2000])) / 30000)
        np.save(ttl / "full_words.npy", np.array([1, 0, 4], "<u8"))
        structure["events"].append(
            {"folder_name": own + "/TTL/", "channel_name": "TTL", "stream_name": name, "sample_rate": 30000,
             "type": "int16", "source_processor": "Probe", "initial_state": 0}
        )  # fmt: skip
    (folder / "structure.oebin").write_text(json.dumps(structure))
    return folder


def test_samples_and_scale_equal_neo(tmp_path: Path) -> None:
    rawio = pytest.importorskip("neo.rawio")
    folder = write(tmp_path)
    theirs = rawio.OpenEphysBinaryRawIO(str(tmp_path))
    theirs.parse_header()
    chunk = theirs.get_analogsignal_chunk(stream_index=0, i_start=50, i_stop=250)
    theirs_uv = theirs.rescale_signal_raw_to_float(chunk, dtype="float64", stream_index=0)
    with open_recording(folder) as rec:
        assert np.allclose(rec.read(50, 250) * np.asarray(rec.info.gain_uv), theirs_uv, rtol=1e-6)
        assert rec.first_sample == FIRST and rec.info.fs_hz == 30000 and rec.info.name == "AP"
        assert not rec.info.geometry_known


@pytest.mark.parametrize(
    "below", [".", "Record Node 101", "Record Node 101/experiment1/recording1/structure.oebin",
              "Record Node 101/experiment1/recording1/continuous/Probe-100.AP/continuous.dat"]
)  # fmt: skip
def test_opens_from_anywhere_in_the_tree(tmp_path: Path, below: str) -> None:
    write(tmp_path)
    with open_recording(tmp_path / below) as rec:
        assert np.array_equal(rec.read(0, N), samples(8))


def test_several_streams_are_listed_and_chosen_by_name_or_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, ("AP", "LFP"))
    with pytest.raises(ConfigError, match=r"AP .*LFP"):
        open_recording(tmp_path)
    with open_recording(tmp_path, stream="LFP") as rec:
        assert rec.info.name == "LFP" and len(rec.events) == 3
    with open_recording(folder / "continuous" / "Probe-100.AP") as rec:
        assert rec.info.name == "AP"


def test_several_recordings_are_listed(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, where="Record Node 101/experiment1/recording2")
    with pytest.raises(ConfigError, match=r"recording1.*recording2"):
        open_recording(tmp_path)


def test_lines_are_told_from_zero(tmp_path: Path) -> None:
    with open_recording(write(tmp_path)) as rec:
        told = [(e.sample - FIRST, e.kind, e.line, e.state, e.value) for e in rec.events]
    assert told == [
        (1000, EventKind.TTL, 0, 1, 1),
        (1500, EventKind.TTL, 0, 0, 0),
        (2000, EventKind.TTL, 2, 1, 4),
    ]


def test_a_recording_without_a_single_event_opens(tmp_path: Path) -> None:
    folder = write(tmp_path)
    ttl = folder / "events" / "Probe-100.AP" / "TTL"
    for name, dtype in (
        ("states", "<i2"),
        ("sample_numbers", "<i8"),
        ("timestamps", "<f8"),
        ("full_words", "<u8"),
    ):
        np.save(ttl / f"{name}.npy", np.zeros(0, dtype))
    with open_recording(folder) as rec:
        assert rec.events == []


def test_number_jumps_are_gaps(tmp_path: Path) -> None:
    numbers = FIRST + np.arange(N)
    numbers[300:] += 1234
    with open_recording(write(tmp_path, numbers=numbers)) as rec:
        assert rec.gaps == [(300, 1234)]
        assert rec.device_sample(300) == FIRST + 300 + 1234


def test_analog_inputs_are_left_out_and_the_probe_places_the_rest(tmp_path: Path) -> None:
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(
        positions=np.stack([np.zeros(8), 20.0 * np.arange(8)], 1), shapes="circle", shape_params={"radius": 5}
    )
    probe.set_device_channel_indices(np.arange(8)[::-1])
    probeinterface.write_probeinterface(tmp_path / "probe.json", probe)
    folder = write(tmp_path / "d", adc=2)
    with open_recording(folder, probe=tmp_path / "probe.json") as rec:
        assert rec.info.n_channels == 8 and rec.info.geometry_known
        assert rec.info.positions_um[0] == (0.0, 140.0)
        assert np.array_equal(rec.read(0, 100), samples(10)[:100, :8])


def test_files_before_version_06(tmp_path: Path) -> None:
    folder = write(tmp_path)
    own = folder / "continuous" / "Probe-100.AP"
    (own / "sample_numbers.npy").unlink()
    np.save(own / "timestamps.npy", (FIRST + np.arange(N)).astype("<i8"))
    ttl = folder / "events" / "Probe-100.AP" / "TTL"
    (ttl / "states.npy").rename(ttl / "channel_states.npy")
    (ttl / "sample_numbers.npy").replace(ttl / "timestamps.npy")
    with open_recording(folder) as rec:
        assert rec.first_sample == FIRST and [e.sample - FIRST for e in rec.events] == [1000, 1500, 2000]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    own = folder / "continuous" / "Probe-100.AP"
    whole = (own / "continuous.dat").read_bytes()
    (own / "continuous.dat").write_bytes(whole[:-3])
    with pytest.raises(RecordingError, match="cut off"):
        open_recording(folder)
    (own / "continuous.dat").write_bytes(whole[:-160])
    with pytest.raises(RecordingError, match=r"holds 4990 samples, sample_numbers\.npy 5000"):
        open_recording(folder)
    (own / "continuous.dat").unlink()
    with pytest.raises(RecordingError, match="cannot be read"):
        open_recording(folder)
    (own / "continuous.dat").write_bytes(whole)
    numbers = (own / "sample_numbers.npy").read_bytes()
    (own / "sample_numbers.npy").write_bytes(numbers[: len(numbers) // 2])
    with pytest.raises(RecordingError, match=r"sample_numbers\.npy is cut off"):
        open_recording(folder)
    (folder / "structure.oebin").write_text('{"continuous": [')
    with pytest.raises(RecordingError, match=r"structure\.oebin is not what Open Ephys writes"):
        open_recording(folder)
