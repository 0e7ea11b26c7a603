"""Open Ephys wire: a capture of the real GUI, and everything that can go wrong, over a real socket."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
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
    ramp,
    refused,
    serving,
    shared,
    some_info,
)

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError, StreamChanged
from spiked.rehearsal import free_ports
from spiked.sources.codes import learn_step
from spiked.sources.openephys import OpenEphysSource
from spiked.sources.simulate import Cycle, Faults, OpenEphysWire
from spiked.sources.wire_openephys import (
    DATA,
    DataHeaders,
    WireError,
    data_fields,
    parse_header,
    ttl_message,
)
from spiked.stream import Block, EventKind, Flag

FILE_SAMPLES = 150_000  # the recording behind the capture is five seconds long and loops


@pytest.fixture(scope="module")
def capture() -> dict[str, list[list[bytes]]]:
    raw = msgpack.unpackb(shared("data/oe_capture.msgpack").read_bytes(), raw=False)
    return {run["name"]: [frames for _, frames in run["messages"]] for run in raw["runs"]}


def assert_true_samples(blocks: list[Block], channels: int = 16) -> None:
    for b in blocks:
        expected = ramp(np.arange(b.first_sample, b.first_sample + len(b.data)) % FILE_SAMPLES, channels)
        if b.missing is not None:
            expected[:, b.missing] = 0
        np.testing.assert_array_equal(b.data, expected)


def test_capture_whole_run_with_loop_and_second_acquisition(capture: dict, tmp_path: Path) -> None:
    with (
        publishing(capture["A_full"]) as address,
        opened("openephys", address, stim_lines=[2]) as (source, info),
    ):
        items = collect(source)
    assert (info.fs_hz, info.n_channels, info.dtype, info.gain_uv[0]) == (30_000.0, 16, "int16", 0.195)
    assert info.channel_ids[:2] == ("CH1", "CH2") and not info.geometry_known
    blocks = blocks_of(items)
    assert_true_samples(blocks)
    assert [b.missing for b in blocks if b.missing is not None] == []
    assert sum(b.new_acquisition for b in blocks) == 1
    assert source.counters["lost_messages"] == source.counters["malformed"] == source.counters["inexact"] == 0

    with into_ring(items, info, tmp_path / "ring") as (data, integrity, ring):
        assert ring.committed == sum(len(b.data) for b in blocks)  # numbering goes on without a hole
        loop_at = next(
            a.first_sample + len(a.data) for a, b in pairwise(blocks) if b.first_sample < a.first_sample
        )
        assert gap_rows(ring) == [(loop_at, loop_at, "reset", 16)]
        assert integrity.counters["resets"] == 1
        np.testing.assert_array_equal(data, np.concatenate([b.data for b in blocks]))
        rows, _, _ = ring.rows("events", 0)
        edges = rows[np.isin(rows["kind"], [EventKind.TTL, EventKind.STIM])]
        # line 0 rises half a second into every second of the file, line 2 in its last quarter
        device = edges["sample"] % 30_000  # the loop is one of whole seconds
        line0 = edges["line"] == 0
        assert set(device[line0 & (edges["state"] == 1)]) == {15_000}
        assert set(edges["kind"][line0]) == {EventKind.TTL} and set(edges["kind"][edges["line"] == 2]) == {
            EventKind.STIM
        }
        told = rows[rows["kind"] == EventKind.MESSAGE]
        assert [t.decode() for t in told["text"]] == [f"counter reset device={loop_at % FILE_SAMPLES}"]


def test_capture_spikes_and_filtered_floats(capture: dict) -> None:
    with publishing(capture["B_spikes"]) as address, opened("openephys", address) as (source, info):
        items = collect(source)
    assert info.dtype == "float32" and set(info.gain_uv) == {1.0}  # band-passed: no common step
    spikes = [e for e in events_of(items) if e.kind is EventKind.DEVICE_SPIKE]
    sent = [json.loads(f[1])["spike"] for f in capture["B_spikes"] if b'"spike"' in f[1][:80]]
    assert [(s.sample, s.text) for s in spikes] == [(d["sample_num"], d["electrode"]) for d in sent]
    assert all(s.value < 0 for s in spikes) and len(spikes) > 100
    first = capture["B_spikes"][[f[0] for f in capture["B_spikes"]].index(DATA)]
    np.testing.assert_array_equal(blocks_of(items)[0].data[:, 0], np.frombuffer(first[2], "<f4"))


def test_capture_truncated_headers(capture: dict) -> None:
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(capture["C_nonascii"][0][1])
    with publishing(capture["C_nonascii"]) as address, opened("openephys", address) as (source, info):
        items = collect(source, idle_s=1.5)
    assert info.channel_ids[:2] == ("CH1 µ", "CH2")
    assert source.counters["malformed"] == source.counters["lost_messages"] == 0
    blocks = blocks_of(items)
    assert_true_samples(blocks)
    assert (
        len(blocks) == 12 and blocks[-1].missing is not None and blocks[-1].missing.sum() == 15
    )  # cut off at the end


def test_capture_with_a_real_hole(capture: dict, tmp_path: Path) -> None:
    messages = capture["D_loss"]
    fields = [data_fields(parse_header(f[1])) for f in messages]
    arrived = {(f[3], f[1]): f[2] for f in fields}
    with publishing(messages) as address, opened("openephys", address) as (source, info):
        items = collect(source, idle_s=1.5)
    assert_true_samples(blocks_of(items))
    assert source.counters["lost_messages"] == 31_935 and source.counters["late_join_blocks"] == 1
    with into_ring(items, info, tmp_path / "ring") as (data, integrity, ring):
        held = np.zeros((ring.committed, 16), bool)
        for (sample, channel), n in arrived.items():
            if sample > fields[0][3]:  # the block it joined in is not part of the stream
                held[sample - ring.first_sample : sample - ring.first_sample + n, channel] = True
        expected = ramp(np.arange(ring.first_sample, ring.next_sample) % FILE_SAMPLES, 16)
        np.testing.assert_array_equal(data, np.where(held, expected, 0))
        told = np.ones((ring.committed, 16), bool)
        rows, _, _ = ring.rows("gaps", 0)
        from spiked.ring import gap_mask

        for r in rows:
            told[r["start"] - ring.first_sample : r["stop"] - ring.first_sample, gap_mask(r, 16)] = False
        np.testing.assert_array_equal(told, held)
        assert [(r[2], r[3]) for r in gap_rows(ring)] == [("partial", 3), ("lost", 16)] or integrity.counters[
            "gaps"
        ] == 1
        flags = ring.rows("chunks", 0)[0]["flags"]
        assert (flags & Flag.GAP).any() and (flags & Flag.PARTIAL).any()


@pytest.mark.parametrize("uv", ["auto", 0.195, "float"])
def test_round_trip_is_exact(uv: str | float, tmp_path: Path) -> None:
    codes = noise_codes(30_000, 24)
    codes[:, 5] *= 100
    info = some_info(24, 10_000.0)
    signal = Cycle(info, codes, loops=1)
    ttl = [(1_000, 0, 1), (1_100, 0, 0), (20_000, 3, 1)]
    wire = OpenEphysWire(info, repeats=True)
    with (
        serving(signal, wire, speed=20, ttl=ttl, first_sample=77_000, record_sent=tmp_path / "sent") as (
            address,
            report,
        ),
        opened("openephys", address, uv_per_bit=uv, stim_lines=[3]) as (source, found),
    ):
        items = collect(source)
        sent = report()
    assert (sent.samples, sent.first_sample, sent.messages) == (
        30_000,
        77_000,
        24 * -(-30_000 // wire.block_samples) + 3,
    )
    assert (found.fs_hz, found.channel_ids) == (10_000.0, info.channel_ids)
    expected = codes if uv != "float" else codes.astype(np.float32) * np.float32(0.195)
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        assert ring.first_sample == 77_000 and integrity.counters["gaps"] == 0
        assert data.dtype == expected.dtype
        np.testing.assert_array_equal(data, expected)
        rows, _, _ = ring.rows("events", 0)
        assert [(r["sample"], r["kind"], r["line"], r["state"], r["value"]) for r in rows] == [
            (78_000, EventKind.TTL, 0, 1, 1.0),
            (78_100, EventKind.TTL, 0, 0, 0.0),
            (97_000, EventKind.STIM, 3, 1, 8.0),
        ]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "sent", np.int16).reshape(-1, 24), codes)
    assert source.counters["inexact"] == source.counters["clipped"] == 0


def test_lost_messages_are_told_channel_by_channel(tmp_path: Path) -> None:
    codes = noise_codes(20_000, 8, seed=3) | 1  # never zero
    info = some_info(8, 10_000.0)
    wire = OpenEphysWire(info, repeats=True)
    n = wire.block_samples
    faults = Faults(drop_messages=((501, 520), (600, 601)), drop_samples=((10_003, 10_500),))
    with (
        serving(Cycle(info, codes, 1), wire, speed=20, faults=faults) as (address, report),
        opened("openephys", address) as (source, found),
    ):
        items = collect(source)
        sent = report()
    assert sent.dropped_samples == 497
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        assert len(data) == 20_000
        zero = data == 0
        np.testing.assert_array_equal(data[~zero], codes[~zero])
        told = np.zeros_like(zero)
        rows, _, _ = ring.rows("gaps", 0)
        from spiked.ring import gap_mask

        for r in rows:
            told[r["start"] : r["stop"], gap_mask(r, 8)] = True
        np.testing.assert_array_equal(told, zero)
        assert zero[10_003:10_500].all()
        # 20 messages of n samples or less, and the 497 samples of all channels
        assert zero.sum() == 20 * n + 497 * 8
        assert integrity.counters["gap_samples"] == 497 + 2 * n  # two of the blocks were lost whole
    assert source.counters["lost_messages"] == 20 + 8 * 3  # the 497 samples lie in three blocks


@pytest.mark.parametrize("counter", [0, None])
def test_device_restart(counter: int | None, tmp_path: Path) -> None:
    codes = noise_codes(20_000, 4, seed=4)
    info = some_info(4, 10_000.0)
    faults = Faults(restart_at=12_345, restart_counter=counter)
    with (
        serving(
            Cycle(info, codes, 1), OpenEphysWire(info, True), speed=20, first_sample=500, faults=faults
        ) as (address, _),
        opened("openephys", address) as (source, found),
    ):
        items = collect(source)
    assert source.counters["acquisitions"] == 1 and source.counters["lost_messages"] == 0
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, ring):
        np.testing.assert_array_equal(data, codes)
        assert integrity.counters["resets"] == (counter is not None)
        assert gap_rows(ring) == ([(12_845, 12_845, "reset", 4)] if counter == 0 else [])
        assert ring.device_sample(12_845) == (0 if counter == 0 else 12_845)


def test_repeated_and_meaningless_messages(tmp_path: Path) -> None:
    codes = noise_codes(20_000, 4, seed=5)
    info = some_info(4, 10_000.0)
    faults = Faults(repeat_every=7, garbage_every=5, silence=((9_000, 0.6),))
    with (
        serving(Cycle(info, codes, 1), OpenEphysWire(info, True), speed=20, faults=faults) as (
            address,
            report,
        ),
        opened("openephys", address) as (source, found),
    ):
        items = collect(source, idle_s=1.5)
        sent = report()
    with into_ring(items, found, tmp_path / "ring") as (data, _, _):
        np.testing.assert_array_equal(data, codes)
    assert source.counters["malformed"] == sent.garbage > 50
    assert source.counters["duplicates"] == sent.messages // 7


def test_device_dies_in_the_middle_of_a_block(tmp_path: Path) -> None:
    codes = noise_codes(20_000, 4, seed=6) | 1
    info = some_info(4, 10_000.0)
    wire = OpenEphysWire(info, True)
    with (
        serving(Cycle(info, codes, 1), wire, speed=20, faults=Faults(end_at_message=202)) as (address, _),
        opened("openephys", address) as (source, found),
    ):
        items = collect(source, idle_s=1.5)
    with into_ring(items, found, tmp_path / "ring") as (data, _, ring):
        assert len(data) == 51 * wire.block_samples
        assert gap_rows(ring) == [(50 * wire.block_samples, 51 * wire.block_samples, "partial", 2)]
        assert not data[50 * wire.block_samples :, 2:].any() and data[50 * wire.block_samples :, :2].all()


def random_messages(seed: int, n: int) -> list[list[bytes]]:
    rng = np.random.default_rng(seed)
    good = DataHeaders("s", ["a", "b"], 10_000.0)
    good.block(10, 0, 0)
    out = []
    for _ in range(n):
        kind = rng.integers(6)
        frames = [rng.bytes(int(rng.integers(0, 60))) for _ in range(int(rng.integers(1, 5)))]
        if kind == 1:
            frames = [DATA, good(5, 0)[: int(rng.integers(0, 250))], b"\0" * 44]
        elif kind == 2:
            frames = [DATA, good(5, 0), b"\0" * int(rng.choice([0, 3, 36, 44]))]
        elif kind == 3:
            frames = [b"EVENT\0", b'{"message_num": 3, "type": "spike", "spike": 7}', b""]
        elif kind == 4:
            frames = [b"EVENT\0", ttl_message(5, 9, 0, 1, 1, "s", 0)[1], b"\0" * int(rng.integers(0, 10))]
        elif kind == 5:
            frames = [
                DATA,
                json.dumps(
                    {"message_num": 1, "type": "data", "content": {"channel_num": [], "x": None}}
                ).encode(),
            ]
        out.append(frames)
    return out


def test_random_bytes_are_counted_and_survived(tmp_path: Path) -> None:
    info = some_info(2, 10_000.0)
    codes = noise_codes(9_000, 2, seed=8)
    wire = OpenEphysWire(info, True)
    real = [[bytes(f) for f in m] for a in range(0, 9_000, 100) for m in wire.messages(a, codes[a : a + 100])]
    bad = random_messages(1, 900)
    order = np.random.default_rng(2).permutation(np.repeat([0, 1], [len(real), len(bad)]))
    queues = [iter(real), iter(bad)]
    with (
        publishing([next(queues[i]) for i in order]) as address,
        opened("openephys", address) as (source, found),
    ):
        items = collect(source)
    assert source.counters["malformed"] == len(bad) and source.counters["messages"] == len(real) + len(bad)
    with into_ring(items, found, tmp_path / "ring") as (data, _, _):
        np.testing.assert_array_equal(data, codes)


def channel_messages(
    names: list[str], starts: range, n: int, fs: float = 10_000.0, num: int = 0
) -> list[list[bytes]]:
    """Data messages of these channels, noise scaled by 0.5."""
    headers, out = DataHeaders("s", names, fs), []
    rng = np.random.default_rng(0)
    for a in starts:
        headers.block(n, a, 0)
        for c in range(len(names)):
            num += 1
            out.append(
                [DATA, headers(num, c), (rng.integers(-99, 99, n) * np.float32(0.5)).astype("<f4").tobytes()]
            )
    return out


def test_changes_while_running_end_the_stream() -> None:
    two = channel_messages(["a", "b"], range(0, 6000, 100), 100)
    faster = channel_messages(["a", "b"], range(6000, 7000, 100), 100, 20_000.0, len(two))
    three = channel_messages(["a", "b", "c"], range(6000, 7000, 100), 100, num=len(two))
    one = channel_messages(["a"], range(6000, 7000, 100), 100, num=len(two))
    for more, what in (
        (faster, "10000 Hz to 20000 Hz"),
        (three, "channel 2 was not there"),
        (one, "changed from 2 channels to 1"),
    ):
        with publishing(two + more) as address, opened("openephys", address) as (source, info):
            assert info.n_channels == 2 and info.gain_uv[0] == 0.5
            with pytest.raises(StreamChanged, match=what):
                collect(source, idle_s=5)


def test_nobody_there_or_somebody_else() -> None:
    with (
        publishing([]) as address,
        pytest.raises(SourceError, match=r"no data from tcp://.* within 0.3 s; is acq"),
    ):
        opened("openephys", address, wait_s=0.3).__enter__()
    foreign = [[b"12345678", b"\0" * 4108, b""]] * 50
    refused("openephys", foreign, r"50 messages.*none of them Open Ephys data")
    old = [[b"DATA", json.dumps({"message_no": 1, "type": "data"}).encode(), b"\0" * 40]]
    with publishing(old) as address, pytest.raises(SourceError, match=r"older than 0.3; update the plugin"):
        opened("openephys", address).__enter__()
    events = [ttl_message(i + 1, i, 0, 1, 1, "s", 0) for i in range(5)]
    refused("openephys", events, "5 messages but no two blocks")


def test_what_came_while_the_reader_was_held_up_is_neither_late_nor_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether time is over is asked before the last look: what came meanwhile lies there unread."""
    begin = channel_messages(["a", "b"], range(0, 6000, 100), 100)
    first, second, *rest = channel_messages(["a", "b"], range(6000, 6200, 100), 100, num=len(begin))
    device = HeldUp(0.3, begin, [first], 1.2, [second], rest)
    monkeypatch.setattr("spiked.sources.openephys.Subscriber", lambda *_: device)
    source = OpenEphysSource(Stream(name="x", source="openephys", address="tcp://127.0.0.1:9", wait_s=0.2))
    source.open(threading.Event())
    blocks = [b for _ in range(5) for b in source.read(0.02) if isinstance(b, Block)]
    assert device.found == [] and sum(len(b.data) for b in blocks) == 6200
    assert all(b.missing is None for b in blocks)


