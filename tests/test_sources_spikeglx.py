"""SpikeGLX: the source against a server that answers as the real one does, over real TCP."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from source_rig import blocks_of, events_of, gap_rows, into_ring, noise_codes, ramp, shared, some_info

from spiked.config import Stream
from spiked.errors import SourceError, StreamChanged
from spiked.rehearsal import free_ports
from spiked.sources.simulate import Cycle
from spiked.sources.simulate_spikeglx import SimProbe, SpikeGlxServer
from spiked.sources.simulate_sync import SyncPulses
from spiked.sources.spikeglx import SpikeGlxSource
from spiked.sources.spikeglx_link import SpikeGlxLink, streams_of
from spiked.sources.wire_spikeglx import Refused, WireError, channel_list, gain_uv, geometry, request
from spiked.stream import Block, StreamEvent

FS = 30_000.0
CODES = ramp(range(12_000), 8)  # served over and over: a code tells its sample


def probe(channels: int = 8, codes: np.ndarray | None = None, **more: object) -> SimProbe:
    codes = CODES[:, :channels] if codes is None else codes
    info = some_info(codes.shape[1], FS)
    return SimProbe(Cycle(info, codes), **more)  # type: ignore[arg-type]


@contextmanager
def source(server: SpikeGlxServer, **options: object) -> Iterator[SpikeGlxSource]:
    cfg = Stream(name="probe", source="spikeglx", address=server.address, **{"wait_s": 60.0, **options})
    s = SpikeGlxSource(cfg)
    try:
        yield s
    finally:
        s.close()


def read_until(
    s: SpikeGlxSource, done: Callable[[list[Block | StreamEvent]], bool], most_s: float = 120.0
) -> list[Block | StreamEvent]:
    out: list[Block | StreamEvent] = []
    until = time.monotonic() + most_s
    while not done(out):
        assert time.monotonic() < until, "the source did not deliver"
        out += s.read(0.05)
    return out


def samples(n: int) -> Callable[[list[Block | StreamEvent]], bool]:
    return lambda items: sum(len(b.data) for b in blocks_of(items)) >= n


def expected(first: int, n: int, channels: int = 8) -> np.ndarray:
    return CODES[np.arange(first, first + n) % len(CODES)][:, :channels]


def joined(items: list[Block | StreamEvent]) -> tuple[int, np.ndarray]:
    blocks = blocks_of(items)
    for a, b in pairwise(blocks):
        assert b.first_sample == a.first_sample + len(a.data)
    return blocks[0].first_sample, np.concatenate([b.data for b in blocks])


def test_every_sample_once_with_what_the_server_tells() -> None:
    with (
        SpikeGlxServer([probe(type=0, serial="18005102602", part="PRB_1_4_0480_1")]) as server,
        source(server) as s,
    ):
        time.sleep(0.1)
        info = s.open(threading.Event())
        items = read_until(s, samples(30_000))
    first, data = joined(items)
    assert np.array_equal(data, expected(first, len(data)))  # AP columns of 8 AP, 8 LF, SY
    assert info.channel_ids == tuple(f"AP{i}" for i in range(8)) and info.dtype == "int16"
    assert info.gain_uv == (0.6 / 512 / 500 * 1e6,) * 8  # exact, although the server prints six digits
    assert info.geometry_known and info.positions_um == some_info(8, FS).positions_um
    assert (info.code_min, info.code_max, info.fs_hz) == (-512.0, 511.0, FS)
    assert info.annotations["part"] == "PRB_1_4_0480_1" and info.annotations["serial"] == "18005102602"
    assert (
        s.counters["malformed"] == s.counters["refused"] == s.counters["too_late"] == 0 and not server.errors
    )


def test_several_probes_and_devices_are_told_apart() -> None:
    other = noise_codes(6_000, 4, seed=5)
    probes = [probe(), probe(codes=other, type=24), probe(3, device="nidq"), probe(5, device="onebox")]
    with SpikeGlxServer(probes) as server:
        link = SpikeGlxLink(server.address)
        assert streams_of(link) == [("imec", 0), ("imec", 1), ("onebox", 0), ("nidq", 0)]
        link.close()
        with source(server, probe_index=1) as s:
            info = s.open(threading.Event())
            first, data = joined(read_until(s, samples(3_000)))
            assert np.array_equal(data, other[np.arange(first, first + len(data)) % 6_000])
            assert info.gain_uv == (0.5 / 8192 / 80 * 1e6,) * 4
        for device, names in (("nidq", "XA0 XA1 XA2"), ("onebox", "XA0 XA1 XA2 XA3 XA4")):
            with source(server, device=device) as s:
                info = s.open(threading.Event())
                assert " ".join(info.channel_ids) == names and not info.geometry_known
                first, data = joined(read_until(s, samples(3_000)))
                assert np.array_equal(data, expected(first, len(data), len(info.channel_ids)))


def test_missed_samples_are_a_device_gap_and_sync_edges_are_events(tmp_path: Path) -> None:
    # a busy computer may open it seconds after the run began
    missed = ((180_000, 180_036), (184_000, 184_012))
    pulses = SyncPulses(period_s=0.1)
    with (
        SpikeGlxServer([probe(missed=missed, pulses=pulses)]) as server,
        source(server, stim_lines=(6,)) as s,
    ):
        info = s.open(threading.Event())
        items = read_until(s, lambda i: bool(i) and blocks_of(i)[-1].first_sample > 186_000)
        begun = server.begun_s()
    with into_ring(items, info, tmp_path / "ring") as (data, integrity, ring):
        assert gap_rows(ring) == [(a, b, "device", 8) for a, b in missed]
        first = ring.first_sample
        wanted = expected(first, len(data))
        for a, b in missed:
            wanted[a - first : b - first] = 0
        assert np.array_equal(data, wanted)
    assert s.counters["missed_samples"] == 48 and integrity.counters["gap_samples"] == 48
    rising = [e for e in events_of(items) if e.state]
    rises = [t for _, t in zip(range(2000), (t for _, t in pulses.times(begun)), strict=False)]
    samples_of = [int(np.ceil((t - begun) * FS)) for t in rises]
    assert [e.sample for e in rising] == [x for x in samples_of if first < x <= ring_end(items)]
    assert {e.line for e in rising} == {6} and {int(e.kind) for e in rising} == {2}


def ring_end(items: list[Block | StreamEvent]) -> int:
    last = blocks_of(items)[-1]
    return last.first_sample + len(last.data) - 1


def test_a_broken_connection_loses_nothing() -> None:
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        s.open(threading.Event())
        items = read_until(s, samples(30_000))
        for _ in range(3):
            server.drop_connections()
            items += read_until(s, samples(6_000))
        server.garble_next()
        items += read_until(s, samples(6_000))
    first, data = joined(items)
    assert np.array_equal(data, expected(first, len(data)))
    assert s.counters["reconnects"] >= 4 and s.counters["malformed"] == 1 and s.counters["runs"] == 1


def test_a_count_that_is_late_after_an_absence_is_no_new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is younger than its count says cannot have begun meanwhile: the server was held up."""
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        s.open(threading.Event())
        items = read_until(s, samples(60_000))
        (stream,) = server._streams.values()
        end, late = stream.end, [True]
        monkeypatch.setattr(stream, "end", lambda: end() - (15_000 if late and late.pop() else 0))
        server.drop_connections()
        time.sleep(0.6)
        items += read_until(s, samples(30_000))
    first, data = joined(items)
    assert np.array_equal(data, expected(first, len(data)))
    assert s.counters["reconnects"] >= 1 and s.counters["runs"] == 1 and not late


