"""The simulated devices: pace, ends, what they report, and full-rate streams without a missing sample."""

from __future__ import annotations

import multiprocessing as mp
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from source_rig import blocks_of, collect, into_ring, noise_codes, opened, sends, serving, some_info

from spiked.errors import SourceError
from spiked.sources import simulate
from spiked.sources.simulate import (
    Cycle,
    Faults,
    MaxwellWire,
    OpenEphysWire,
    Sent,
    Stored,
    Synthetic,
    make_wire,
    serve,
)
from spiked.stream import StreamInfo


def small(wire: str, n: int = 20_000, channels: int = 4) -> tuple[StreamInfo, np.ndarray]:
    if wire == "openephys":
        return some_info(channels, 10_000.0), noise_codes(n, channels)
    codes = (noise_codes(n, channels) + 512).clip(0, 1023).astype(np.uint16)
    return some_info(channels, 10_000.0, "uint16", 6.29, zero_code=512.0), codes


@pytest.mark.parametrize("wire", ["openephys", "maxwell"])
def test_paced_by_the_clock_and_told_on_the_way(wire: str, tmp_path: Path) -> None:
    info, codes = small(wire)
    told: list[int] = []
    begun = time.monotonic()
    with (
        serving(
            Cycle(info, codes),
            make_wire(wire, Cycle(info, codes)),
            duration_s=5.0,
            on_progress=lambda s: told.append(s.samples),
            schedule=tmp_path / "schedule.npy",
        ) as (address, report),
        opened(wire, address, fs_hz=10_000.0) as (source, _),
    ):
        items = collect(source)
        sent = report()
    assert sent.samples == 50_000 == sum(len(b.data) for b in blocks_of(items))
    assert sent.seconds > 4.9 and time.monotonic() - begun > 5.0
    stop, at_ns = np.load(tmp_path / "schedule.npy").T
    late_s = (at_ns - sent.started_ns) / 1e9 - stop / 10_000
    assert late_s.min() > -0.001 and np.median(late_s) < 0.1 + sent.most_behind_s
    assert told[-1] == 50_000 and len(told) >= 3 and sorted(told) == told
    assert 0 < sent.cpu_s < sent.seconds


def test_a_late_sender_catches_up() -> None:
    info, codes = small("openephys")
    signal = Cycle(info, codes)
    with (
        serving(
            signal, OpenEphysWire(info, True), duration_s=2.0, faults=Faults(silence=((5_000, 0.7),))
        ) as (address, report),
        opened("openephys", address) as (source, _),
    ):
        items = collect(source)
        sent = report()
    assert sent.most_behind_s > 0.5 and sent.seconds < 2.5 + sent.most_behind_s
    assert sum(len(b.data) for b in blocks_of(items)) == 20_000


def test_nobody_listens_port_taken_told_to_stop() -> None:
    info, codes = small("maxwell")
    signal = Cycle(info, codes)
    with pytest.raises(SourceError, match=r"nobody subscribed to tcp://127.0.0.1:.* within 0.2 s"):
        serve(signal, make_wire("maxwell", signal), wait_for_subscriber_s=0.2)
    with zmq.Context() as context, context.socket(zmq.PUB) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(SourceError, match=r"cannot serve on .* choose another port"):
            serve(signal, make_wire("maxwell", signal), f"tcp://127.0.0.1:{port}")
    with pytest.raises(SourceError, match="4 channels do not fit 3 columns"):
        make_wire("maxwell", signal, n_columns=3)
    stop = threading.Event()
    sent = serve(
        signal, make_wire("maxwell", signal), wait_for_subscriber_s=None, stop=stop, linger_s=0.0,
        on_progress=lambda _: stop.set(),
    )  # fmt: skip
    assert 0 < sent.samples <= sent.seconds * 10_000


def test_what_reached_nobody_is_dropped_at_the_high_water_mark() -> None:
    """The publisher with a limit, a subscriber that does not read: only what queues hold arrives."""
    info, codes = small("maxwell", 2_000, 256)
    signal = Cycle(info, codes)
    with (
        serving(signal, MaxwellWire(info, True), speed=0, duration_s=12.0, send_hwm=10) as (address, report),
        opened("maxwell", address, fs_hz=10_000.0, queue_mb=1) as (source, _),
    ):
        sent = report()
        items = collect(source)
    arrived = sum(len(b.data) for b in blocks_of(items))
    assert arrived + source.counters["lost_messages"] <= sent.samples == 120_000
    assert arrived < 119_000


class InMemory:
    """As the file readers are: info, n_samples, read."""

    def __init__(self, info: StreamInfo, codes: np.ndarray) -> None:
        self.info, self.codes, self.n_samples = info, codes, len(codes)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.codes[start:stop].copy()