def test_stop_while_waiting() -> None:
    stop = threading.Event()
    stop.set()
    source = OpenEphysSource(Stream(name="x", source="openephys", address="tcp://127.0.0.1:9"))
    with pytest.raises(SourceError, match="stopped while waiting"):
        source.open(stop)
    source.close()


def write_probe(path: Path, positions: list[list[float]], wired: list[int] | None) -> Path:
    probe = {
        "ndim": 2, "si_units": "um", "annotations": {}, "contact_annotations": {},
        "contact_positions": positions,
        "contact_plane_axes": [[[1.0, 0.0], [0.0, 1.0]]] * len(positions),
        "contact_shapes": ["circle"] * len(positions),
        "contact_shape_params": [{"radius": 5.0}] * len(positions),
    }  # fmt: skip
    if wired is not None:
        probe["device_channel_indices"] = wired
    path.write_text(json.dumps({"specification": "probeinterface", "version": "0.3.0", "probes": [probe]}))
    return path


def test_probe_file_follows_the_wiring_and_selected_channels(tmp_path: Path) -> None:
    messages = [
        m
        for m in channel_messages(["a", "b", "c"], range(0, 6000, 100), 100)
        if b'"channel_num": 1,' not in m[1]
    ]
    probe = write_probe(tmp_path / "p.json", [[0, 0], [10, 0], [20, 0], [30, 0]], [2, 1, 0, -1])
    with publishing(messages) as address, opened("openephys", address, probe=probe) as (source, info):
        assert info.channel_ids == ("a", "c") and info.geometry_known
        assert info.positions_um == ((20.0, 0.0), (0.0, 0.0))
        assert info.annotations["channel_nums"] == [0, 2]
        assert blocks_of(collect(source))[0].data.shape == (100, 2)
    short = write_probe(tmp_path / "q.json", [[0, 0]], [0])
    with (
        publishing(messages) as address,
        pytest.raises(ConfigError, match=r"2 channels but .* wires 1 contacts"),
    ):
        opened("openephys", address, probe=short).__enter__()