def test_too_late_is_one_gap_as_long_as_the_loss(tmp_path: Path) -> None:
    with SpikeGlxServer([probe()], history_s=5.0) as server, source(server) as s:
        info = s.open(threading.Event())
        items = read_until(s, samples(3_000))
        time.sleep(6.4)  # the reader stalls for longer than the server remembers
        items += read_until(s, samples(6_000))
        assert server.errors == ["FETCH: Too late."]
    with into_ring(items, info, tmp_path / "ring") as (data, _, ring):
        ((start, stop, reason, channels),) = gap_rows(ring)
        first = ring.first_sample
        wanted = expected(first, len(data))
        wanted[start - first : stop - first] = 0
        assert np.array_equal(data, wanted)
    assert (reason, channels) == ("lost", 8) and 0.3 * FS < stop - start < 60 * FS
    assert s.counters["too_late"] == 1


def test_a_new_run_is_a_reset_from_its_first_sample(tmp_path: Path) -> None:
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        info = s.open(threading.Event())
        items = read_until(s, samples(9_000))
        server.stop_run()
        assert s.read(0.5) == []
        server.start_run()
        items += read_until(s, samples(180_000))
        server.start_run()  # at once: nothing but the count tells it, until it is beyond what was read
        items += read_until(s, samples(3_000))
    blocks = blocks_of(items)
    anew = [b for b in blocks if b.new_acquisition]
    assert [b.first_sample for b in anew] == [0, 0]
    for b in blocks:
        assert np.array_equal(b.data, expected(b.first_sample, len(b.data)))
    with into_ring(items, info, tmp_path / "ring") as (data, integrity, ring):
        assert [r[2] for r in gap_rows(ring)] == ["reset", "reset"]
        assert integrity.counters["resets"] == 2 and len(data) == sum(len(b.data) for b in blocks)


