"""MaxLab wire: frames, wells, spike records, routing, and all that can go wrong, over a real socket."""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from source_rig import (
    HeldUp,
    blocks_of,
    collect,
    events_of,
    gap_rows,
    into_ring,
    noise_codes,
    opened,
    publishing,
    refused,
    serving,
    some_info,
)

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError
from spiked.sources.electrode_map import ElectrodeMap, read_electrode_map, write_electrode_map
from spiked.sources.maxwell import MaxwellSource
from spiked.sources.simulate import Cycle, Faults, MaxwellWire
from spiked.sources.wire_maxwell import (
    SPIKE_NEW,
    SPIKE_OLD,
    frame_head,
    spike_layouts,
    spike_part,
    uv_per_bit,
)
from spiked.stream import EventKind

FS = 20_000.0


def adc(n: int, channels: int, seed: int = 0) -> np.ndarray:
    """(n, channels) uint16 codes of a 10-bit ADC, never 0."""
    return np.clip(noise_codes(n, channels, seed, 20.0) + 512, 1, 1023).astype(np.uint16)


def maxwell_info(channels: int, **more: object) -> object:
    return some_info(channels, FS, "uint16", uv_per_bit(512), zero_code=512.0, **more)


def frames(rows: np.ndarray, first: int = 0, well: int = 0, flags: int = 0) -> list[list[bytes]]:
    """Messages of these rows."""
    return [[frame_head(first + i, well, flags), r.astype("<f4").tobytes(), b""] for i, r in enumerate(rows)]


@pytest.mark.parametrize(("n", "first"), [(1024, 0), (64, (1 << 48) - 30_000)])
def test_round_trip_is_exact(n: int, first: int, tmp_path: Path) -> None:
    codes = adc(14_000, n)
    info = maxwell_info(n)
    with (
        serving(
            Cycle(info, codes, 1),
            MaxwellWire(info, True),
            speed=4,
            first_sample=first,
            record_sent=tmp_path / "sent",
        ) as (
            address,
            report,
        ),
        opened("maxwell", address) as (source, found),
    ):
        items = collect(source)
        sent = report()
    assert (found.n_channels, found.dtype, found.fs_hz) == (1027, "uint16", FS)  # without a map: every column
    assert (found.zero_code, found.code_min, found.code_max) == (
        512.0,
        0.0,
        1023.0,
    ) and not found.geometry_known
    assert found.gain_uv[0] == pytest.approx(6.294, abs=1e-3)
    assert sent.samples == sent.messages == source.counters["messages"] == 14_000
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        assert ring.first_sample == first and integrity.counters["gaps"] == 0
        np.testing.assert_array_equal(data[:, :n], codes)
        assert (data[:, n:] == 512).all()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "sent", np.uint16).reshape(-1, n), codes)
    assert not any(v for k, v in source.counters.items() if k != "messages")


def test_electrode_map_picks_and_orders_columns(tmp_path: Path) -> None:
    codes = adc(12_000, 1027)
    routing = ElectrodeMap((700, 5, 9), (5900, 1035, 1063), ((490.0, 367.5), (87.5, 0.0), (157.5, 0.0)))
    write_electrode_map(tmp_path / "a.cfg", routing)
    with (
        publishing(frames(codes)) as address,
        opened("maxwell", address, electrode_map=tmp_path / "a.cfg") as (source, info),
    ):
        items = collect(source)
    assert info.channel_ids == ("700", "5", "9") and info.geometry_known
    assert info.positions_um == routing.positions_um and info.annotations["electrodes"] == [5900, 1035, 1063]
    np.testing.assert_array_equal(np.concatenate([b.data for b in blocks_of(items)]), codes[:, [700, 5, 9]])
    write_electrode_map(tmp_path / "b.cfg", ElectrodeMap((1500,), (1,), ((0.0, 0.0),)))
    with (
        publishing(frames(codes)) as address,
        pytest.raises(ConfigError, match=r"routes channel 1500 but .* 1027 columns"),
    ):
        opened("maxwell", address, electrode_map=tmp_path / "b.cfg").__enter__()


def test_electrode_map_files(tmp_path: Path) -> None:
    cfg = tmp_path / "x.cfg"
    cfg.write_text("12(3456)17.5/35.0;7(0)0/0;-1(99)0/17.5;12(3456)17.5/35.0;1023(26399)3832.5/2082.5;\n")
    expected = ElectrodeMap((12, 7, 1023), (3456, 0, 26399), ((17.5, 35.0), (0.0, 0.0), (3832.5, 2082.5)))
    assert read_electrode_map(cfg) == expected

    row = np.dtype([("channel", "<i4"), ("electrode", "<i4"), ("x", "<f8"), ("y", "<f8")])
    table = np.array([(12, 3456, 17.5, 35.0), (7, 0, 0, 0), (-1, 99, 0, 17.5), (12, 3456, 17.5, 35.0),
                      (1023, 26399, 3832.5, 2082.5)], row)  # fmt: skip
    with h5py.File(tmp_path / "old.raw.h5", "w") as f:
        f["mapping"] = table
    assert read_electrode_map(tmp_path / "old.raw.h5") == expected
    with h5py.File(tmp_path / "new.raw.h5", "w") as f:
        for well in (3, 0):
            f[f"data_store/data000{well}/settings/mapping"] = table if well == 0 else table[1:2]
            f[f"data_store/data000{well}/well_id"] = np.array([well])
    assert read_electrode_map(tmp_path / "new.raw.h5") == expected
    assert read_electrode_map(tmp_path / "new.raw.h5", well=3).channels == (7,)
    with pytest.raises(ConfigError, match=r"holds wells \[0, 3\], not 1"):
        read_electrode_map(tmp_path / "new.raw.h5", well=1)

    for text, what in (
        ("hello", "is not channel"),
        ("-1(5)0/0;", "routes no electrode"),
        ("", "routes no electrode"),
    ):
        cfg.write_text(text)
        with pytest.raises(ConfigError, match=what):
            read_electrode_map(cfg)
    with pytest.raises(ConfigError, match="there is no electrode map"):
        read_electrode_map(tmp_path / "absent.cfg")
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="holds no electrode mapping"):
        read_electrode_map(tmp_path / "broken.h5")


@pytest.mark.parametrize("layout", ["old", "new"])
def test_both_spike_records(layout: str, tmp_path: Path) -> None:
    codes = adc(12_000, 64)
    info = maxwell_info(64)
    told = {300: [(5, -20.0)], 9_000: [(0, -33.5), (1023, -7.0), (17, 12.25)], 9_001: [(3, -1.0), (4, -2.0)]}
    wire = MaxwellWire(info, True, layout=layout, spikes=told)
    with (
        serving(Cycle(info, codes, 1), wire, speed=4, first_sample=5_000) as (address, _),
        opened("maxwell", address) as (source, _),
    ):
        items = collect(source)
    spikes = [
        (e.sample - 5_000, e.line, e.value) for e in events_of(items) if e.kind is EventKind.DEVICE_SPIKE
    ]
    assert spikes == [(at, c, a) for at, pairs in told.items() for c, a in pairs]
    assert source.counters["device_spikes_unreadable"] == 0


def test_spike_records_byte_by_byte() -> None:
    one = np.array([1000]), np.array([5]), np.array([-20.0])
    assert struct.unpack("8xLif", spike_part(*one, SPIKE_OLD)) == (1000, 5, -20.0)
    assert struct.unpack("=QfHBx", spike_part(*one, SPIKE_NEW, well=3)) == (1000, -20.0, 5, 3)
    for layout in (SPIKE_OLD, SPIKE_NEW):
        for n in (1, 2, 3, 6):
            for frame in (9, 14_001, 123_456, 1 << 40):
                part = spike_part(np.full(n, frame), np.arange(n), np.full(n, -30.0), layout)
                assert spike_layouts(part, frame) == [layout]
        assert spike_layouts(spike_part(*one, layout), 1 << 30) == []  # nowhere near the frame
    for part in (b"", b"\xff" * 48, b"\0" * 7):
        assert spike_layouts(part, 5) == []
    assert len(spike_layouts(b"\0" * 48, 5)) == 2


