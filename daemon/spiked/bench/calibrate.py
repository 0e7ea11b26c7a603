"""`spiked bench calibrate`: how long it takes to have units, from a recording on disk.

The first part of the recording passes through the pipeline in large chunks, as offline, and is then calibrated
on. The rest, where there is one, is left alone.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spiked.bench.machine import conditions
from spiked.bench.passes import feed, find_units
from spiked.config import Live
from spiked.errors import ConfigError
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline
from spiked.live.process import load_network, pick_device
from spiked.live.taken import Taken
from spiked.sources.recordings import open_recording

LARGE_MS = 100.0


def bench(
    recording: Path, seconds: float, network: str = "auto", threads: int = 1, device: str = "cpu", sequences_out: Path | None = None,
    say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Wall and CPU seconds of the network pass and of the calibration proper, units found, most memory used (RSS)."""
    device = pick_device(device)
    torch.set_num_threads(threads)
    machine = conditions()
    with open_recording(recording) as rec:
        info = rec.info
        n, step = info.samples(seconds * 1000), max(1, info.samples(LARGE_MS))
        if not 0 < n <= rec.n_samples:
            raise ConfigError(
                f"--seconds {seconds:g} must be between 0 and the recording's {rec.n_samples / info.fs_hz:g}"
            )
        net = load_network(network, info.fs_hz, device, info.n_channels, threads)
        taken = Taken(info.n_channels, n)
        pipeline = LivePipeline(info, net, Live(threads=threads), device=device, tap=taken.add)
        pipeline.warm_up()
        wall, cpu = time.perf_counter(), time.process_time()
        feed(pipeline, rec, 0, n, step, Latency())
        pass_s, pass_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    say(f"{seconds:g} s passed through {net.name} in {pass_s:.1f} s; calibrating")
    wall, cpu = time.perf_counter(), time.process_time()
    sequences = find_units(pipeline, taken)
    calibration_s, calibration_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    if sequences_out is not None:
        sequences.save(sequences_out)
    return {
        "bench": "calibrate", "machine": machine, "load_1min_after": round(os.getloadavg()[0], 2), "recording": str(recording),
        "channels": info.n_channels, "fs_hz": info.fs_hz, "network": net.name, "network_sha256": net.sha256, "device": device, "threads": threads,
        "seconds": seconds, "chunk_ms": LARGE_MS, "pass_s": round(pass_s, 2), "pass_cpu_s": round(pass_cpu_s, 2),
        "pass_real_time_factor": round(seconds / pass_s, 3), "calibration_s": round(calibration_s, 2), "calibration_cpu_s": round(calibration_cpu_s, 2),
        "total_s": round(pass_s + calibration_s, 2), "seconds_per_second": round((pass_s + calibration_s) / seconds, 4), "units": len(sequences),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip
