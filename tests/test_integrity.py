"""The integrity check: the ring holds what was sent, with zeros exactly where the list of gaps says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_rig import gap_rows, ramp, some_info

from spiked.errors import StreamChanged
from spiked.integrity import Integrity
from spiked.ring import Ring, RingWriter, gap_mask
from spiked.stream import Block, EventKind, Flag, Gap, StreamEvent

CHANNELS = 3
TMPFS = "/dev/shm" if Path("/dev/shm").is_dir() else None
FS = 1000.0


def true_samples(a: int, b: int) -> np.ndarray:
    """(b - a, channels), nowhere zero and different for neighbouring samples."""
    x = ramp(np.arange(a, b), CHANNELS)
    return np.where(x == 0, 7, x).astype(np.int16)


def block(a: int, b: int, missing: list[int] | None = None, new: bool = False) -> Block:
    data, mask = true_samples(a, b), None
    if missing is not None:
        mask = np.isin(np.arange(CHANNELS), missing)
        data[:, mask] = 0
    return Block(a, data, 1_000_000 * b, mask, new)


@contextmanager
def a_ring(seconds: float = 60.0) -> Iterator[Ring]:
    with tempfile.TemporaryDirectory(dir=TMPFS) as folder:
        ring = Ring.create(Path(folder) / "ring", some_info(CHANNELS, FS), seconds)
        try:
            yield ring
        finally:
            ring.close()


@contextmanager
def checked(seconds: float = 60.0, **options: float) -> Iterator[tuple[Integrity, Ring]]:
    with a_ring(seconds) as ring:
        yield Integrity(RingWriter(ring), wait_s=0.0, **options), ring


def events(ring: Ring) -> list[tuple[int, int, str]]:
    rows, _, _ = ring.rows("events", 0)
    return [(int(r["sample"]), int(r["kind"]), r["text"].decode()) for r in rows]


def chunk_flags(ring: Ring) -> list[tuple[int, int, int]]:
    rows, _, _ = ring.rows("chunks", 0)
    return [(int(r["first"]), int(r["count"]), int(r["flags"])) for r in rows]


def told_absent(ring: Ring) -> np.ndarray:
    """(samples, channels) bool from the list of gaps."""
    out = np.zeros((ring.committed, CHANNELS), bool)
    rows, _, _ = ring.rows("gaps", 0)
    for r in rows:
        out[r["start"] - ring.first_sample : r["stop"] - ring.first_sample, gap_mask(r, CHANNELS)] = True
    return out


@dataclass(frozen=True)
class Sending:
    """Blocks as they are sent one after the other: length, and what happens to each."""

    n: int
    fate: str  # sent, lost, partial, twice, overlap
    channel: int


SENDING = st.lists(
    st.builds(
        Sending,
        st.integers(1, 40),
        st.sampled_from(["sent", "sent", "sent", "lost", "partial", "twice", "overlap"]),
        st.integers(0, CHANNELS - 1),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(SENDING, st.integers(-(10**12), 10**12), st.data())
def test_any_loss_is_zero_and_told_and_nothing_else_is(
    sending: list[Sending], first: int, data: st.DataObject
) -> None:
    with checked() as (integrity, ring):
        at, begun = first, None
        absent: list[tuple[int, int, int | None]] = []
        received: list[Gap] = []
        end = first
        for s in sending:
            a, b = at, at + s.n
            at = b
            if s.fate == "lost":
                absent.append((a, b, None))
                continue
            begun = a if begun is None else begun
            if s.fate == "partial":
                absent.append((a, b, s.channel))
                received += integrity.accept(block(a, b, [s.channel]))
                end = b
                continue
            known = data.draw(st.integers(0, min(30, a - begun))) if s.fate == "overlap" and end == a else 0
            received += integrity.accept(block(a - known, b))
            if s.fate == "twice":
                received += integrity.accept(block(a, b))
            end = b
        if begun is None:
            assert ring.committed == 0
            return
        assert (ring.first_sample, ring.next_sample) == (begun, end)
        expected, told = true_samples(begun, end), np.zeros((end - begun, CHANNELS), bool)
        for a, b, channel in absent:
            if a >= begun and a < end:
                told[a - begun : b - begun, slice(None) if channel is None else channel] = True
        np.testing.assert_array_equal(ring.data[: ring.committed], np.where(told, 0, expected))
        np.testing.assert_array_equal(told_absent(ring), told)
        np.testing.assert_array_equal(ring.data[: ring.committed] == 0, told)
        assert [(g.start, g.stop, g.reason, g.n_channels) for g in received] == gap_rows(ring)
        assert integrity.counters["gap_samples"] == told.all(axis=1).sum()
        assert integrity.counters["resets"] == 0
        for start, count, flags in chunk_flags(ring):
            part = told[start - begun : start - begun + count]
            assert bool(flags & Flag.GAP) == part.all() and bool(flags & Flag.PARTIAL) == (
                part.any() and not part.all()
            )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(0, 10**9), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 10**9),
)
def test_numbering_goes_on_without_a_hole_over_any_restarts(
    counts: list[tuple[int, int, bool]], first: int
) -> None:
    """Each time the device counts from somewhere else: back is a reset, ahead a gap or a reset."""
    with checked(seconds=400.0, max_gap_s=20.0) as (integrity, ring):
        integrity.accept(block(first, first + 50))
        following, written, resets = first + 50, 50, 0
        for n, start, new in counts:
            ahead = start - following
            back_a_little = -250 <= ahead < 0 and not new
            if back_a_little:
                continue
            integrity.accept(Block(start, true_samples(0, n), 5, None, new))
            if ahead < 0 or ahead > 20_000:
                resets += 1
                assert ring.device_sample(ring.next_sample) == start + n
            else:
                written += ahead
            written += n
            following = start + n
        assert ring.committed == written and ring.first_sample == first
        assert integrity.counters["resets"] == resets == len(integrity.resets)
        assert [g[:3] for g in gap_rows(ring) if g[2] == "reset"] == [
            (e.sample, e.sample, "reset") for e in integrity.resets
        ]
        starts = {start for start, _, flags in chunk_flags(ring) if flags & Flag.RESET}
        assert starts == {e.sample for e in integrity.resets}
        assert events(ring) == [(e.sample, EventKind.MESSAGE, e.text) for e in integrity.resets]


def test_events_follow_the_numbering() -> None:
    def ttl(sample: int) -> StreamEvent:
        return StreamEvent(sample, EventKind.TTL, 2)

    with checked() as (integrity, ring):
        integrity.accept(ttl(1_005))  # before any block: waits
        integrity.accept(ttl(3))
        integrity.accept(block(1_000, 1_100))
        integrity.accept(ttl(1_050))
        integrity.accept(block(10, 60))  # the device restarted: 10 is 1100 now
        integrity.accept(ttl(20))
        integrity.accept(ttl(5))  # a spike told late, from just before the block
        integrity.accept(StreamEvent(1_090, EventKind.DEVICE_SPIKE))  # told later still
        integrity.finish()
        assert events(ring) == [
            (1_005, EventKind.TTL, ""),
            (1_050, EventKind.TTL, ""),
            (1_100, EventKind.MESSAGE, "counter reset device=10"),
            (1_110, EventKind.TTL, ""),
            (1_095, EventKind.TTL, ""),
            (1_090, EventKind.DEVICE_SPIKE, ""),
        ]
        assert integrity.counters["events"] == 5 and integrity.counters["events_before_start"] == 1


def test_an_event_from_before_a_reset_keeps_its_place() -> None:
    with checked() as (integrity, ring):
        integrity.accept(block(50_000, 50_100))
        integrity.accept(block(40_000, 40_100))  # a file that loops
        integrity.accept(
            StreamEvent(50_090, EventKind.DEVICE_SPIKE)
        )  # its end, told with the first block of the next round
        integrity.accept(StreamEvent(40_010, EventKind.DEVICE_SPIKE))
        assert [e[0] for e in events(ring) if e[1] == EventKind.DEVICE_SPIKE] == [50_090, 50_110]


def test_a_restarted_acquire_process_goes_on_in_the_same_ring() -> None:
    with a_ring() as ring:
        first = Integrity(RingWriter(ring), wait_s=0.0)
        first.accept(block(500, 600))
        first.accept(block(100, 200))  # reset: device 200 is sample 700 from here on
        second = Integrity(RingWriter(ring), wait_s=0.0)
        assert second.accept(block(260, 300)) == [Gap(700, 760, "restart", CHANNELS)]
        assert second.accept(block(310, 320)) == [Gap(800, 810, "lost", CHANNELS)]
        assert ring.next_sample == 820 and ring.device_sample(820) == 320
        np.testing.assert_array_equal(ring.data[260:300], true_samples(260, 300))
        flags = {start: flags for start, _, flags in chunk_flags(ring)}
        assert flags[700] == Flag.GAP | Flag.RESTART and flags[760] == Flag.RESTART and flags[810] == 0
        third = Integrity(RingWriter(ring), wait_s=0.0)
        third.accept(block(300, 330))  # a source that repeats a little
        assert ring.next_sample == 830 and third.counters["duplicate_samples"] == 20
        fourth = Integrity(RingWriter(ring), wait_s=0.0)
        fourth.accept(block(5, 15))  # the device was restarted meanwhile
        assert gap_rows(ring)[-1][:3] == (830, 830, "reset") and ring.device_sample(830) == 5
        assert chunk_flags(ring)[-1][2] == Flag.RESET | Flag.RESTART


def test_a_file_that_loops_within_a_quarter_second_is_not_taken_for_repetition_for_ever() -> None:
    with checked() as (integrity, ring):
        for _ in range(20):
            for a in range(0, 100, 10):
                integrity.accept(block(a, a + 10))
        assert integrity.counters["resets"] >= 2 and ring.committed >= 400


def test_whole_block_missing_is_a_gap_of_all_channels() -> None:
    with checked() as (integrity, ring):
        integrity.accept(block(0, 10))
        assert integrity.accept(block(10, 20, [0, 1, 2])) == [Gap(10, 20, "lost", CHANNELS)]
        assert chunk_flags(ring)[-1] == (10, 10, Flag.GAP) and integrity.counters["gap_samples"] == 10
        assert integrity.accept(block(20, 30, [])) == [] and integrity.accept(block(30, 30)) == []


def test_a_gap_longer_than_the_ring_is_filled(caplog: pytest.LogCaptureFixture) -> None:
    with checked(seconds=2.0) as (integrity, ring):
        integrity.accept(block(0, 100))
        assert integrity.accept(block(50_100, 50_200)) == [Gap(100, 50_100, "lost", CHANNELS)]
        assert ring.committed == 50_200
        at = np.arange(48_500, 50_200) % ring.capacity
        assert not ring.data[at[:-100]].any()
        np.testing.assert_array_equal(ring.data[at[-100:]], true_samples(50_100, 50_200))
    assert "gap of 50000 samples at 100 (lost)" in caplog.text


def test_another_stream_is_refused_by_the_ring() -> None:
    with (
        a_ring() as ring,
        pytest.raises(StreamChanged, match="changed from 3 channels at 1000 Hz to 4 at 1000 Hz"),
    ):
        RingWriter(ring, some_info(4, FS))
