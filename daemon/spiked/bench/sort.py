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

from spiked.bench.figures import WINDOW_MS, agreement
from spiked.bench.machine import conditions
from spiked.bench.passes import feed, find_matching, find_units
from spiked.config import Live
from spiked.errors import ConfigError
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline, Units
from spiked.live.process import load_network, pick_device
from spiked.live.taken import Taken
from spiked.sources.recordings import Recording, open_recording
from spiked.templates.library import Templates
from spiked_client.protocol import SPIKE


def bench(
    recording: Path, calibrate_s: float, network: str = "auto", chunk_ms: float = 1.0, device: str = "cpu", sorter: str = "rt_sort",
    spikes_out: Path | None = None, sequences_out: Path | None = None, threads: int = 1, duration_s: float | None = None,
    templates_from: str = "auto",
    say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, recall and precision per true unit (window 0.4 ms), chunk times, real-time factor."""
    device = pick_device(device)
    torch.set_num_threads(threads)
    machine = conditions()
    with open_recording(recording) as rec:
        info = rec.info
        total = rec.n_samples if duration_s is None else min(rec.n_samples, round(duration_s * info.fs_hz))
        n_cal, step = info.samples(calibrate_s * 1000), max(1, info.samples(chunk_ms))
        if not 0 < n_cal < total:
            raise ConfigError(
                f"--calibrate-s {calibrate_s:g} leaves nothing to sort of {total / info.fs_hz:g} s; give less"
            )
        net = load_network(network, info.fs_hz, device, info.n_channels, threads)
        taken = Taken(info.n_channels, n_cal)
        pipeline = LivePipeline(
            info, net, Live(chunk_ms=chunk_ms, threads=threads), device=device, tap=taken.add
        )
        warm, sorting = Latency(), Latency()
        t0 = time.perf_counter()
        feed(pipeline, rec, 0, n_cal, step, warm)
        t1 = time.perf_counter()
        say(f"passed {calibrate_s:g} s through the pipeline in {t1 - t0:.1f} s; calibrating")
        units: Units
        if sorter == "templates":
            units = find_matching(pipeline, taken, templates_from, network)
        else:
            units = find_units(pipeline, taken)
        t2 = time.perf_counter()
        say(f"calibrated in {t2 - t1:.1f} s: {len(units)} units")
        pipeline.tap = None
        pipeline.swap(units)
        found = feed(pipeline, rec, n_cal, total, step, sorting)
        t3 = time.perf_counter()
        found.append(pipeline.flush())
        spikes = np.concatenate([np.zeros(0, SPIKE), *found])
        spikes = spikes[np.argsort(spikes["sample"], kind="stable")]
        if sequences_out is not None:
            units.save(sequences_out)
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
            "bench": "sort", "machine": machine, "recording": str(recording), "channels": info.n_channels, "fs_hz": info.fs_hz,
            "network": net.name, "network_sha256": net.sha256, "device": device, "threads": threads, "sorter": sorter, "chunk_ms": chunk_ms,
            "calibrate_s": calibrate_s, "sorted_s": seconds, "calibration_pass_s": round(t1 - t0, 2), "calibration_s": round(t2 - t1, 2),
            "units": len(units), "spikes": len(spikes), "chunk_compute_ms": sorting.summary(),
            "real_time_factor": round(seconds / (t3 - t2), 3), "sort_s": round(t3 - t2, 2),
        }  # fmt: skip
        if isinstance(units, Templates):
            result |= {"templates_from": units.source.get("sorter"), "expected": units.expected}
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
        n = result["isolated_reported"]
        say(f"isolated true spikes reported not at all, once, more often: {n['0']}, {n['1']}, {n['2+']}")
    return result


def _scored(rec: Recording, spikes: np.ndarray, start: int, stop: int) -> dict[str, Any]:
    if rec.ground_truth is None:
        return {}
    samples, units = rec.ground_truth[:2]
    inside = (samples >= start) & (samples < stop)
    known = samples[inside]
    scores = agreement(known, units[inside], spikes["sample"], spikes["unit"], rec.info.fs_hz)
    return {**scores, **reports(known, spikes["sample"], rec.info.fs_hz)}


def reports(true_samples: np.ndarray, samples: np.ndarray, fs_hz: float) -> dict[str, Any]:
    """How many spikes, of whichever units, are reported within 0.4 ms of an isolated true spike, as fractions.

    Isolated: no other known spike of any unit within 1.6 ms. Cells that the recording does not list count as doubles.
    """
    window = round(WINDOW_MS * fs_hz / 1000)
    true, found = np.sort(true_samples), np.sort(samples)

    def count(of: np.ndarray, reach: int) -> np.ndarray:
        return np.searchsorted(of, true + reach, "right") - np.searchsorted(of, true - reach, "left")

    told = count(found, window)[count(true, 4 * window) == 1]
    shares = {"0": told == 0, "1": told == 1, "2+": told > 1}
    return {
        "isolated_true_spikes": len(told),
        "isolated_reported": {k: round(float(v.mean()), 4) if len(told) else None for k, v in shares.items()},
    }
