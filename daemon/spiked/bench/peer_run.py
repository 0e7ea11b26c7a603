"""What runs in the peer's own environment: the published RT-Sort (SpikeLab) on one exported recording.

    python peer_run.py calibrate|sort|blocks FOLDER

This file imports nothing of spiked, because the peer's environment does not have it. FOLDER holds job.json
(recording, weights, first and last sample of both parts, chunk, overrides of detect_sequences, threads) and gets
the results. The package cannot run on a CPU as it is; what is set right from outside is listed in NOTES. Its
detection pass and its online call keep their own pattern: one forward pass per window, and per chunk.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NOTES = (
    "weights are loaded onto the CPU: init_dict.json asks for cuda and the loader has no map_location",
    "float32 instead of float16, which a CPU convolves far slower",
    "the final sorter is built on the CPU: the package builds it on cuda whatever device is asked for",
    "the detection pass is a loop of ours over the same windows, medians and single forward passes, so that it can go on after an interruption; its last, shorter window is scaled once, not twice",
    "names and arguments that newer versions of SpikeInterface dropped are put back",
)
# the package's steps, and where the result of those that take long is kept
STEPS = {
    "save_traces": "scaled_traces.npy", "form_all_clusters": "formed.pickle", "setup_coc_clusters_parallel": "set_up.pickle",
    "reassign_spikes_to_clusters": "reassigned.pickle", "intra_merge": "", "inter_merge": "",
}  # fmt: skip
TELL_S, SAVE_S = 10.0, 60.0
log = logging.getLogger("peer")


def cpu_s() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def write(path: Path, data: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1), encoding="utf-8")
    part.replace(path)


class Stages:
    """Wall and CPU seconds of the package's own steps, kept over interruptions; a step inside another counts as part of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.depth = path, 0
        self.seconds: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, wall: float, cpu: float) -> None:
        was = self.seconds.get(name, {"wall_s": 0.0, "cpu_s": 0.0})
        self.seconds[name] = {"wall_s": round(was["wall_s"] + wall, 2), "cpu_s": round(was["cpu_s"] + cpu, 2)}
        write(self.path, dict(self.seconds))

    def timed(self, name: str, step: Callable[..., Any], kept: Path | None) -> Callable[..., Any]:
        """`step`, timed where it is not part of another; what it returned lies in `kept` and is not found twice."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return step(*args, **kwargs)
            if kept is not None and name in self.seconds and kept.exists():
                log.info("%s: kept from an earlier run", name)
                return pickle.loads(kept.read_bytes()) if kept.suffix == ".pickle" else kept
            log.info("%s", name)
            wall, cpu = time.perf_counter(), cpu_s()
            self.depth += 1
            try:
                found = step(*args, **kwargs)
            finally:
                self.depth -= 1
            if kept is not None and kept.suffix == ".pickle":
                kept.write_bytes(pickle.dumps(found))
            self.add(name, time.perf_counter() - wall, cpu_s() - cpu)
            return found

        return run


def package() -> tuple[Any, Any]:
    """The package's two modules, with what the present SpikeInterface no longer has."""
    core, extractors = (importlib.import_module(f"spikeinterface.{m}") for m in ("core", "extractors"))
    for name in ("MaxwellRecordingExtractor", "NwbRecordingExtractor", "NumpySorting"):
        if not hasattr(extractors, name):
            setattr(extractors, name, getattr(core, name, None) or type(name, (), {}))
    root = "spikelab.spike_sorting.rt_sort"
    algorithm, model = importlib.import_module(f"{root}._algorithm"), importlib.import_module(f"{root}.model")
    build = algorithm.RTSort.__init__

    def on_cpu(self: Any, sequences: Any, model: Any, params: Any, buffer_size: int = 100, **_: Any) -> None:
        build(self, sequences, model, params, buffer_size, "cpu", torch.float32)

    algorithm.RTSort.__init__ = on_cpu
    return algorithm, model


def load_model(module: Any, folder: Path) -> Any:
    """The published weights, on the CPU in float32."""
    told = {**json.loads((folder / "init_dict.json").read_text()), "device": "cpu"}
    model = module.ModelSpikeSorter(**told, dtype=torch.float32)
    model.load_state_dict(torch.load(folder / "state_dict.pt", map_location="cpu", weights_only=True))
    model.path = folder
    return model