@pytest.mark.parametrize("wire", ["openephys", "maxwell"])
def test_a_recording_is_served_as_it_is_and_loops_when_told(wire: str, tmp_path: Path) -> None:
    info, codes = small(wire, 7_777)
    signal = Stored(InMemory(info, codes), loop=True)
    with (
        serving(signal, make_wire(wire, signal), speed=5, duration_s=2.0) as (address, report),
        opened(wire, address, fs_hz=10_000.0) as (source, found),
    ):
        items = collect(source)
        report()
    with into_ring(items, found, tmp_path / "ring") as (data, _, _):
        np.testing.assert_array_equal(data[:, :4], np.concatenate([codes] * 3)[:20_000])


def test_synthetic_cells_bit_for_bit(tmp_path: Path) -> None:
    from spiked_models.synthesis import hdmea_grid, synthesize

    def made() -> Any:
        return synthesize(hdmea_grid(4, 4), fs_hz=20_000, duration_s=2.0, n_units=3, seed=5)

    signal = Synthetic(made(), "cells")
    with (
        serving(signal, OpenEphysWire(signal.info, False), speed=2, first_sample=9) as (address, report),
        opened("openephys", address) as (source, found),
    ):
        items = collect(source)
        sent = report()
    rec = made()
    with into_ring(items, found, tmp_path / "ring") as (data, _, ring):
        assert (ring.first_sample, len(data)) == (9, sent.samples) == (9, 40_000)
        centred = rec.codes.astype(np.int32) - rec.zero_code
        np.testing.assert_array_equal(data, centred)
        assert found.gain_uv[0] == pytest.approx(rec.lsb_uv, rel=1e-6)


def full_rate(wire: str) -> Cycle:
    """A second of noise at the full rate of the device."""
    if wire == "openephys":
        info = some_info(384, 30_000.0)
        return Cycle(info, noise_codes(696 * 43, 384))
    info = some_info(1024, 20_000.0, "uint16", 6.29, zero_code=512.0)
    return Cycle(info, (noise_codes(20_000, 1024, spread=20) + 512).clip(0, 1023).astype(np.uint16))


def serve_full_rate(wire: str, seconds: float, results: Any) -> None:
    signal = full_rate(wire)
    results.put(serve(signal, make_wire(wire, signal), on_address=results.put, duration_s=seconds))


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["openephys", "maxwell"])
def test_full_rate_without_a_missing_sample(wire: str, tmp_path: Path) -> None:
    """384 channels at 30 kHz, 1024 at 20 kHz, from another process."""
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=serve_full_rate, args=(wire, 2.0, results))
    process.start()
    try:
        address = results.get(timeout=200)
        sends(process, address)
        with opened(wire, address) as (source, found):
            items = collect(source, idle_s=2.0)
        sent: Sent = results.get(timeout=200)
    finally:
        process.join(60)
    codes = full_rate(wire).codes
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, _):
        assert integrity.counters["gaps"] == integrity.counters["partial_blocks"] == 0
        assert len(data) == sent.samples == round(2 * found.fs_hz)
        for a in range(0, len(data), len(codes)):
            part = data[a : a + len(codes), : codes.shape[1]]
            np.testing.assert_array_equal(part, codes[: len(part)])


class Subscriptions:
    """An XPUB socket. Whoever waits for it is held up, for longer than a reader has, and somebody comes meanwhile."""

    def __init__(self, *told: bytes) -> None:
        self.told, self.held_up = list(told), False

    def poll(self, ms: int) -> bool:
        if ms:
            time.sleep(0.3)
            self.held_up = True
        return bool(self.told) and self.held_up

    def recv(self) -> bytes:
        return self.told.pop(0)


def test_a_reader_that_came_or_went_while_the_simulator_was_held_up_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else nobody is there, or the recording is served to one that only looked."""
    readers = simulate._Readers(Subscriptions(b"\1"))
    readers.wait("tcp://x", 0.1, threading.Event())
    with pytest.raises(SourceError, match="nobody subscribed"):
        simulate._Readers(Subscriptions()).wait("tcp://x", 0.1, threading.Event())
    readers._socket.told.append(b"\0")
    monkeypatch.setattr(simulate, "LOOK_S", 0.1)

    def blocks(_n: int) -> Iterator[np.ndarray]:
        time.sleep(0.3)
        yield np.zeros((10, 4), np.uint16)

    signal: Any = SimpleNamespace(info=SimpleNamespace(fs_hz=1000.0), blocks=blocks)
    nothing: Any = None
    server = simulate._Server(
        nothing, signal, nothing, 0, simulate.Faults(), (), threading.Event(), readers=readers
    )
    server.run(10, None, 1.0, None, None)
    assert server.looked_at and server.sent.samples == 0