def test_values_that_do_not_fit_the_step_are_counted() -> None:
    messages = channel_messages(["a"], range(0, 9000, 100), 100)
    odd = np.array([0.25, np.nan, 1e9, -1e9] * 25, "<f4").tobytes()
    messages[80][2] = odd
    with publishing(messages) as address, opened("openephys", address) as (source, info):
        assert info.dtype == "int16"
        block = blocks_of(collect(source))[80]
    assert source.counters["clipped"] == 75 and source.counters["inexact"] >= 25
    assert block.data[:4, 0].tolist() == [0, 0, 32767, -32768]


def test_message_counter_runs_over_and_a_block_disagrees_in_length() -> None:
    info = some_info(2, 10_000.0)
    wire = OpenEphysWire(info, False)
    codes = noise_codes(12_000, 2, seed=9)
    messages = [
        [bytes(f) for f in m] for a in range(0, 12_000, 100) for m in wire.messages(a, codes[a : a + 100])
    ]
    for i, m in enumerate(messages):  # 32 bits, signed: the last number before it runs over is 2^31 - 1
        num = (1 << 31) - 100 + i
        num -= (1 << 32) if num >= 1 << 31 else 0
        m[1] = m[1].replace(b'"message_num": %d,' % (i + 1), b'"message_num": %d,' % num)
    messages[201][1] = messages[201][1].replace(b'"num_samples": 100', b'"num_samples": 50')
    messages[201][2] = messages[201][2][:200]
    with publishing(messages) as address, opened("openephys", address) as (source, _):
        blocks = blocks_of(collect(source))
    assert source.counters["lost_messages"] == source.counters["acquisitions"] == 0
    assert source.counters["malformed"] == 1
    assert [b.first_sample for b in blocks if b.missing is not None] == [10_000]