class Job:
    """job.json, and the samples it is about."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.folder, self.inter = folder, folder / "inter"
        self.inter.mkdir(exist_ok=True)
        self.weights, self.limits = Path(told["weights"]), dict(told["limits"])
        self.calibrate, self.sort = tuple(told["calibrate"]), tuple(told["sort"])
        self.chunk, self.threads, self.neuropixels = told["chunk"], told["threads"], told["neuropixels"]
        with np.load(told["recording"]) as z:
            self.codes, self.gain = z["codes"], z["gain_uv"].astype(np.float32)
            self.fs_hz, self.positions = float(z["fs_hz"]), z["positions_um"]
        torch.set_num_threads(self.threads)

    def microvolts(self, start: int, stop: int) -> np.ndarray:
        """(samples, channels) float32."""
        return self.codes[start:stop].astype(np.float32) * self.gain

    def recording(self) -> Any:
        """The calibration part as SpikeInterface has it."""
        core, pi = importlib.import_module("spikeinterface.core"), importlib.import_module("probeinterface")

        class Microvolts(core.NumpyRecording):  # type: ignore[name-defined]
            def get_traces(self, *args: Any, return_scaled: bool | None = None, **kwargs: Any) -> Any:
                return super().get_traces(*args, **kwargs)

        made = Microvolts([self.microvolts(*self.calibrate)], self.fs_hz)
        probe = pi.Probe(ndim=2, si_units="um")
        probe.set_contacts(self.positions, shapes="circle", shape_params={"radius": 4.0})
        probe.set_device_channel_indices(np.arange(len(self.positions)))
        return made.set_probe(probe) or made


class Pass:
    """The detection pass: every window of the calibration part through the network, one at a time."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    @torch.no_grad()
    def __call__(
        self, _recording: Any, model: Any, scaled: Path, traces: Path, outputs: Path, numerator: float | None, noise_frames: int,
        *_rest: Any,
    ) -> None:  # fmt: skip
        if outputs.exists() and traces.exists():
            return
        x = np.load(scaled, mmap_mode="r")
        n, size, hop = x.shape[1], model.sample_size, model.num_output_locs
        scale = model.input_scale
        if numerator is not None:
            low, high = np.percentile(x[:, :noise_frames].astype(np.float32), (25, 75), axis=1)
            scale *= numerator / float(np.median(high - low))
        width = n - model.buffer_front_sample - model.buffer_end_sample
        parts = [
            (traces.with_suffix(".part"), x.shape, traces),
            (outputs.with_suffix(".part"), (len(x), width), outputs),
        ]
        progress = scaled.with_name("pass.json")
        done = json.loads(progress.read_text())["windows"] if progress.exists() else 0
        mode: Any = "r+" if done else "w+"
        t, o = (np.lib.format.open_memmap(part, mode, np.float16, shape) for part, shape, _ in parts)
        starts = [*range(0, n - size + 1, hop)]
        rest = n - (starts[-1] + size)
        wall, cpu = time.perf_counter(), cpu_s()
        for k in range(done, len(starts)):
            at = starts[k]
            t[:, at : at + size], o[:, at : at + hop] = self._window(model, x[:, at : at + size], scale)
            if time.perf_counter() - wall > TELL_S or k + 1 == len(starts):
                t.flush()
                o.flush()
                self.stages.add("run_detection_model", time.perf_counter() - wall, cpu_s() - cpu)
                wall, cpu = time.perf_counter(), cpu_s()
                write(progress, {"windows": k + 1})
                log.info("network pass: window %d of %d", k + 1, len(starts))
        if rest > 0:
            last_x, last_y = self._window(model, x[:, n - size :], scale)
            t[:, n - rest :], o[:, width - rest :] = last_x[:, -rest:], last_y[:, -rest:]
        for part, _, whole in parts:
            part.replace(whole)

    @staticmethod
    def _window(model: Any, window: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        x = torch.from_numpy(window.astype(np.float32))
        x = x - x.median(dim=1, keepdim=True).values
        return x.numpy(), model.model.conv(x[:, None] * scale)[:, 0].numpy()


def calibrate(job: Job) -> None:
    """detect_sequences on the calibration part; goes on where an interrupted run stopped. Writes calibrate.json."""
    algorithm, models = package()
    model, stages = load_model(models, job.weights), Stages(job.folder / "stages.json")
    for name, file in STEPS.items():
        setattr(
            algorithm, name, stages.timed(name, getattr(algorithm, name), job.inter / file if file else None)
        )
    algorithm.run_detection_model = Pass(stages)
    params = {**(algorithm.neuropixels_params if job.neuropixels else {}), **job.limits}
    found = algorithm.detect_sequences(
        job.recording(), job.inter, model, device="cpu", num_processes=job.threads, **params
    )
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = {
        "sequences": 0 if found is None else int(found.num_seqs), "stages": stages.seconds, "peak_rss_gb": round(peak / 1e6, 2),
        "wall_s": round(sum(s["wall_s"] for s in stages.seconds.values()), 1), "cpu_s": round(sum(s["cpu_s"] for s in stages.seconds.values()), 1),
        "processes": job.threads, "notes": list(NOTES), "versions": _versions(),
    }  # fmt: skip
    write(job.folder / "calibrate.json", result)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("spikelab", "spikeinterface", "torch", "numpy", "scikit-learn")}