def test_a_run_that_was_restarted_while_the_connection_was_away() -> None:
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        s.open(threading.Event())
        items = read_until(s, samples(30_000))
        stopped = blocks_of(items)[-1].first_sample
        server.drop_connections()
        server.start_run()
        until = time.monotonic() + 120
        while server.produced() <= stopped + 30_000 and time.monotonic() < until:
            time.sleep(0.1)  # its count is then beyond the last sample that was read
        server.drop_connections()
        assert server.produced() > stopped
        items = read_until(s, samples(3_000))
    assert blocks_of(items)[0].new_acquisition and s.counters["runs"] == 2


def test_another_rig_in_the_next_run_ends_the_stream() -> None:
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        s.open(threading.Event())
        read_until(s, samples(3_000))
        server.stop_run()
        while s.read(0.05) or s._running:
            pass
        stream = next(iter(server._streams.values()))
        stream.probe = probe(type=0)
        server.start_run()
        with pytest.raises(StreamChanged, match="start a new one"):
            read_until(s, samples(3_000))


def test_a_restarted_process_goes_on_where_the_last_one_stopped() -> None:
    with SpikeGlxServer([probe()]) as server:
        with source(server) as s:
            s.open(threading.Event())
            items = read_until(s, samples(6_000))
        time.sleep(0.3)
        with source(server) as s:
            s.open(threading.Event())
            last = blocks_of(items)[-1]
            s.seek(last.first_sample + len(last.data))
            items += read_until(s, samples(12_000))
    first, data = joined(items)
    assert np.array_equal(data, expected(first, len(data)))


@pytest.mark.parametrize(
    "text", ["FETCH: Low mem.", "FETCH: Run parameters never validated.", "anything else"]
)
def test_other_refusals_end_the_stream_with_the_servers_words(text: str) -> None:
    with SpikeGlxServer([probe()]) as server, source(server) as s:
        s.open(threading.Event())
        read_until(s, samples(1_000))
        server.refuse_next(text)
        with pytest.raises(SourceError, match=text.replace("[", r"\[")):
            read_until(s, samples(300_000))


