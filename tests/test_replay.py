"""The replay source: the same samples, paced, with the file's gaps as jumps and events before their block."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spiked import config
from spiked.errors import ConfigError, RecordingError, SourceError
from spiked.sources.recordings import open_recording
from spiked.sources.replay import ReplaySource
from spiked.stream import Block, EventKind, StreamEvent

N, C, FS = 12_000, 4, 20_000.0


def recording(folder: Path, n: int = N) -> tuple[Path, np.ndarray]:
    """A plain recording's folder and its samples."""
    folder.mkdir()
    data = ((np.arange(n)[:, None] * 3 + np.arange(C) * 101) % 1001).astype(np.uint16)
    np.save(folder / "traces.npy", data)
    probe = {"ndim": 2, "si_units": "um", "contact_positions": [[0, 20 * c] for c in range(C)]}
    probe |= {"contact_shapes": ["circle"] * C, "contact_shape_params": [{"radius": 5}] * C}
    probe |= {"device_channel_indices": list(range(C)), "contact_plane_axes": [[[1, 0], [0, 1]]] * C}
    (folder / "probe.json").write_text(
        json.dumps({"specification": "probeinterface", "version": "0.2.21", "probes": [probe]})
    )
    (folder / "params.json").write_text(
        json.dumps({"sampling_frequency": FS, "lsb_uv": 6.29, "zero_code": 512})
    )
    return folder, data


def openephys(folder: Path, numbers: np.ndarray) -> tuple[Path, np.ndarray]:
    """An Open Ephys recording with these sample numbers; line 2 rises at index 1000, falls at 5000."""
    data = ((np.arange(N)[:, None] * 3 + np.arange(C) * 101) % 1001).astype(np.int16)
    own, ttl = folder / "continuous/AP", folder / "events/AP/TTL"
    own.mkdir(parents=True)
    ttl.mkdir(parents=True)
    data.tofile(own / "continuous.dat")
    np.save(own / "sample_numbers.npy", numbers.astype(np.int64))
    np.save(ttl / "states.npy", np.array([2, -2], np.int16))
    np.save(ttl / "sample_numbers.npy", numbers[[1000, 5000]].astype(np.int64))
    channels = [{"channel_name": f"CH{c}", "bit_volts": 0.195, "units": "uV"} for c in range(C)]
    stream = {
        "folder_name": "AP/",
        "stream_name": "AP",
        "sample_rate": FS,
        "num_channels": C,
        "channels": channels,
    }
    event = {"folder_name": "AP/TTL/", "stream_name": "AP"}
    (folder / "structure.oebin").write_text(json.dumps({"continuous": [stream], "events": [event]}))
    return folder, data


def stream(path: Path, **more: object) -> config.Stream:
    return config.parse(
        {"stream": [{"name": "probeA", "source": "replay", "path": str(path), **more}]}
    ).stream[0]


def drain(source: ReplaySource) -> list[Block | StreamEvent]:
    out: list[Block | StreamEvent] = []
    while not source.exhausted:
        out += source.read(0.05)
    return out


def blocks(items: list[Block | StreamEvent]) -> list[Block]:
    return [i for i in items if isinstance(i, Block)]


def opened(path: Path, **more: object) -> ReplaySource:
    source = ReplaySource(stream(path, **more))
    source.open(threading.Event())
    return source


def test_every_sample_comes_once_in_order(tmp_path: Path) -> None:
    path, data = recording(tmp_path / "r")
    source = ReplaySource(stream(path, speed=0))
    info = source.open(threading.Event())
    assert (info.name, info.source, info.fs_hz, info.zero_code) == ("probeA", "replay", FS, 512)
    got = blocks(drain(source))
    assert np.array_equal(np.concatenate([b.data for b in got]), data)
    assert [b.first_sample for b in got] == list(range(0, N, 400))  # 20 ms each
    assert source.counters["samples"] == N and source.counters["samples_lost"] == 0
    assert source.read(0.0) == [] and source.exhausted
    source.close()


def punctual(play: Callable[[], float], least_s: float, most_s: float) -> None:
    """It never takes less, and not more either, unless the computer had other things to do, again and again."""
    for _ in range(8):
        took = play()
        assert took > least_s
        if took < most_s:
            return
    raise AssertionError(f"it takes {took:.2f} s")


def test_real_time_takes_real_time_in_small_blocks(tmp_path: Path) -> None:
    path, _ = recording(tmp_path / "r")
    late, sizes = [], []

    def play() -> float:
        began = time.monotonic()
        source = opened(path)
        while not source.exhausted:
            for b in blocks(source.read(0.05)):
                late.append(time.monotonic() - began - (b.first_sample + len(b.data)) / FS)
                sizes.append(len(b.data))
        took = time.monotonic() - began
        source.close()
        return took

    punctual(play, N / FS - 0.01, N / FS + 0.5)
    assert max(sizes) == 100 and min(late) > -0.01  # 5 ms each, none before its time


def test_speed_scales_the_pace(tmp_path: Path) -> None:
    path, _ = recording(tmp_path / "r", 40_000)

    def play() -> float:
        began = time.monotonic()
        source = opened(path, speed=4)
        assert {len(b.data) for b in blocks(drain(source))} == {400}
        return time.monotonic() - began

    punctual(play, 0.48, 1.5)