def test_losses_repetitions_and_garbage(tmp_path: Path) -> None:
    codes = adc(20_000, 16)
    info = maxwell_info(16)
    faults = Faults(
        drop_samples=((12_000, 12_345),), drop_messages=((3_000, 3_001), (15_000, 15_777)),
        repeat_every=701, garbage_every=500,
        silence=((8_000, 0.3),),
    )  # fmt: skip
    with (
        serving(Cycle(info, codes, 1), MaxwellWire(info, True), speed=4, faults=faults) as (address, report),
        opened("maxwell", address) as (source, found),
    ):
        items = collect(source, idle_s=0.8)
        sent = report()
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        expected = codes.copy()
        for a, b in (gaps := [(3_000, 3_001), (12_000, 12_345), (15_345, 16_122)]):
            expected[a:b] = 0
        np.testing.assert_array_equal(data[:, :16], expected)
        assert gap_rows(ring) == [(a, b, "lost", 1027) for a, b in gaps]
        assert integrity.counters["gap_samples"] == source.counters["lost_messages"] == 1 + 345 + 777
    assert source.counters["malformed"] == sent.garbage > 20 and source.counters["duplicates"] > 20


def test_one_well_of_several(tmp_path: Path) -> None:
    a, b = adc(12_000, 32, 1), adc(12_000, 32, 2)
    mixed = [m for pair in zip(frames(a, 100, well=2), frames(b, 90_000, well=5), strict=True) for m in pair]
    with publishing(mixed) as address, opened("maxwell", address, well=5) as (source, _):
        items = collect(source)
    np.testing.assert_array_equal(np.concatenate([x.data for x in blocks_of(items)]), b)
    assert source.counters["other_well"] == 12_000 and blocks_of(items)[0].first_sample == 90_000
    with (
        publishing(mixed) as address,
        pytest.raises(SourceError, match=r"carries wells \[2, 5\], not 0; set well"),
    ):
        opened("maxwell", address).__enter__()
    with publishing(frames(a, 7, well=3, flags=1)) as address, opened("maxwell", address) as (source, _):
        items = collect(source)  # the only well on the port is taken whatever its number
    np.testing.assert_array_equal(np.concatenate([x.data for x in blocks_of(items)]), a)
    assert source.counters["flagged"] == 12_000


def test_counter_that_begins_anew_and_frames_out_of_order(tmp_path: Path) -> None:
    codes = adc(30_000, 8)
    messages = frames(codes[:12_000], 200_000)
    messages[11_000], messages[11_001] = messages[11_001], messages[11_000]
    wild = [[b"\xff" * 6 + b"\0\0", codes[0].astype("<f4").tobytes(), b""]]
    messages += wild + frames(codes[12_000:20_000], 212_000) + wild + frames(codes[20_000:], 10)
    with (
        publishing(messages, every=600, pause_s=0.005) as address,
        opened("maxwell", address) as (source, info),
    ):
        items = collect(source)
    assert source.counters["malformed"] == 2  # numbers that no neighbour confirms
    assert source.counters["out_of_order"] == 1 and source.counters["acquisitions"] == 1
    with into_ring(items, info, tmp_path / "ring") as (data, _, ring):
        expected = codes.copy()
        expected[11_000] = 0
        np.testing.assert_array_equal(data, expected)
        assert [(g[0] - 200_000, g[1] - 200_000, g[2]) for g in gap_rows(ring)] == [
            (11_000, 11_001, "lost"),
            (20_000, 20_000, "reset"),
        ]


def test_filtered_floats_and_centred_codes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(0, 20, (12_000, 8)).astype(np.float32)
    for rows, dtype, zero in ((x, "float32", 0.0), (x + 512, "float32", 512.0), (np.rint(x), "int16", 0.0)):
        with publishing(frames(rows)) as address, opened("maxwell", address) as (source, info):
            data = np.concatenate([b.data for b in blocks_of(collect(source))])
        assert (info.dtype, info.zero_code) == (dtype, zero)
        np.testing.assert_array_equal(data, rows)
    late = adc(14_000, 8).astype(np.float32)
    late[13_000:, 3] = [0.25, np.nan, -5.0, 70_000.0] * 250
    with publishing(frames(late)) as address, opened("maxwell", address) as (source, info):
        data = np.concatenate([b.data for b in blocks_of(collect(source))])
    assert info.dtype == "uint16" and source.counters["inexact"] == 1000
    assert data[13_000:13_004, 3].tolist() == [0, 0, 0, 65_535]