def press_run(server: SpikeGlxServer, **options: object) -> None:
    """Opening says that nothing runs, once it has heard so: a busy server may take longer than is waited for."""
    for wait_s in (0.4, 4.0, 30.0):
        with source(server, wait_s=wait_s, **options) as s, pytest.raises(SourceError) as told:
            s.open(threading.Event())
        if "press Run" in str(told.value):
            return
    raise AssertionError(str(told.value))


def test_opening_says_what_is_missing() -> None:
    with SpikeGlxServer([probe()], running=False) as server:
        for options in ({}, {"probe_index": 3}):
            press_run(server, **options)
        server.start_run()
        for options, text in (
            ({"probe_index": 3}, "has no imec 3: it has imec 0 to 0"),
            ({"device": "nidq"}, "it acquires no nidq stream"),
        ):
            with source(server, **options) as s, pytest.raises(SourceError, match=text):
                s.open(threading.Event())
        server.never_set_up()
        press_run(server)
    (port,) = free_ports(1)
    cfg = Stream(name="p", source="spikeglx", address=f"tcp://127.0.0.1:{port}", wait_s=0.3)
    with pytest.raises(SourceError, match="command server enabled"):
        SpikeGlxSource(cfg).open(threading.Event())


def test_waits_for_a_run_that_begins_later() -> None:
    with SpikeGlxServer([probe()], running=False) as server, source(server) as s:
        threading.Timer(0.5, server.start_run).start()
        s.open(threading.Event())
        first, data = joined(read_until(s, samples(3_000)))
        assert np.array_equal(data, expected(first, len(data)))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("FETCH", 2, 0, 0), "FETCH: Requires at least 4 params."),
        (("FETCH", 2), "FETCH: Requires at least 4 params."),
        (("FETCH", 2, 4, 0, 10), "FETCH: imec stream-ip must be in range[0..0]."),
        (("FETCH", 0, 0, 0, 10), "FETCH: nidq stream not enabled."),
        (("FETCH", 1, 0, 0, 10), "FETCH: obx stream not enabled."),
        (("FETCH", 7, 0, 0, 10), "FETCH: stream-js must be in set {-2,0,1,2}."),
        (("FETCH", 2, 0, 0, 10, "0#99#"), "Channel 99 out of range [0..8]."),
        (("FETCH", 2, 0, 0, 10, "#"), "Bad channel string format."),
        (("GETSTREAMSAMPLERATE", 2), "GETSTREAMSAMPLERATE: Requires at least 2 params."),
        (("GETSTREAMACQCHANS", 2, 1), "GETSTREAMACQCHANS: imec stream-ip must be in range[0..0]."),
        (("GETSTREAMNP",), "GETSTREAMNP: Requires parameter js."),
        (("GETSTREAMNP", 5), "GETSTREAMNP: js must be in set {-2,0,1,2}."),
        (("GETGEOMMAP",), "GETGEOMMAP: Requires parameter ip."),
        (("GETGEOMMAP", 9), "GETGEOMMAP: imec stream-ip must be in range[0..0]."),
        (("DANCE",), "CmdWorker: Unknown command [DANCE]."),
    ],
)  # fmt: skip
def test_the_server_refuses_in_the_words_of_the_real_one(words: tuple[object, ...], error: str) -> None:
    with SpikeGlxServer([probe()]) as server:
        link = SpikeGlxLink(server.address)
        with pytest.raises(Refused) as e:
            link.ask(*words)
        assert e.value.text == error
        assert link.count("isrunning") == 1  # the connection goes on; commands in any case
        link.close()


def test_five_errors_in_a_row_or_silence_close_the_connection() -> None:
    with SpikeGlxServer([probe()], silence_s=6.0) as server:
        link = SpikeGlxLink(server.address)
        for _ in range(5):
            with pytest.raises(Refused):
                link.ask("DANCE")
        with pytest.raises(OSError):
            link.ask("NOOP")
        silent = SpikeGlxLink(server.address)
        silent.ask("NOOP")
        time.sleep(7.0)
        with pytest.raises(OSError):
            silent.ask("NOOP")
        link.close(), silent.close()


