"""`spiked bench sort`: the live pipeline over a recording folder, chunk by chunk as it would arrive.

The first `calibrate_s` seconds pass through the pipeline and calibrate it; the rest is sorted with the units
found and scored against the ground truth of that part, where the folder has one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiked.bench.machine import conditions
from spiked.config import Live
from spiked.errors import ConfigError
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline
from spiked.live.process import load_network, pick_device
from spiked.offline.truth import score
from spiked.sort.calibrate import calibrate
from spiked.sources.recordings import Recording, open_recording
from spiked.stream import Chunk
from spiked_client.protocol import SPIKE

WINDOW_MS = 0.4


class _Taken:
    """The calibration part's cleaned samples and logits, as the pipeline hands them over."""

    def __init__(self, n_channels: int, n: int) -> None:
        self.x = np.zeros((n_channels, n), np.float16)
        self.logits = np.full((n_channels, n), -60000.0, np.float16)
        self.filled, self.first = 0, 0

    def add(self, found: Any) -> None:
        n = min(found.x.shape[1], self.x.shape[1] - self.filled)
        if n <= 0:
            return
        if self.filled == 0:
            self.first = found.first_sample
        at = slice(self.filled, self.filled + n)
        self.x[:, at] = found.x[:, :n]
        self.logits[:, at] = np.where(found.valid[:, :n], found.logits[:, :n], -60000.0)
        self.filled += n


def _feed(
    pipeline: LivePipeline, rec: Recording, start: int, stop: int, step: int, times: Latency
) -> list[np.ndarray]:
    """Run [start, stop) through the pipeline in chunks of `step`; sorted spikes."""
    out = []
    for big in range(start, stop, step * 1000):
        data = rec.read(big, min(big + step * 1000, stop))
        for a in range(0, len(data), step):
            part = data[a : a + step]
            t = time.perf_counter()
            result = pipeline.process(Chunk(big + a, part, 0))
            times.add(np.array([(time.perf_counter() - t) * 1e3]))
            if len(result.spikes):
                out.append(result.spikes)
    return out


def bench(
    recording: Path, calibrate_s: float, network: str = "auto", chunk_ms: float = 1.0, device: str = "cpu", sorter: str = "rt_sort",
    spikes_out: Path | None = None, sequences_out: Path | None = None, threads: int = 1, duration_s: float | None = None,
    say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, recall and precision per true unit (window 0.4 ms), chunk times, real-time factor."""
    device = pick_device(device)
    torch.set_num_threads(threads)
    with open_recording(recording) as rec:
        info = rec.info
        total = rec.n_samples if duration_s is None else min(rec.n_samples, round(duration_s * info.fs_hz))
        n_cal, step = info.samples(calibrate_s * 1000), max(1, info.samples(chunk_ms))
        if not 0 < n_cal < total:
            raise ConfigError(
                f"--calibrate-s {calibrate_s:g} leaves nothing to sort of {total / info.fs_hz:g} s; give less"
            )
        net = load_network(network, info.fs_hz, device, info.n_channels, threads)
        taken = _Taken(info.n_channels, n_cal)
        pipeline = LivePipeline(info, net, Live(chunk_ms=chunk_ms), device=device, tap=taken.add)
        warm, sorting = Latency(), Latency()
        t0 = time.perf_counter()
        _feed(pipeline, rec, 0, n_cal, step, warm)
        t1 = time.perf_counter()
        say(f"passed {calibrate_s:g} s through the pipeline in {t1 - t0:.1f} s; calibrating")
        sequences = calibrate(
            taken.x[:, : taken.filled], taken.logits[:, : taken.filled], None, info.fs_hz, info.positions, None,
            pipeline.stringent, pipeline.loose, first_sample=taken.first, channel_ids=info.channel_ids,
            network={"name": net.name, "sha256": net.sha256}, inference_scaling=pipeline.scaling,
        )  # fmt: skip
        t2 = time.perf_counter()
        say(f"calibrated in {t2 - t1:.1f} s: {len(sequences)} units")
        pipeline.tap = None
        pipeline.swap(sequences)
        found = _feed(pipeline, rec, n_cal, total, step, sorting)
        t3 = time.perf_counter()
        found.append(pipeline.flush())
        spikes = np.concatenate([np.zeros(0, SPIKE), *found])
        spikes = spikes[np.argsort(spikes["sample"], kind="stable")]
        if sequences_out is not None:
            sequences.save(sequences_out)
        if spikes_out is not None:
            np.savez(
                spikes_out,
                samples=spikes["sample"],
                units=spikes["unit"],
                channels=spikes["channel"],
                amplitudes_uv=spikes["amplitude_uv"],
            )
        seconds = (total - n_cal) / info.fs_hz
        result: dict[str, Any] = {
            "bench": "sort", "machine": conditions(), "recording": str(recording), "channels": info.n_channels, "fs_hz": info.fs_hz,
            "network": net.name, "network_sha256": net.sha256, "device": device, "threads": threads, "sorter": sorter, "chunk_ms": chunk_ms,
            "calibrate_s": calibrate_s, "sorted_s": seconds, "calibration_pass_s": round(t1 - t0, 2), "calibration_s": round(t2 - t1, 2),
            "units": len(sequences), "spikes": len(spikes), "chunk_compute_ms": sorting.summary(),
            "real_time_factor": round(seconds / (t3 - t2), 3), "sort_s": round(t3 - t2, 2),
        }  # fmt: skip
        result.update(_scored(rec, spikes, n_cal, total))
    say(
        json.dumps(
            {k: result[k] for k in ("units", "spikes", "real_time_factor", "chunk_compute_ms") if k in result}
        )
    )
    if "mean_accuracy" in result:
        say(
            f"mean accuracy {result['mean_accuracy']:.3f} over {result['true_units']} true units, {result['units_at_0.8']} at 0.8 or more"
        )
    return result


def _scored(rec: Recording, spikes: np.ndarray, start: int, stop: int) -> dict[str, Any]:
    if rec.ground_truth is None:
        return {}
    samples, units = rec.ground_truth[:2]
    inside = (samples >= start) & (samples < stop)
    per_unit = score(
        samples[inside], units[inside], spikes["sample"], spikes["unit"], rec.info.fs_hz, WINDOW_MS
    )
    accuracy = np.array([u["accuracy"] for u in per_unit.values()])
    return {
        "match_window_ms": WINDOW_MS, "true_units": len(accuracy), "mean_accuracy": float(accuracy.mean()) if len(accuracy) else None,
        "mean_recall": float(np.mean([u["recall"] for u in per_unit.values()])) if len(accuracy) else None,
        "mean_precision": float(np.mean([u["precision"] for u in per_unit.values()])) if len(accuracy) else None,
        "units_at_0.8": int((accuracy >= 0.8).sum()), "units_at_0.5": int((accuracy >= 0.5).sum()),
        "per_unit": {str(k): v for k, v in per_unit.items()},
    }  # fmt: skip