def test_random_bytes_are_counted_and_survived(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    codes = adc(12_000, 8)
    good, bad = frames(codes, 1_000), []
    for _ in range(1_500):
        parts = [rng.bytes(int(rng.choice([0, 5, 7, 8, 9, 36]))) for _ in range(int(rng.integers(1, 6)))]
        if 2 <= len(parts) <= 3 and len(parts[0]) == 8 and len(parts[1]) == 32:
            continue
        bad.append(parts)
    odd = [
        [frame_head(1_000 + i), codes[0].astype("<f4").tobytes(), rng.bytes(48)] for i in range(5_000, 5_003)
    ]
    good[5_000:5_003] = odd
    queues = [iter(good), iter(bad)]
    order = rng.permutation(np.repeat([0, 1], [len(good), len(bad)]))
    with (
        publishing([next(queues[i]) for i in order]) as address,
        opened("maxwell", address) as (source, info),
    ):
        items = collect(source)
    assert source.counters["malformed"] == len(bad) and source.counters["device_spikes_unreadable"] == 3
    with into_ring(items, info, tmp_path / "ring") as (data, _, ring):
        codes[5_000:5_003] = codes[0]
        np.testing.assert_array_equal(data, codes)
        assert gap_rows(ring) == []


def test_nobody_there_or_somebody_else() -> None:
    with (
        publishing([]) as address,
        pytest.raises(SourceError, match=r"no data from tcp://.* within 0.3 s; is MaxLab"),
    ):
        opened("maxwell", address, wait_s=0.3).__enter__()
    foreign = [[b"DATA\0", b"{}", b"\0" * 40]] * 30
    refused("maxwell", foreign, r"30 messages .* none of them MaxLab frames")


def test_frames_that_came_while_the_reader_was_held_up_are_not_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether time is over is asked before the last look: what came meanwhile lies there unread."""
    device = HeldUp(0.3, frames(adc(11_000, 4)))
    monkeypatch.setattr("spiked.sources.maxwell.Subscriber", lambda *_: device)
    source = MaxwellSource(Stream(name="x", source="maxwell", address="tcp://127.0.0.1:9", wait_s=0.2))
    assert source.open(threading.Event()).n_channels == 4


@pytest.mark.parametrize(("queue_mb", "send_hwm", "fits"), [(2048, 70_000, True), (1, 1_000, False)])
def test_a_reader_that_stalls_loses_what_its_queue_does_not_hold(
    queue_mb: float, send_hwm: int, fits: bool, tmp_path: Path
) -> None:
    codes = adc(2_000, 256)
    info = maxwell_info(256)
    wire = MaxwellWire(info, True, n_columns=256)
    with (
        serving(Cycle(info, codes), wire, duration_s=7.0, send_hwm=send_hwm) as (address, report),
        opened("maxwell", address, queue_mb=queue_mb) as (source, found),
    ):
        items = [i for _ in range(20) for i in source.read(0.05)]
        time.sleep(4.5)  # more than the sender holds: what it sends while its network thread is held up
        items += collect(source)
        sent = report()
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        assert integrity.counters["gap_samples"] == source.counters["lost_messages"]
        assert (source.counters["lost_messages"] == 0) if fits else (source.counters["lost_messages"] > 500)
        told = np.zeros(len(data), bool)
        for a, b, reason, _ in gap_rows(ring):
            assert reason == "lost"
            told[a:b] = True
        expected = np.tile(codes, (70, 1))[: len(data)]
        np.testing.assert_array_equal(data[~told], expected[~told])
        assert not data[told].any()
        assert len(data) == sent.samples if fits else len(data) <= sent.samples