def test_heartbeat_is_small_and_off_unless_asked() -> None:
    context = zmq.Context()
    data, answer = context.socket(zmq.PUB), context.socket(zmq.REP)
    port = next(a for a, b in iter(lambda: free_ports(2), None) if b == a + 1)
    data.bind(f"tcp://127.0.0.1:{port}")
    answer.bind(f"tcp://127.0.0.1:{port + 1}")
    requests, done = [], threading.Event()

    def run() -> None:
        messages = iter(channel_messages(["a"], range(0, 1_000_000, 100), 100))
        while not done.wait(0.005):
            data.send_multipart(next(messages))
            if answer.poll(0):
                requests.append(answer.recv())
                answer.send(b"heartbeat received")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with opened("openephys", f"tcp://127.0.0.1:{port}") as (source, _):
            collect(source, most_s=0.3)
            assert source.counters["heartbeats"] == 0 and requests == []
        with opened("openephys", f"tcp://127.0.0.1:{port}", heartbeat=True) as (source, _):
            began = time.monotonic()
            while len(requests) < 2:
                source.read(0.05)
                assert time.monotonic() < began + 120
            assert time.monotonic() > began + 1.9  # seldom: every two seconds
            assert source.counters["heartbeats"] - len(requests) in (0, 1)
            assert source.counters["heartbeats_unanswered"] == 0
        assert json.loads(requests[0])["type"] == "heartbeat" and len(requests[0]) < 1000
    finally:
        done.set()
        thread.join()
        data.close(0)
        answer.close(0)
        context.term()


