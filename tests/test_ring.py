"""The ring: what is written is what is read, in order, once; lapping is told; numbering survives restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spiked.errors import Overrun, SpikedError, StreamChanged
from spiked.ring import Ring, RingReader, RingWriter, gap_mask
from spiked.stream import EventKind, Flag, StreamEvent, StreamInfo


def make_info(channels: int = 4, fs: float = 10_000.0, dtype: str = "int16") -> StreamInfo:
    return StreamInfo(
        "s", fs, tuple(map(str, range(channels))), tuple((0.0, 20.0 * c) for c in range(channels)), dtype, (1.0,) * channels
    )  # fmt: skip


@given(
    blocks=st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=30),
    reads=st.lists(st.integers(1, 200), min_size=1, max_size=20),
    reuse=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reader_gets_every_sample_once_in_order(
    tmp_path: Path, blocks: list, reads: list, reuse: bool
) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 2.0)
    writer, reader = RingWriter(ring), RingReader(Ring(tmp_path / "r"), "record", reuse)
    writer.start_at(10**12)
    sent, flags, arrivals, got, got_flags = [], [], [], [], []
    value = 0
    for i, (n, gap) in enumerate(blocks):
        data = np.arange(value, value + n * 4).astype(np.int16).reshape(n, 4)
        value += n * 4
        writer.write(data, i + 1, Flag.GAP if gap else Flag.NONE)
        sent.append(data)
        flags += [gap] * n
        arrivals += [i + 1] * n
        while (chunk := reader.read(reads[i % len(reads)])) is not None:
            assert chunk.first_sample == 10**12 + sum(map(len, got))
            got.append(chunk.data.copy())
            assert chunk.arrival_ns == arrivals[chunk.stop - 1 - 10**12]
            got_flags += [bool(chunk.flags & Flag.GAP)] * len(chunk.data)
    assert np.array_equal(np.concatenate(sent), np.concatenate(got))
    assert flags == got_flags


def test_lapped_reader_is_told_the_interval_and_goes_on(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer, reader = RingWriter(ring), RingReader(ring, "live")
    writer.start_at(500)
    for _ in range(30):
        writer.write(np.ones((1000, 4), np.int16), 1)
    with pytest.raises(Overrun) as lost:
        reader.read(100)
    assert (lost.value.start, lost.value.stop) == (500, reader.position)
    chunk = reader.read(100)
    assert chunk is not None and chunk.first_sample == lost.value.stop


def test_named_reader_resumes_where_it_declared_itself_done(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer = RingWriter(ring)
    writer.start_at(7)
    writer.write(np.arange(400, dtype=np.int16).reshape(100, 4), 1)
    first = RingReader(ring, "record")
    first.read(30)
    first.done()
    first.read(30)  # read but never declared done: a kill here must not lose it
    again = RingReader(Ring(tmp_path / "r"), "record")
    chunk = again.read(1000)
    assert chunk is not None and chunk.first_sample == 37 and len(chunk.data) == 70


def test_attaching_writer_continues_and_refuses_another_stream(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    RingWriter(ring).start_at(5)
    RingWriter(ring).write(np.zeros((10, 4), np.int16), 1)
    again = RingWriter(Ring(tmp_path / "r"), make_info())
    assert again.started and again.next_sample == 15
    with pytest.raises(StreamChanged, match="4 channels at 10000 Hz to 5 at 10000 Hz"):
        RingWriter(ring, make_info(5))


def test_gaps_and_events_come_back_as_written(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer = RingWriter(ring)
    mask = np.array([True, False, False, True])
    writer.add_gap(10, 20, "partial", mask)
    writer.add_gap(30, 40, "lost")
    writer.add_event(StreamEvent(33, EventKind.TTL, 3, 0, 8.0, "µ" * 200))
    rows, n, lost = Ring(tmp_path / "r").rows("gaps", 0)
    assert n == 2 and lost == 0
    assert np.array_equal(gap_mask(rows[0], 4), mask) and gap_mask(rows[1], 4).all()
    events, _, _ = ring.rows("events", 0)
    assert (events["sample"][0], events["line"][0], events["state"][0], events["value"][0]) == (33, 3, 0, 8.0)
    assert ring.rows("gaps", 2)[0].size == 0


def test_arrival_times_are_those_of_the_chunk_that_holds_the_sample(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer, reader = RingWriter(ring), RingReader(ring, "live")
    writer.start_at(0)
    for i in range(10):
        writer.write(np.zeros((50, 4), np.int16), 1000 + i)
    while reader.read(35) is not None:
        pass
    assert reader.arrival_ns(np.array([0, 49, 50, 499])).tolist() == [1000, 1000, 1001, 1009]


def test_a_chunk_is_overwritten_only_where_that_was_asked_for(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer = RingWriter(ring)
    writer.start_at(0)
    writer.write(np.arange(400, dtype=np.int16).reshape(100, 4), 1)
    for reuse in (False, True):
        reader = RingReader(ring, reuse=reuse)
        first, second = reader.read(40), reader.read(30)
        assert first is not None and second is not None and second.data[0, 0] == 160
        assert np.shares_memory(first.data, second.data) == reuse
        assert first.data[0, 0] == (160 if reuse else 0)


def test_samples_are_read_even_when_their_chunks_are_forgotten(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(1, fs=100_000.0), 2.0)
    writer, reader = RingWriter(ring), RingReader(ring)
    writer.start_at(0)
    kept = len(ring.tables["chunks"])
    one = np.ones((1, 1), np.int16)
    for i in range(kept + 100):
        writer.write(one, i + 1)
    assert reader.arrival_ns(np.array([0, 50, 200, kept + 99])).tolist() == [0, 0, 201, kept + 100]
    chunk = reader.read(50)
    assert chunk is not None and len(chunk.data) == 50 and chunk.arrival_ns == 0
    reader.skip_to(kept)
    chunk = reader.read(50)
    assert chunk is not None and chunk.data.all() and chunk.arrival_ns == kept + 50


def test_long_fill_waits_for_the_recorder(tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "r", make_info(), 1.0)
    writer = RingWriter(ring)
    writer.start_at(0)
    writer.write_zeros(6000, 1, Flag.GAP, wait_s=0.01)
    assert ring.committed == 6000
    reader = RingReader(ring, "record")
    chunk = reader.read(6000)
    assert chunk is not None and chunk.flags & Flag.GAP and not chunk.data.any()


def test_no_room_and_foreign_files_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0" * (2 << 20))
    with pytest.raises(SpikedError, match="not a ring of this version"):
        Ring(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"short")
    with pytest.raises(SpikedError, match="not a ring"):
        Ring(tmp_path / "y")
    with pytest.raises(SpikedError, match="no room for a ring"):
        Ring.create(tmp_path / "z", make_info(4096, 30_000.0), 1e7)
    assert not (tmp_path / "z").exists()


def test_stream_info_survives_json() -> None:
    info = make_info(3)
    assert StreamInfo.from_json(info.to_json()) == info
