"""Our pipeline with the peer's weights, and the speed of both, taken in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiked.bench.figures import spread
from spiked.bench.passes import feed, find_units
from spiked.bench.peer_side import Blocks, Peer
from spiked.config import Live
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline
from spiked.live.process import load_network
from spiked.live.taken import Taken
from spiked.sort.sequences import Sequences
from spiked.sources.recordings import Recording
from spiked.stream import Chunk
from spiked_client.protocol import SPIKE

Timed = tuple[list[float], float]  # ms of every chunk, CPU seconds of them all
CHUNK = 100  # samples: what the package's online call is made for
PEER_CHUNKS, OUR_CHUNKS = 20, 60  # of CHUNK samples, in one turn


class Ours:
    """Our pipeline with the peer's weights."""

    def __init__(self, rec: Recording, weights: Path, threads: int) -> None:
        self.rec, self.info, self.threads = rec, rec.info, threads
        self.network = load_network(str(weights), rec.info.fs_hz, "cpu", rec.info.n_channels, threads)
        self.sequences: Sequences | None = None
        self.scaling: float | None = None

    def _pipeline(self, threads: int) -> LivePipeline:
        torch.set_num_threads(threads)
        live = Live(threads=threads, device="cpu")
        return LivePipeline(self.info, self.network, live, self.sequences, scaling=self.scaling)

    def precision(self) -> str:
        """What our network is computed in."""
        return str(self._pipeline(self.threads).detector.stream.precision)

    def calibrate_and_sort(self, n_cal: int, stop: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Calibrate on [0, n_cal), sort [n_cal, stop); SPIKE records and what it took."""
        pipeline, taken = self._pipeline(self.threads), Taken(self.info.n_channels, n_cal)
        pipeline.tap = taken.add
        pipeline.warm_up()
        wall, cpu = time.perf_counter(), time.process_time()
        feed(pipeline, self.rec, 0, n_cal, self.info.samples(100.0), Latency())
        passed = time.perf_counter() - wall
        self.sequences = find_units(pipeline, taken)
        spent = time.perf_counter() - wall, time.process_time() - cpu
        pipeline.tap, self.scaling = None, pipeline.scaling
        pipeline.swap(self.sequences)
        begun = time.perf_counter()
        found = feed(pipeline, self.rec, n_cal, stop, CHUNK, Latency())
        sorted_s = time.perf_counter() - begun
        spikes = np.concatenate([np.zeros(0, SPIKE), *found, pipeline.flush()])
        return spikes, {
            "units": len(self.sequences), "calibration_wall_s": round(spent[0], 2), "calibration_cpu_s": round(spent[1], 2),
            "network_pass_wall_s": round(passed, 2), "sort_wall_s": round(sorted_s, 2),
        }  # fmt: skip

    def stepper(self, threads: int, chunk: int, start: int, stop: int) -> Callable[[int], Timed]:
        """Chunks on request, over and over [start, stop): count -> (ms of every chunk, CPU seconds of them all)."""
        pipeline, data = self._pipeline(threads), self.rec.read(start, stop)
        state = {"at": 0, "sample": start}

        def step(chunks: int) -> Timed:
            torch.set_num_threads(threads)
            ms, cpu = [], time.process_time()
            for _ in range(chunks):
                part = data[state["at"] : state["at"] + chunk]
                begun = time.perf_counter()
                pipeline.process(Chunk(state["sample"], part, 0))
                ms.append((time.perf_counter() - begun) * 1e3)
                state["sample"] += chunk
                state["at"] = state["at"] + chunk if state["at"] + 2 * chunk <= len(data) else 0
            return ms, time.process_time() - cpu

        step(max(20, round(0.3 * self.info.fs_hz / chunk)))
        return step


def in_turns(
    peer: Peer, ours: Ours, start: int, stop: int, threads: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time per chunk of the peer's own call, as packaged and without gradients, and of ours, block after block."""
    fs = ours.info.fs_hz
    small = ours.info.samples(1.0)
    with Blocks(peer) as theirs:
        kinds: dict[str, tuple[int, Callable[[], Timed]]] = {
            "peer, as packaged": (CHUNK, partial(theirs, PEER_CHUNKS, threads, True)),
            "peer, without gradients": (CHUNK, partial(theirs, PEER_CHUNKS, threads, False)),
        }
        for name, chunk in (("ours, the same chunk", CHUNK), ("ours, 1 ms", small)):
            step = ours.stepper(threads, chunk, start, stop)
            kinds[name] = (chunk, partial(step, OUR_CHUNKS * CHUNK // chunk))
        ms: dict[str, list[float]] = {name: [] for name in kinds}
        cpu = dict.fromkeys(kinds, 0.0)
        for k in range(rounds):
            for name, (_, block) in kinds.items():
                some, used = block()
                ms[name] += some
                cpu[name] += used
            say(f"  {threads} thread(s), turn {k + 1} of {rounds}")
    out: dict[str, Any] = {
        "threads": threads,
        "precision": ours.precision(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    for name, (chunk, _) in kinds.items():
        chunk_ms = chunk * 1e3 / fs
        out[name] = {
            "chunk_samples": chunk, "chunk_ms": round(chunk_ms, 4), "compute_ms": spread(np.array(ms[name])),
            "cpu_ms": round(cpu[name] * 1e3 / len(ms[name]), 4), "real_time_factor": round(chunk_ms / float(np.mean(ms[name])), 4),
        }  # fmt: skip
    ours_same, ours_small = out["ours, the same chunk"], out["ours, 1 ms"]
    theirs_all = [out[k] for k in kinds if k.startswith("peer")]  # the better of the two counts
    best = max(x["real_time_factor"] for x in theirs_all)
    p50 = min(x["compute_ms"]["p50"] for x in theirs_all)
    out["ratio_same_chunk"] = round(ours_same["real_time_factor"] / best, 2)
    out["ratio_1_ms"] = round(ours_small["real_time_factor"] / best, 2)
    out["ratio_same_chunk_p50"] = round(p50 / ours_same["compute_ms"]["p50"], 2)
    out["ratio_same_chunk_cpu"] = round(min(x["cpu_ms"] for x in theirs_all) / ours_same["cpu_ms"], 2)
    return out