def test_the_step_is_learned_from_values_alone() -> None:
    rng = np.random.default_rng(0)
    for b in (0.195, 2.34375, 0.763, 4.69, 1.0, 0.0374):
        x = rng.integers(-3000, 3000, 5000).astype(np.float32) * np.float32(b)
        assert learn_step(x) == b
    full = rng.integers(-32768, 32767, 20_000).astype(np.float32) * np.float32(0.195)
    assert learn_step(full) == 0.195
    # scaled in another order of rounding, as some acquisition plugins do
    k = rng.integers(-512, 512, 5000).astype(np.float32)
    x = k * np.float32(1.2) / np.float32(1024) * np.float32(1e6) / np.float32(500)
    assert learn_step(x) == pytest.approx(2.34375, rel=1e-6)
    assert learn_step(rng.normal(0, 30, 5000).astype(np.float32)) is None
    assert learn_step(np.zeros(100, np.float32)) is None
    assert learn_step(np.array([np.nan] * 100, np.float32)) is None


def test_headers_are_byte_for_byte_those_of_the_plugin(capture: dict) -> None:
    for run in ("A_full", "C_nonascii"):
        real = next(f for f in capture[run] if f[0] == DATA)
        num, channel, n, first, fs, name = data_fields(parse_header(real[1]))
        stream = "synth16ch" if run == "A_full" else "synthµΩ"
        headers = DataHeaders(stream, [name], fs)
        stamp = int(real[1].decode("utf-8").rpartition(": ")[2].strip("\r\n}"))
        headers.block(n, first, stamp)
        assert headers(num, channel) == real[1]
    ttl = next(f for f in capture["A_full"] if f[0] != DATA)
    h = json.loads(ttl[1])
    made = ttl_message(h["message_num"], h["content"]["sample_num"], 0, 1, 1, "synth16ch", h["timestamp"])
    assert made == ttl


def test_a_cut_header_keeps_only_values_that_are_whole() -> None:
    text = ttl_message(12, 34_567, 0, 1, 1, "µ" * 20, 1)[1]
    assert parse_header(text)["content"]["sample_num"] == 34_567
    for n in range(len(text)):
        try:
            content = parse_header(text[:n]).get("content", {})
        except WireError:
            continue
        assert content.get("sample_num", 34_567) == 34_567
