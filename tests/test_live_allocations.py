"""In a steady stream nothing is allocated per chunk: no array data by numpy or torch, and no memory over ten minutes."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from allocations import counted, torch_allocations
from live_rig import CALIBRATE_S, FS, Rec, recording, templates

from spiked.config import Live
from spiked.ring import Ring, RingReader, RingWriter
from spiked.stream import Chunk, Flag
from spiked_client.protocol import SPIKE

N, WARM, CHUNKS = 20, 400, 600  # samples of a chunk, chunks before counting, chunks counted
START = int(CALIBRATE_S * FS)


@pytest.fixture(scope="module")
def rec() -> Rec:
    return recording()


def chunks(rec: Rec, count: int) -> list[Chunk]:
    data = rec.codes[START : START + count * N].reshape(count, N, -1)
    return [Chunk(START + i * N, part, 0) for i, part in enumerate(data)]


def test_the_counter_counts() -> None:
    a = np.zeros(100, np.float32)
    with counted() as found:
        b = a[10:20]
        assert (found.calls, found.bytes) == (0, 0)
        kept = np.empty((3, 4)), b.copy(), np.zeros(5, np.int16)
        assert (found.calls, found.bytes) == (3, 96 + 40 + 10)
        np.add(a, a, out=a)
        assert found.calls == 3
        np.array([1, 2]).resize(50, refcheck=False)
        assert found.calls == 5
    np.empty(100)
    assert found.calls == 5
    del kept


@pytest.mark.parametrize(
    "kind", ["calibrated", "uncalibrated", "high-passed", "referenced", "electrode at a rail"]
)
def test_a_steady_stream_makes_no_arrays(rec: Rec, kind: str) -> None:
    config = Live(
        highpass_hz=300.0 if kind == "high-passed" else 0.0,
        reference="median" if kind == "referenced" else "none",
    )
    sequences = None if kind == "uncalibrated" else rec.sequences
    pipeline = rec.pipeline(config, units=sequences, scaling=rec.scaling, reuse=True)
    stream = chunks(rec, WARM + CHUNKS)
    if kind == "electrode at a rail":
        stream = [dataclasses.replace(c, data=c.data.copy()) for c in stream]
        for c in stream:
            c.data[:, 5] = 1023
    spikes = mua = 0
    for c in stream[:WARM]:
        pipeline.process(c)
    with counted() as found:
        for c in stream[WARM:]:
            before = found.calls
            result = pipeline.process(c)
            assert found.calls == before, f"{found.calls - before} arrays made for chunk {c.first_sample}"
            spikes += len(result.spikes)
            mua += len(result.mua)
    assert mua > 10
    assert spikes >= 3 or sequences is None


def test_nor_does_template_matching_but_for_drift_once_a_second(rec: Rec) -> None:
    pipeline = rec.pipeline(units=templates(), scaling=rec.scaling, reuse=True)
    stream = chunks(rec, WARM + CHUNKS)
    for c in stream[:WARM]:
        pipeline.process(c)
        pipeline.prepare()
    spikes = 0
    with counted() as found:
        for c in stream[WARM:]:
            before, second = found.calls, c.stop % FS < 20
            result = pipeline.process(c)
            pipeline.prepare()
            assert second or found.calls == before, (
                f"{found.calls - before} arrays made for chunk {c.first_sample}"
            )
            spikes += len(result.spikes)
    assert spikes >= 3


def test_a_result_of_ones_own_is_one_small_array_each(rec: Rec) -> None:
    pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling)
    stream = chunks(rec, WARM + CHUNKS)
    for c in stream[:WARM]:
        pipeline.process(c)
    kept = []
    with counted() as found:
        for c in stream[WARM:]:
            before = found.calls, found.bytes
            result = pipeline.process(c)
            kept.append(result.spikes)
            full = [a for a in (result.spikes, result.mua) if len(a)]
            made = sum(map(len, full)) * SPIKE.itemsize
            assert (found.calls - before[0], found.bytes - before[1]) == (len(full), made)
    samples = np.concatenate(kept)["sample"]
    assert len(samples) > 10 and (np.diff(samples) >= 0).all()


def test_nor_tensors(rec: Rec) -> None:
    pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling, reuse=True)
    stream = chunks(rec, WARM + 100)
    for c in stream[:WARM]:
        pipeline.process(c)
    assert torch_allocations(lambda: torch.zeros(10)) == (1, 40)
    assert torch_allocations(lambda: [pipeline.process(c) for c in stream[WARM:]]) == (0, 0)


def test_nor_does_reading_the_ring(rec: Rec, tmp_path: Path) -> None:
    ring = Ring.create(tmp_path / "ring", rec.info, 4.0)
    writer, reader = RingWriter(ring), RingReader(ring, "live", reuse=True)
    writer.start_at(START)
    reader.skip_to(START)
    for i, c in enumerate(chunks(rec, 300)):
        writer.write(c.data, i)
        with counted() as found:
            chunk = reader.read(N)
        assert chunk is not None and np.array_equal(chunk.data, c.data) and chunk.arrival_ns == i
        assert found.calls == 0 or i < 3


class Minutes:
    """A stream out of the ring through the pipeline: 20 s of codes over and over, each time with a gap and a dead electrode."""

    def __init__(self, rec: Rec, folder: Path) -> None:
        self.codes, self.n = rec.codes[START:], rec.info.samples(5)
        ring = Ring.create(folder / "ring", rec.info, 2.0)
        self.writer, self.reader = RingWriter(ring), RingReader(ring, "live", reuse=True)
        self.pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling, reuse=True)
        self.dead = np.arange(rec.info.n_channels) == 2
        self.spikes = 0

    def pass_through(self, minutes: float) -> None:
        for _ in range(round(minutes * 3)):
            at = self.reader.position
            self.pipeline.mark_missing(at + 100_000, at + 101_000, self.dead)
            for a in range(0, len(self.codes), self.n):
                self.writer.write(self.codes[a : a + self.n], a + 1, Flag.GAP if a == 200_000 else Flag.NONE)
                chunk = self.reader.read(self.n)
                assert chunk is not None
                self.spikes += len(self.pipeline.process(chunk).spikes)
            self.reader.done()


@pytest.mark.long
def test_ten_minutes_take_no_memory(rec: Rec, tmp_path: Path) -> None:
    stream, process = Minutes(rec, tmp_path), psutil.Process()
    stream.pass_through(1)
    gc.collect()
    before, found = process.memory_info().rss, stream.spikes
    stream.pass_through(9)
    gc.collect()
    assert stream.spikes > 5 * found > 500
    assert process.memory_info().rss - before < 2 << 20

    tracemalloc.start()
    try:
        stream.pass_through(1 / 3)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        stream.pass_through(2 / 3)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - held < 16 << 10
    finally:
        tracemalloc.stop()
