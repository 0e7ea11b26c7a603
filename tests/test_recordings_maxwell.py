"""Maxwell files of both layouts: the right row under each channel, frame numbers, events, clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spiked.errors import ConfigError, RecordingError
from spiked.sources.recordings import open_recording
from spiked.stream import EventKind

MAPPING = np.dtype([("channel", "<i4"), ("electrode", "<i4"), ("x", "<f8"), ("y", "<f8")])
SPIKE = np.dtype([("frameno", "<i8"), ("channel", "<i4"), ("amplitude", "<f4")])
MARK = np.dtype([("frameno", "<i8"), ("eventtype", "<i4"), ("eventid", "<i4"), ("eventmessage", "S64")])
BITS = np.dtype([("frameno", "<i8"), ("bits", "<i4")])
N, FIRST = 3000, 987_654


def place(channel: int) -> tuple[int, int, float, float]:
    return channel, 1000 + 7 * channel, 17.5 * (channel % 32), 17.5 * (channel // 32)


def codes(channel: int) -> np.ndarray:
    return (500 + (channel + np.arange(N)) % 100).astype(np.uint16)


def write_new(
    path: Path,
    routed: tuple[int, ...] = (700, 5, 9),
    mapped: tuple[int, ...] = (5, 9, 700),
    frames: np.ndarray | None = None,
    wells: tuple[int, ...] = (0,),
    lsb: float = 6.29e-6,
    **raw_options: Any,
) -> Path:
    with h5py.File(path, "w") as h:
        h["version"] = np.array([b"20190530"])
        for k, well in enumerate(wells):
            d = h.create_group(f"data_store/data{k:04d}")
            for key, value in (("lsb", lsb), ("gain", 512.0), ("hpf", 300.0), ("sampling", 20000.0)):
                d[f"settings/{key}"] = np.array([value])
            d["settings/mapping"] = np.array([place(c) for c in mapped], MAPPING)
            raw = np.stack([codes(c) + well for c in routed]).astype("<u2")
            d.create_dataset("groups/routed/raw", data=raw, **raw_options)
            d["groups/routed/channels"] = np.array(routed, "<u4")
            d["groups/routed/frame_nos"] = np.asarray(
                FIRST + np.arange(N) if frames is None else frames, "<u8"
            )
            d["spikes"] = np.array([(FIRST + 46, 700, -33.5), (FIRST - 5, 9, -10)], SPIKE)
            d["events"] = np.array([(FIRST + 146, 1, 7, b"stim 1")], MARK)
            h[f"wells/well{well:03d}/rec0000"] = d
    return path


def write_old(path: Path, rows: int = 1028) -> Path:
    sig = np.zeros((rows, N), "<u2")
    for c in range(1024):
        sig[c] = codes(c)
    frame = 65_000 + np.arange(N)  # passes a 16-bit border
    sig[-2], sig[-1] = frame & 0xFFFF, frame >> 16
    with h5py.File(path, "w") as h:
        h["version"] = np.array([b"20160704"])
        h["sig"] = sig
        h["mapping"] = np.array([place(c) for c in (700, 5, 9)] + [(-1, 4, 0.0, 0.0)], MAPPING)
        for key, value in (("lsb", 6.29e-6), ("gain", 512.0), ("hpf", 300.0)):
            h[f"settings/{key}"] = np.array([value])
        h["bits"] = np.array([(65_100, 1), (65_200, 3), (65_300, 0)], BITS)
        h["proc0/spikeTimes"] = np.array([(65_010, 5, -20.0)], SPIKE)
    return path


def test_rows_follow_routed_channels_not_the_mapping(tmp_path: Path) -> None:
    with open_recording(write_new(tmp_path / "a.raw.h5")) as rec:
        assert rec.info.channel_ids == ("700", "5", "9")
        assert rec.info.positions_um[1] == place(5)[2:]
        assert rec.info.annotations["electrodes"] == [place(c)[1] for c in (700, 5, 9)]
        assert (rec.info.fs_hz, rec.info.dtype, rec.info.zero_code, rec.info.code_max) == (
            20000,
            "uint16",
            512,
            1023,
        )
        assert rec.info.gain_uv == pytest.approx((6.29,) * 3)
        data = rec.read(10, 2000)
        assert data.dtype == np.uint16 and data.flags.c_contiguous
        for k, c in enumerate((700, 5, 9)):
            assert np.array_equal(data[:, k], codes(c)[10:2000])
        assert rec.first_sample == FIRST and rec.gaps == [] and rec.n_samples == N


def test_small_reads_of_a_chunked_file_equal_one_large_read(tmp_path: Path) -> None:
    path = write_new(tmp_path / "a.raw.h5", chunks=(3, 130), compression="gzip")
    with open_recording(path) as rec:
        rec._pages.size = 520  # many pages in this small file
        whole = rec.read(0, N)
        parts = [rec.read(a, min(a + 101, N)) for a in range(0, N, 101)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_channel_mapped_twice_counts_once_and_unmapped_one_is_left_out(tmp_path: Path) -> None:
    with open_recording(write_new(tmp_path / "a.raw.h5", (700, 5, 9), (5, 700, 5))) as rec:
        assert rec.info.channel_ids == ("700", "5")
        assert rec.info.annotations["unplaced_channels"] == [9]
        assert np.array_equal(rec.read(0, 5)[:, 1], codes(5)[:5])


def test_lsb_of_zero_falls_back_to_the_amplifier_gain(tmp_path: Path) -> None:
    with open_recording(write_new(tmp_path / "a.raw.h5", lsb=0.0)) as rec:
        assert rec.info.gain_uv[0] == pytest.approx(6.294, abs=1e-3)


def test_frame_numbers_give_gaps_and_place_events(tmp_path: Path) -> None:
    frames = FIRST + np.arange(N)
    frames[100:] += 50
    frames[2000:] += 7
    with open_recording(write_new(tmp_path / "a.raw.h5", frames=frames)) as rec:
        assert rec.gaps == [(100, 50), (2000, 7)]
        assert [rec.device_sample(i) for i in (0, 99, 100, 1999, 2000)] == frames[
            [0, 99, 100, 1999, 2000]
        ].tolist()
        spike, stim = rec.events
        assert (spike.sample, spike.kind, spike.line, spike.value) == (
            FIRST + 46,
            EventKind.DEVICE_SPIKE,
            700,
            -33.5,
        )
        assert (stim.sample, stim.kind, stim.line, stim.text) == (FIRST + 146, EventKind.STIM, 7, "stim 1")
        assert rec.events_in(0, 100) == [spike]  # the stimulus fell into the hole before sample 100
        assert rec.events_in(100, 101) == [stim]
        assert list(rec.runs(90, 2010)) == [(90, 100), (100, 2000), (2000, 2010)]


def test_a_well_is_chosen_and_several_without_a_choice_are_listed(tmp_path: Path) -> None:
    path = write_new(tmp_path / "a.raw.h5", wells=(0, 3))
    with open_recording(path, well=3) as rec:
        assert np.array_equal(rec.read(0, 4)[:, 0], codes(700)[:4] + 3)
    with pytest.raises(ConfigError, match="wells 0, 3"):
        open_recording(path)
    with pytest.raises(ConfigError, match="wells 0, 3"):
        open_recording(path, well=1)


def test_old_layout_returns_only_the_routed_channels(tmp_path: Path) -> None:
    with open_recording(write_old(tmp_path / "old.raw.h5")) as rec:
        assert rec.info.channel_ids == ("5", "9", "700")
        assert rec.info.fs_hz == 20000 and rec.first_sample == 65_000 and rec.gaps == []
        data = rec.read(0, N)
        for k, c in enumerate((5, 9, 700)):
            assert np.array_equal(data[:, k], codes(c))
        assert rec.info.positions_um == tuple(place(c)[2:] for c in (5, 9, 700))
        ttl = [(e.sample, e.line, e.state) for e in rec.events if e.kind is EventKind.TTL]
        assert ttl == [(65_100, 0, 1), (65_200, 1, 1), (65_300, 0, 0), (65_300, 1, 0)]
        assert [e.sample for e in rec.events if e.kind is EventKind.DEVICE_SPIKE] == [65_010]


def test_unknown_filter_names_the_plugin_path(tmp_path: Path) -> None:
    path = write_new(tmp_path / "a.raw.h5")
    with h5py.File(path, "r+") as h:
        routed = h["data_store/data0000/groups/routed"]
        del routed["raw"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((3, 1000))
        plist.set_filter(32_401, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((3, N))
        h5py.h5d.create(routed.id, b"raw", h5py.h5t.STD_U16LE, space, plist)
    with pytest.raises(RecordingError, match="HDF5_PLUGIN_PATH"):
        open_recording(path)


def test_spikes_only_file_says_so(tmp_path: Path) -> None:
    path = write_new(tmp_path / "a.raw.h5")
    with h5py.File(path, "r+") as h:
        del h["data_store/data0000/groups/routed/raw"]
    with pytest.raises(RecordingError, match="spikes only"):
        open_recording(path)


@pytest.mark.parametrize("keep", [0.5, 0.02])
def test_cut_off_file_says_so(tmp_path: Path, keep: float) -> None:
    path = write_new(tmp_path / "a.raw.h5")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(RecordingError, match="cut off") as e:
        open_recording(path)
    assert "\n" not in str(e.value)


def test_wrong_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20000 Hz, not 30000 Hz"):
        open_recording(write_new(tmp_path / "a.raw.h5"), fs_hz=30000)
