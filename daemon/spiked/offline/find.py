"""The process in which units are found for templates: `python -m spiked.offline.find JOB.json`.

spiked.templates.find writes the job (int16 binary, rate, gains, positions, sorter, folder) and reads what is left beside it:
found.npz, or failed.txt with the reason. Progress goes to stderr, as lines of ours or as the sorters' own bars.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Slay
from spiked.errors import OfflineError, SpikedError
from spiked.offline import analyze, failures, labels, merges, presets, slay_network, sort
from spiked.offline.si_recording import recording_of
from spiked.offline.sorters import kilosort4
from spiked.priority import PR_SET_PDEATHSIG
from spiked.templates.find import FAILED, FOUND, INSTEAD

PARAMS: dict[str, dict[str, Any]] = {  # besides each sorter's own
    "lupin": {"seed": 0, "save_array": False},
    "tridesclous2": {"seed": 0, "save_array": False},
    "spykingcircus2": {"apply_motion_correction": False},
}
TIMEOUT_S = 24 * 3600.0  # whoever wants it sooner cancels the calibration

Spikes = tuple[np.ndarray, np.ndarray, dict[str, str]]
Say = Callable[[float, str], None]


def tell(fraction: float, text: str) -> None:
    sys.stderr.write(f"progress {fraction:.3f} {text}\n")
    sys.stderr.flush()


def make_ready() -> None:
    """Before SpikeInterface is imported: what it compiles is kept, and what it draws is always the same.

    It compiles its kernels anew in every process, which takes longer than sorting two minutes of 64 channels, and forgets its seed in
    places: the same samples gave 5 units or 6.
    """
    import numba

    numba.jit = functools.partial(numba.jit, cache=True)
    drawn = np.random.default_rng
    np.random.default_rng = lambda seed=None: drawn(0 if seed is None else seed)


def by_spikeinterface(job: dict[str, Any]) -> Spikes:
    """(samples, units, source) of one of SpikeInterface's own sorters."""
    make_ready()
    import spikeinterface as si
    import spikeinterface.sorters as ss

    name = job["sorter"]
    si.set_global_job_kwargs(n_jobs=1, progress_bar=True)
    params = PARAMS[name]
    try:
        sorting = ss.run_sorter(
            name, recording_of(job), folder=job["folder"], remove_existing_folder=True, verbose=True, **params
        )
    except Exception as e:
        raise _failure(name, str(e)) from e
    spikes = sorting.to_spike_vector()
    ids = np.arange(len(sorting.unit_ids))
    source = {"version": _version("spikeinterface"), "params": json.dumps(params)}
    return spikes["sample_index"].astype(np.int64), ids[spikes["unit_index"]], source


def by_kilosort(job: dict[str, Any]) -> Spikes:
    """(samples, units, source) of Kilosort4, labelled and merged as after a session."""
    n, fs_hz, folder = int(job["n_samples"]), float(job["fs_hz"]), Path(job["folder"])
    device = presets.resolve_device(job["device"])
    params = kilosort4.of_array(
        "auto", device, fs_hz, np.asarray(job["positions_um"], float), n / fs_hz
    ).params
    inner = {
        **job,
        "folder": str(folder / "kilosort4"),
        "params": params,
        "threads": 1,
        "memory_gb": 0.0,
        "parent": os.getpid(),
    }
    sort.run(inner, device, TIMEOUT_S, lambda f, text: tell(0.85 * f, text))
    found = sort.read(folder / "kilosort4")
    source = {"version": _version("kilosort"), "params": json.dumps(params)}
    make_ready()
    samples, units, merged = curated(job, found, folder, lambda f, text: tell(0.85 + 0.15 * f, text))
    return samples, units, source | merged


def curated(job: dict[str, Any], found: dict[str, Any], folder: Path, say: Say) -> Spikes:
    """Kilosort's units without noise and multi-units, pieces of one neuron merged; and what was done, as text."""
    n, fs_hz, positions = int(job["n_samples"]), float(job["fs_hz"]), np.asarray(job["positions_um"])
    samples, units = found["samples"], found["units"]
    whole = (samples >= 0) & (samples < n)
    whole[whole] = labels.without_echoes(samples[whole], units[whole], fs_hz)
    samples, units = samples[whole], units[whole]
    if not len(samples):
        return samples, units, {}
    analyzer = analyze.build(
        recording_of(job), samples, units, folder / "analyzer", lambda f, text: say(0.6 * f, text)
    )
    rows = labels.label_units(
        samples, units, analyze.shapes(analyzer, positions), found["ks_label"], found["contamination"], n, fs_hz, len(positions)
    )  # fmt: skip
    kept = [r.unit for r in rows if r.label in labels.KEPT]
    told = f"{len(kept)} of {len(rows)} units kept"
    if not kept:
        return samples[:0], units[:0], {"curation": told}
    subset = analyze.only(analyzer, kept)
    wish, store = Slay(), slay_network.Store(folder)
    proposed = merges.propose(
        subset, wish, n / fs_hz, store, job["device"], lambda f, text: say(0.6 + 0.3 * f, text)
    )
    merged = merges.merged_analyzer(
        subset, proposed["groups"], folder / "merged", wish.censor_ms, int(units.max()) + 1
    )[0]
    trains = merges.trains(merged)
    told += f", {len(proposed['groups'])} merges by {proposed['method']}"
    return trains.samples, trains.ids[trains.index], {"curation": told}


def _failure(sorter: str, trace: str) -> OfflineError:
    """One line of what a sorter raised."""
    cause = failures.classify(trace)
    kind, meaning = (cause.kind, f"{cause.meaning}; {cause.remedy}") if cause else ("environment", "")
    lines = [
        line.strip()
        for line in trace.splitlines()
        if line.strip() and not line.startswith("Spike sorting failed")
    ]
    last = lines[-1][:160] if lines else "no reason given"
    instead = "" if kind == "biology" else f"; or {INSTEAD}"
    return OfflineError(
        f"{sorter} failed: {f'{meaning} ({last})' if meaning else last}{instead}", kind, "sort"
    )


def _version(package: str) -> str:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{package} {metadata.version(package)}"
    return package


def main(path: str) -> int:
    """Run the job; 0 with found.npz, else failed.txt."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(
        PR_SET_PDEATHSIG, signal.SIGTERM
    )  # a cancelled calibration is over
    if os.getppid() != parent:
        return 1
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    beside = Path(path).parent
    try:
        samples, units, source = (by_kilosort if job["sorter"] == "kilosort4" else by_spikeinterface)(job)
    except SpikedError as e:
        (beside / FAILED).write_text(str(e), encoding="utf-8")
        return e.exit_code
    np.savez(
        beside / FOUND, sample=samples, unit=units, source=json.dumps({"sorter": job["sorter"], **source})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
