"""`spiked bench peer`: the published RT-Sort (SpikeLab) and ours on the same samples with the same weights.

Both calibrate on the first part of a recording with known spikes and sort the part after it. One scorer and one set
of true units for both. Speed is taken in turns: some chunks of the peer, some of ours, and so on, so that both see
the same machine. The peer runs in an environment of its own (peer_env), by a script that needs nothing of ours
(peer_run); what it has finished is kept in the folder, and the same command goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.bench import peer_env
from spiked.bench.figures import agreement
from spiked.bench.machine import conditions
from spiked.bench.peer_side import LIMITS, Peer
from spiked.bench.peer_turns import CHUNK, Ours, in_turns
from spiked.errors import ConfigError
from spiked.sources.recordings import GroundTruth, Recording, open_recording

Say = Callable[[str], None]
WARM_S, TAIL_S = (
    0.25,
    0.05,
)  # at the ends of the sorted part no spike counts: warm-up, and windows that never filled
ROUNDS = 10  # turns for every number of threads


def export(rec: Recording, path: Path, n: int) -> None:
    """The first n samples as the peer's script reads them: codes without offset (samples, channels), gain, rate, positions."""
    codes, zero = rec.read(0, n), rec.info.zero_code
    if zero != round(zero):
        codes = codes.astype(np.float32) - np.float32(zero)
    elif zero:
        codes = codes.astype(np.int32) - round(zero)
    if codes.dtype.kind in "iu":
        low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
        codes = codes.astype(np.int16 if low >= -32768 and high <= 32767 else np.float32)
    part = path.with_name("part.npz")
    np.savez(part, codes=codes, gain_uv=rec.info.gains, fs_hz=rec.info.fs_hz, positions_um=rec.info.positions)
    part.replace(path)


def _jobs(
    rec: Recording, folder: Path, weights: Path, limits: str, part: tuple[int, int], threads: int
) -> dict[str, dict[str, Any]]:
    """What the peer's script is told, per set of limits."""
    try:
        window = int(json.loads((weights / "init_dict.json").read_text(encoding="utf-8"))["sample_size"])
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(
            f"{weights} is not a folder of published weights; it must hold init_dict.json and state_dict.pt"
        ) from e
    base = {
        "recording": str(folder / "recording.npz"), "source": str(rec.path.absolute()), "weights": str(weights.absolute()), "chunk": CHUNK,
        "calibrate": [0, part[0]], "sort": list(part), "threads": threads, "neuropixels": window > 200,
    }  # fmt: skip
    names = ("default", "tight") if limits == "both" else (limits,)
    return {name: {**base, "limits": LIMITS[name]} for name in names}


def _scored(
    truth: GroundTruth, samples: np.ndarray, units: np.ndarray, start: int, stop: int, fs_hz: float
) -> dict[str, Any]:
    inside, found = (truth.samples >= start) & (truth.samples < stop), (samples >= start) & (samples < stop)
    return agreement(truth.samples[inside], truth.units[inside], samples[found], units[found], fs_hz)


def _theirs(peer: Peer, truth: GroundTruth, start: int, stop: int, fs_hz: float, say: Say) -> dict[str, Any]:
    """The package's calibration and its spikes, with one set of limits."""
    say(f"peer, {peer.folder.name} limits: calibrating (tens of minutes on a CPU; log in {peer.folder})")
    calibrated = peer.run("calibrate", "calibrate.json")
    samples = units = np.zeros(0, np.int64)
    out = {"calibration": calibrated, "units": calibrated["sequences"]}
    if calibrated["sequences"]:
        say(f"peer: {calibrated['sequences']} units in {calibrated['wall_s']} s; sorting")
        out["sort"] = peer.run("sort", "sort.json")
        with np.load(peer.folder / "spikes.npz") as z:
            samples, units = z["samples"], z["units"]
    return {
        **out,
        "calibration_wall_s": calibrated["wall_s"],
        "calibration_cpu_s": calibrated["cpu_s"],
        **_scored(truth, samples, units, start, stop, fs_hz),
    }


def bench(
    recording: Path, weights: Path, folder: Path, calibrate_s: float = 120.0, seconds: float = 60.0, limits: str = "both",
    threads: int = 1, env: Path | None = None, rounds: int = ROUNDS, say: Say = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy over the true units, seconds to calibrate, and speed in turns, of the published package and of ours."""
    folder = folder.absolute()
    machine = conditions()
    with open_recording(recording) as rec:
        fs, n_cal = rec.info.fs_hz, rec.info.samples(calibrate_s * 1000)
        stop = n_cal + rec.info.samples(seconds * 1000)
        if rec.ground_truth is None:
            raise ConfigError(f"{recording} has no known spikes; give a folder with ground_truth.npz")
        if not (calibrate_s > 0 and seconds >= 1 and stop <= rec.n_samples):
            raise ConfigError(
                f"{calibrate_s:g} s and {seconds:g} s do not fit into the {rec.n_samples / fs:g} s of {recording}"
            )
        truth = rec.ground_truth._replace(samples=rec.ground_truth.samples - rec.first_sample)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = _jobs(rec, folder, weights, limits, (n_cal, stop), threads)
        python = peer_env.python(env, say)
        peers = {name: Peer(python, folder / name, job, say) for name, job in jobs.items()}
        if not (folder / "recording.npz").exists():
            export(rec, folder / "recording.npz", stop)
        counted = n_cal + round(WARM_S * fs), stop - round(TAIL_S * fs)
        theirs: dict[str, Any] = {}
        for name, peer in peers.items():
            for other in theirs:
                peer.borrow(folder / other)
            theirs[name] = _theirs(peer, truth, *counted, fs, say)
        say("ours: calibrating and sorting the same samples with the same weights")
        ours = Ours(rec, weights, threads)
        spikes, spent = ours.calibrate_and_sort(n_cal, stop)
        mine = {**spent, **_scored(truth, spikes["sample"], spikes["unit"], *counted, fs)}
        speed = [
            {"limits": name, **in_turns(peer, ours, n_cal, stop, n, rounds, say)}
            for name, peer in [(n, p) for n, p in peers.items() if theirs[n]["units"]][:1]
            for n in sorted({1, os.cpu_count() or 1})
        ]
    return {
        "bench": "peer", "machine": machine, "load_1min_after": round(os.getloadavg()[0], 2), "recording": str(recording), "channels": rec.info.n_channels,
        "fs_hz": fs, "weights": str(weights), "calibrate_s": calibrate_s, "sorted_s": seconds, "threads": threads, "true_units": mine["true_units"],
        "peer_network_pass": "its own call pattern: one forward pass per window while calibrating, one per chunk of 100 samples online; not batched",
        "peer": theirs, "ours": mine, "speed": speed,
    }  # fmt: skip