def test_fetch_answers_ascending_channels_and_downsamples() -> None:
    with SpikeGlxServer([probe()]) as server:
        while server.produced() < 200:
            time.sleep(0.02)
        link = SpikeGlxLink(server.address)
        data = link.fetch(2, 0, 24, 100, "5#0#5#2#", 3)
        assert np.array_equal(data, expected(24, 100)[:, [0, 2, 5]])
        assert len(link.fetch(2, 0, 10**9, 100, "0#", 1)) == 0  # not yet there: waits a little, then nothing
        with pytest.raises(WireError):  # fewer columns than were counted on
            link.fetch(2, 0, 24, 100, "0#1#", 3)
        link.close()


def test_a_server_that_others_wrote() -> None:
    """The reference, against which the vendor's own client ran."""
    fake = shared("tools/sglx_fake_server.py")
    (port,) = free_ports(1)
    server = subprocess.Popen([sys.executable, str(fake), "--port", str(port), "--seconds", "300"])
    try:
        cfg = Stream(name="p", source="spikeglx", address=f"tcp://127.0.0.1:{port}", wait_s=90.0)
        s = SpikeGlxSource(cfg)
        info = s.open(threading.Event())
        items = read_until(s, samples(9_000))
        s.close()
    finally:
        server.kill()
        server.wait()
    assert (
        info.n_channels == 384 and not info.geometry_known and info.gain_uv == (0.6 / 512 / 500 * 1e6,) * 384
    )
    first, data = joined(items)
    t, c = np.arange(first, first + len(data))[:, None], np.arange(384)[None, :]
    assert np.array_equal(data, (t * 7 + c * 13) % 1024 - 512)


def test_words_of_the_wire() -> None:
    assert request("FETCH", 2, 0, 5, 10, channel_list([3, 1]), 1) == b"FETCH 2 0 5 10 3#1# 1\n"
    with pytest.raises(ValueError):
        request("NIDOSET", "a b")
    assert gain_uv(float(f"{0.62 / 2048 / 100:g}"), 0.62, 2048) == 0.62 / 2048 / 100 * 1e6
    assert gain_uv(1e-4, 5.0, 32768) == pytest.approx(100.0)  # no whole gain: as printed
    lines = ["head_partNumber=NP2014", "head_numShanks=4", "head_shankPitch=250", "head_shankWidth=70"]
    for c, shank in enumerate((0, 3)):
        lines += [f"ch{c}_s={shank}", f"ch{c}_x=27", f"ch{c}_z={15 * c}", f"ch{c}_u={1 - c}"]
    told = geometry(lines, 2)
    assert told.positions_um == ((27.0, 0.0), (777.0, 15.0)) and told.used == (True, False)
    for bad in (lines[3:], [x.replace("=27", "=x") for x in lines], []):
        with pytest.raises(WireError):
            geometry(bad, 2)


def test_missed_samples_at_the_end_of_a_run_are_told_too(tmp_path: Path) -> None:
    with SpikeGlxServer([probe(missed=((180_000, 1_800_000),))]) as server, source(server) as s:
        info = s.open(threading.Event())
        items = read_until(s, lambda i: bool(i) and blocks_of(i)[-1].first_sample > 180_000)
        server.stop_run()
        while (got := s.read(0.3)) or s._running:
            items += got
        stopped = s._next
        server.start_run()
        items += read_until(s, lambda i: any(b.new_acquisition for b in blocks_of(i)))
    with into_ring(items, info, tmp_path / "ring") as (_, _, ring):
        rows = [r for r in gap_rows(ring) if r[2] == "device"]
        assert rows[0][0] == 180_000 and rows[-1][1] == stopped
        assert all(b[0] == a[1] for a, b in pairwise(rows))  # no sample of them untold