def test_a_late_reader_catches_up_in_bounded_batches(tmp_path: Path) -> None:
    path, data = recording(tmp_path / "r")
    source = opened(path)
    time.sleep(0.3)
    batch = blocks(source.read(0.0))
    assert sum(len(b.data) for b in batch) == 600  # 30 ms
    assert np.array_equal(np.concatenate([b.data for b in batch + blocks(drain(source))]), data)


def test_gaps_are_jumps_and_events_precede_their_block(tmp_path: Path) -> None:
    numbers = 70_000 + np.arange(N)
    numbers[3010:] += 555
    path, data = openephys(tmp_path / "r", numbers)
    source = opened(path, speed=0)
    items = drain(source)
    at = np.concatenate([b.first_sample + np.arange(len(b.data)) for b in blocks(items)])
    assert np.array_equal(at, numbers)
    assert np.array_equal(np.concatenate([b.data for b in blocks(items)]), data)
    for i, item in enumerate(items):
        if isinstance(item, StreamEvent):
            after = items[i + 1]
            assert isinstance(after, Block)
            assert after.first_sample <= item.sample < after.first_sample + len(after.data)
    events = [(i.sample, i.kind, i.line, i.state) for i in items if isinstance(i, StreamEvent)]
    assert events == [(71_000, EventKind.TTL, 1, 1), (75_555, EventKind.TTL, 1, 0)]
    assert source.counters["gaps"] == 1 and source.counters["samples_lost"] == 555


def test_lines_of_the_stimulator_are_told_as_stimuli(tmp_path: Path) -> None:
    path, _ = openephys(tmp_path / "r", np.arange(N))
    items = drain(opened(path, speed=0, stim_lines=[1]))
    assert [i.kind for i in items if isinstance(i, StreamEvent)] == [EventKind.STIM, EventKind.STIM]


def test_a_gap_lasts_as_long_as_it_did_but_never_long(tmp_path: Path) -> None:
    numbers = np.arange(N)
    numbers[6000:] += 100_000_000
    path, _ = openephys(tmp_path / "r", numbers)

    def play() -> float:
        began = time.monotonic()
        source = opened(path, speed=5)
        drain(source)
        return time.monotonic() - began

    punctual(play, 0.3, 1.0)  # 0.6 s of samples and 1 s of silence, five times as fast


def test_zero_filled_losses_are_not_played(tmp_path: Path) -> None:
    words = np.full((N, C + 1), 5, "<i2")
    words[:, C] = 0
    words[4010:4030] = 0
    words[4010:4030, C] = 1 << 11
    binary = tmp_path / "run_g0_t0.imec0.ap.bin"
    words.tofile(binary)
    meta = {"imSampRate": 30000, "nSavedChans": C + 1, "snsApLfSy": f"{C},0,1", "firstSample": 900}
    meta |= {"imAiRangeMax": 0.5, "imMaxInt": 8192, "imDatPrb_type": 21}
    binary.with_suffix(".meta").write_text("\n".join(f"{k}={v}" for k, v in meta.items()))
    source = opened(binary, speed=0)
    at = np.concatenate([b.first_sample + np.arange(len(b.data)) for b in blocks(drain(source))])
    assert np.array_equal(at, 900 + np.delete(np.arange(N), np.arange(4010, 4030)))
    assert source.counters["samples_lost"] == 20


def test_seek_goes_on_where_a_process_died(tmp_path: Path) -> None:
    numbers = 500 + np.arange(N)
    numbers[3000:] += 100
    path, data = openephys(tmp_path / "r", numbers)
    source = opened(path, speed=0)
    for sample, index in ((500 + 1234, 1234), (500 + 3050, 3000), (0, 0)):
        source.seek(sample)
        first = blocks(source.read(0.1))[0]
        assert first.first_sample == numbers[index] and np.array_equal(first.data[0], data[index])
    source.seek(int(numbers[-1]) + 1)
    assert source.read(0.0) == [] and source.exhausted


def test_stop_ends_the_wait(tmp_path: Path) -> None:
    path, _ = recording(tmp_path / "r")
    stop = threading.Event()
    source = ReplaySource(stream(path, speed=0.00001))  # the first block is due in minutes
    source.open(stop)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    assert source.read(60.0) == []
    assert time.monotonic() - began < 30


def test_what_cannot_be_played_is_said(tmp_path: Path) -> None:
    path, _ = recording(tmp_path / "r")
    with pytest.raises(SourceError, match="not opened"):
        ReplaySource(stream(path)).read(0)
    with pytest.raises(ConfigError, match="there is no recording"):
        opened(tmp_path / "no")
    with pytest.raises(ConfigError, match="20000 Hz, not 30000 Hz"):
        opened(path, fs_hz=30000)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(RecordingError, match="no known format"):
        opened(tmp_path / "x.txt")


def test_replay_equals_the_recording_it_reads(tmp_path: Path) -> None:
    path, _ = recording(tmp_path / "r")
    with open_recording(path) as rec:
        info = ReplaySource(stream(path)).open(threading.Event())
        assert info.same_wire(rec.info) and info.positions_um == rec.info.positions_um
        assert info.annotations["format"] == "array"
