"""`spiked bench network`: what the streaming network costs, by number of channels and length of chunk.

The input is noise of the level that the network expects, and on request known cells over it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spiked.bench.figures import spread
from spiked.bench.machine import conditions
from spiked.detect.detector import IQR_OF_SD
from spiked.errors import ConfigError, SpikedError
from spiked.live.process import pick_device
from spiked_models import networks, synthesis
from spiked_models.networks import DetectionNetwork, NetworkError
from spiked_models.streaming import StreamingNetwork

INPUT_S, SIDE = 2.0, 8  # the input repeats after this; cells lie under arrays of SIDE x SIDE electrodes
WARM_CHUNKS, LEAST_CHUNKS = 10, 30


def macs(network: DetectionNetwork) -> int:
    """Multiply-adds for one sample of one channel when nothing is computed twice."""
    return network.macs


def noise_input(
    network: DetectionNetwork, n_channels: int, n: int, spikes: bool, seed: int = 0
) -> np.ndarray:
    """(channels, n) float32 as the network gets it: noise at the level it was trained on, with cells on request."""
    if spikes:
        grid = synthesis.hdmea_grid(SIDE, SIDE)
        parts = []
        for k in range(-(-n_channels // len(grid))):
            made = synthesis.synthesize(grid, network.fs_hz, n / network.fs_hz, len(grid) // 4, seed + k)
            x = made.microvolts().T[:, :n]
            parts.append((x - x.mean(1, keepdims=True)) / made.noise_sd_uv[:, None])
        noise = np.concatenate(parts)[:n_channels]
    else:
        noise = np.random.default_rng(seed).standard_normal((n_channels, n))
    level = network.inference_scaling_numerator / IQR_OF_SD * network.input_scale
    return np.ascontiguousarray(noise * level, np.float32)


def measure(
    network: DetectionNetwork, n_channels: int, n_chunk: int, device: str, seconds: float, spikes: bool, precision: str, threads: int
) -> dict[str, Any]:  # fmt: skip
    """Chunks of `n_chunk` samples, one after the other, for `seconds` of wall time and at least 30 of them."""
    stream = StreamingNetwork(network, n_channels, device, precision=precision, threads=threads)
    length = max(1, round(INPUT_S * network.fs_hz / n_chunk)) * n_chunk
    x = torch.from_numpy(noise_input(network, n_channels, length, spikes))
    chunks = [c.contiguous() for c in x.split(n_chunk, dim=1)]
    for i in range(WARM_CHUNKS):
        stream.process(chunks[i % len(chunks)]).cpu()
    wall, cpu, i = [], time.process_time(), 0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or i < LEAST_CHUNKS:
        begun = time.perf_counter()
        stream.process(chunks[i % len(chunks)]).cpu()
        wall.append(time.perf_counter() - begun)
        i += 1
    cpu_ms = (time.process_time() - cpu) / i * 1e3
    ms, chunk_ms = spread(np.array(wall) * 1e3), n_chunk * 1e3 / network.fs_hz
    return {
        "channels": n_channels, "chunk_ms": round(chunk_ms, 4), "chunk_samples": n_chunk, "compute_ms": ms, "cpu_ms": round(cpu_ms, 4),
        "real_time_factor": round(chunk_ms * i / 1e3 / sum(wall), 3),
        "precision": stream.precision, "gmac_per_s": round(macs(network) * n_channels * n_chunk * i / sum(wall) / 1e9, 2),
    }  # fmt: skip


def bench(
    network: str, channels: Sequence[int] = (16, 64, 256, 1024), chunks_ms: Sequence[float] = (1.0, 5.0), threads: int = 1,
    device: str = "cpu", seconds: float = 2.0, spikes: bool = False, precision: str = "auto",
    say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Time per chunk and real-time factor for every number of channels and every length of chunk."""
    if min(channels) < 1 or min(chunks_ms) <= 0 or seconds <= 0:
        raise ConfigError("--channels, --chunk-ms and --seconds must be above 0")
    device, machine = pick_device(device), conditions()
    torch.set_num_threads(threads)
    rows = []
    try:
        net = networks.load(network, device)
        for n in channels:
            for ms in chunks_ms:
                rows.append(
                    measure(
                        net,
                        n,
                        max(1, round(ms * net.fs_hz / 1e3)),
                        device,
                        seconds,
                        spikes,
                        precision,
                        threads,
                    )
                )
                say(
                    f"{n} channels, {ms:g} ms: {rows[-1]['compute_ms']['p50']} ms, {rows[-1]['real_time_factor']} x real time"
                )
    except NetworkError as e:
        raise SpikedError(str(e)) from e
    return {
        "bench": "network", "machine": machine, "load_1min_after": round(os.getloadavg()[0], 2), "network": net.name, "network_sha256": net.sha256,
        "fs_hz": net.fs_hz, "kernels": list(net.kernels), "width": net.width, "lookahead_ms": round(net.lookahead * 1e3 / net.fs_hz, 3),
        "mac_per_sample_and_channel": macs(net), "device": device, "threads": threads, "precision": precision,
        "input": "noise and cells" if spikes else "noise", "rows": rows,
    }  # fmt: skip