class Online:
    """The package's online sorter, fed chunk after chunk."""

    def __init__(self, job: Job) -> None:
        _, models = package()
        self.job = job
        self.network = load_model(models, job.weights).model.conv
        with open(job.inter / "rt_sort.pickle", "rb") as f:
            self.sorter = pickle.load(f)
        self.sorter.model = self.network
        self.x = job.microvolts(*job.sort)
        self.chunks = len(self.x) // job.chunk
        self.at = 0

    def step(self) -> list[tuple[int, float]]:
        """(sequence, ms from the start of the sorted part) of every spike that the next chunk brings."""
        first = self.at * self.job.chunk
        found: list[tuple[int, float]] = self.sorter.running_sort(self.x[first : first + self.job.chunk])
        self.at += 1
        return found

    def state(self) -> Any:
        self.sorter.model = None
        kept = pickle.dumps(self.sorter)
        self.sorter.model = self.network
        return kept

    def restore(self, kept: bytes, at: int) -> None:
        self.sorter, self.at = pickle.loads(kept), at
        self.sorter.model = self.network


def sort(job: Job) -> None:
    """Online over the part after calibration, as fast as it goes. Writes spikes.npz and sort.json."""
    online, kept = Online(job), job.folder / "sort.pickle"
    found: list[tuple[int, float]] = []
    ms: list[float] = []
    wall = cpu = 0.0
    if kept.exists():
        at, found, ms, wall, cpu, state = pickle.loads(kept.read_bytes())
        online.restore(state, at)
    khz = round(job.fs_hz / 1000)  # the package counts in whole kHz
    begun, cpu_begun, told, saved = time.perf_counter(), cpu_s(), 0.0, time.perf_counter()
    with torch.no_grad():
        while online.at < online.chunks:
            t = time.perf_counter()
            found += online.step()
            now = time.perf_counter()
            ms.append((now - t) * 1e3)
            if now - told > TELL_S:
                told = now
                log.info("sorting: chunk %d of %d, %d spikes", online.at, online.chunks, len(found))
            if now - saved > SAVE_S:
                saved = now
                spent = wall + now - begun, cpu + cpu_s() - cpu_begun
                kept.write_bytes(pickle.dumps((online.at, found, ms, *spent, online.state())))
    units = np.array([q for q, _ in found], np.int64)
    samples = np.array([round(t * khz) for _, t in found], np.int64) + job.sort[0]
    np.savez(job.folder / "spikes.npz", samples=samples, units=units, chunk_ms=np.array(ms))
    spent = wall + time.perf_counter() - begun, cpu + cpu_s() - cpu_begun
    write(
        job.folder / "sort.json",
        {
            "spikes": len(found),
            "chunks": online.chunks,
            "wall_s": round(spent[0], 1),
            "cpu_s": round(spent[1], 1),
        },
    )


def blocks(job: Job) -> None:
    """Chunks on request: each line of stdin is a JSON map (chunks, threads, grad), each line of stdout one (ms, cpu_s)."""
    online = Online(job)
    with torch.no_grad():
        for _ in range(20):  # the package's noise estimate needs 50 ms
            online.step()
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        if online.at + asked["chunks"] > online.chunks:
            online.at = 0
        ms, cpu = [], cpu_s()
        with torch.set_grad_enabled(asked["grad"]):
            for _ in range(asked["chunks"]):
                t = time.perf_counter()
                online.step()
                ms.append(round((time.perf_counter() - t) * 1e3, 4))
        sys.stdout.write(json.dumps({"ms": ms, "cpu_s": cpu_s() - cpu}) + "\n")
        sys.stdout.flush()


def main(argv: list[str]) -> int:
    tasks = {"calibrate": calibrate, "sort": sort, "blocks": blocks}
    if len(argv) != 2 or argv[0] not in tasks:
        sys.stderr.write("usage: peer_run.py calibrate|sort|blocks FOLDER\n")
        return 2
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    warnings.filterwarnings("ignore")
    log.info("%s, load %.2f", argv[0], os.getloadavg()[0])
    tasks[argv[0]](Job(Path(argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
