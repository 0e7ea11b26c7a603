"""Kilosort4, called directly: every option of `run_kilosort` and every setting of its own table (GPL v3; Pachitariu et al. 2024).

It reads the recording where it lies (`file_object`), so there is no second copy. Facts about version 4.1.7 that shape this module: `fs` left out means 30 kHz
without a word; bad_channels are rows, not names; `invert_sign` is forgotten after drift correction, so the samples are turned over before it sees them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spiked.compiled import remember
from spiked.errors import ConfigError
from spiked.offline.session import StreamFiles
from spiked.offline.sorters import OUTPUT, Preset, Work, layout, pitch_um, rows_of, shanks
from spiked.offline.sorters.parameters import BOOL, FLOAT, INT, LIST, TEXT, Parameter, plain

NAME = "kilosort4"
WHAT = "Kilosort4 (Pachitariu et al. 2024), template matching with drift correction; wants a GPU for long recordings"
NEEDS_BINARY = False
PRESETS = {
    "auto": "the one that fits the electrodes and the computer",
    "default": "Kilosort's own settings",
    "neuropixels": "Kilosort's own settings, which were made for these probes",
    "mea": "two-dimensional arrays: no drift correction, cluster centres every 200 um, template grid of the electrodes' own pitch",
    "cpu_small": "small recordings without a GPU: no drift correction, a coarser template grid",
}
MIN_CHANNELS = 4
FROM_THE_RECORDING = ("n_chan_bin", "fs")
# A CPU spends its time comparing every sample with every universal template on the grid of possible
# positions. On a two-dimensional array of 17.5 um pitch Kilosort's own grid is finer than the electrodes.
# 64 channels, 75 s at 20 kHz, 12 neurons, one thread: Kilosort's grid and window 124 s, accuracy 0.75; this
# preset 52 s, 0.82. A smaller cluster_downsampling (10, 5, 1) gave no more accurate and many more units (111 at 1).
SMALL_CHANNELS, SMALL_S = 128, 1800.0
GRID_UM = 35.0
CENTRES_UM = 200.0  # between cluster centres on a two-dimensional array; its authors say: every few hundred
KILOSORT_DMINX = 32.0


def _options() -> tuple[Parameter, ...]:
    """The arguments of `run_kilosort` that are not settings."""
    p = Parameter
    return (
        p("do_CAR", BOOL, True, "Common average reference."),
        p("invert_sign", BOOL, False, "Turn the signal over: spikes must go down."),
        p("bad_channels", LIST, [], "Names of channels that are left out, besides those that preflight finds dead.", items=TEXT),
        p("shank_idx", LIST, None, "Sort only these shanks, one after the other; they are counted from 0, from left to right.", items=INT, least=0),
        p("probe", TEXT, None, "Probe file (probeinterface JSON) with the electrodes' positions, instead of what the recording says."),
        p("data_dtype", TEXT, "int16", "What Kilosort is given: int16, int32 for codes beyond 16 bits, float32 without rounding.", choices=("int16", "int32", "float32")),
        p("save_extra_vars", BOOL, False, "Keep the features and templates of every spike (tF, Wall, full_st, full_clu, full_amp)."),
        p("save_preprocessed_copy", BOOL, False, "Keep temp_wh.dat, whitened and drift-corrected, as large as the recording; Phy then shows its traces."),
        p("clear_cache", BOOL, False, "Give the GPU's memory back between steps; slower."),
        p("torch_thread_lim", INT, None, "Threads of torch on a CPU; default: those of the job.", least=1, most=1024),
        p("verbose_log", BOOL, False, "More in kilosort4.log."),
    )  # fmt: skip


@cache
def _module() -> Any:
    """kilosort/parameters.py of the installed package, alone: importing all of it takes ten seconds. ImportError without."""
    spec = importlib.util.find_spec("kilosort")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("kilosort is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "parameters.py"
    own = importlib.util.spec_from_file_location("spiked_kilosort_parameters", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


@cache
def parameters() -> tuple[Parameter, ...]:
    """Kilosort's own table, with its limits, and the options of `run_kilosort`."""
    told = {**_module().MAIN_PARAMETERS, **_module().EXTRA_PARAMETERS}
    return (*_options(), *(_parameter(k, v) for k, v in told.items() if k not in FROM_THE_RECORDING))


def _parameter(name: str, told: Mapping[str, Any]) -> Parameter:
    kind = {int: INT, float: FLOAT, bool: BOOL, list: LIST}[told["type"]]
    text = plain(re.split(r"\n\s*Default value:", told["description"])[0])
    default = told["default"]
    if kind == LIST:
        return Parameter(name, kind, default, text, items=FLOAT, length=len(default or ()))
    if kind == BOOL:
        return Parameter(name, kind, default, text)
    excluded = tuple(float(x) for x in told["exclude"])
    least, most = float(told["min"]), float(told["max"])
    return Parameter(name, kind, default, text, least, most, excluded, optional=name == "max_cluster_subset")


def missing(device: str) -> str:
    for package in ("torch", "kilosort"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; pip install 'spiked[offline]'"
    return ""


def choose(preset: str, device: str, stream: StreamFiles) -> Preset:
    return of_array(preset, device, stream.fs_hz, stream.positions_um, stream.duration_s)


def of_array(preset: str, device: str, fs_hz: float, positions_um: np.ndarray, duration_s: float) -> Preset:
    """The preset of that name, or for 'auto' the one that fits. `device` is 'cpu' or 'cuda...'."""
    if preset not in PRESETS:
        raise ConfigError(f"kilosort4 has no preset {preset!r}; known are {', '.join(PRESETS)}")
    kind = layout(positions_um)
    if preset == "auto":
        small = len(positions_um) <= SMALL_CHANNELS and duration_s <= SMALL_S
        preset = "cpu_small" if device == "cpu" and small else "mea" if kind == "array" else "default"
    if preset == "cpu_small":
        why = (
            f"small recording on a CPU: no drift correction, template grid of {GRID_UM:g} um, 2 ms waveforms; "
            "a GPU host uses Kilosort's own settings"
        )
        grid = {"dmin": GRID_UM, "dminx": GRID_UM, "nearest_templates": 25}
        return Preset(preset, {"nblocks": 0, "nt": window(fs_hz), **grid, **_centres(positions_um)}, why)
    slow = "; on a CPU this takes about ten times the recording's length or more" if device == "cpu" else ""
    if preset == "mea":
        pitch = pitch_um(positions_um)
        params: dict[str, Any] = {"nblocks": 0, "nt": window(fs_hz), **_centres(positions_um)}
        if pitch > KILOSORT_DMINX:
            params |= {"dminx": pitch, "max_channel_distance": pitch}
        why = (
            "two-dimensional array: it does not drift along a shank, and cluster centres are set by its width"
        )
        return Preset(preset, params, why + slow)
    return Preset(preset, {}, "Kilosort's own settings" + slow)


def _centres(positions_um: np.ndarray) -> dict[str, int]:
    """x_centers for arrays that are wide enough to need some: Kilosort's own guess is made for probes."""
    width = float(np.ptp(positions_um[:, 0]))
    wide = layout(positions_um) == "array" and width > 1.5 * CENTRES_UM
    return {"x_centers": max(round(width / CENTRES_UM), 1)} if wide else {}


def window(fs_hz: float) -> int:
    """Waveform length in samples, odd: Kilosort's 61 at 30 kHz, the same 2 ms at other rates."""
    return round(61 / 30_000 * fs_hz / 2 - 0.5) * 2 + 1


def check(params: Mapping[str, Any], stream: StreamFiles) -> None:
    """ConfigError for what only the recording shows to be wrong."""
    table = {p.name: p.default for p in parameters()}
    p = {**table, **params}

    def wrong(name: str, why: str) -> ConfigError:
        return ConfigError(f"kilosort4 parameter {name} = {p[name]!r}: {why}")

    left_out = rows_of(p["bad_channels"] or [], stream)
    kept = np.setdiff1d(np.arange(stream.n_channels), left_out)
    there = shanks(stream.positions_um)
    if p["shank_idx"]:
        for shank in p["shank_idx"]:
            if not (there[kept] == shank).any():
                raise wrong("shank_idx", f"the electrodes lie on shanks {sorted(set(there[kept].tolist()))}")
        kept = kept[np.isin(there[kept], p["shank_idx"])]
    if len(kept) < MIN_CHANNELS:
        raise wrong("bad_channels", f"{len(kept)} channels are left; Kilosort4 needs at least {MIN_CHANNELS}")
    if p["nt"] % 2 == 0:
        raise wrong("nt", f"it must be odd, {p['nt'] + 1} say")
    if not p["templates_from_data"] and p["nt"] != 61:
        raise wrong("templates_from_data", "Kilosort's own templates are 61 samples long; set nt = 61")
    if p["nt0min"] is not None and p["nt0min"] >= p["nt"]:
        raise wrong("nt0min", f"it must be below nt = {p['nt']}")
    stop = min(p["tmax"], stream.duration_s)
    if p["tmin"] >= stop:
        raise wrong("tmin", f"it must be before {stop:g} s, the end of what is sorted")
    if p["highpass_cutoff"] >= stream.fs_hz / 2:
        raise wrong("highpass_cutoff", f"it must be below half the rate, {stream.fs_hz / 2:g} Hz")
    if (stop - p["tmin"]) * stream.fs_hz <= p["batch_size"] + 4 * p["nt"]:
        raise wrong(
            "batch_size", f"{stop - p['tmin']:g} s are sorted, less than a batch; choose a smaller one"
        )


# ---- in its own process -------------------------------------------------------------------------------------------------


def run(work: Work) -> dict[str, Any]:
    """Sort, shank by shank where that was asked for."""
    from spiked.offline import reading

    invert, dtype = work.params.get("invert_sign", False), work.params.get("data_dtype", "int16")
    options, settings, probe, asked = arguments(work)
    options |= {"filename": work.stream.nwb, "data_dtype": dtype}
    with reading.opened(work.stream, dtype, -1 if invert else 1) as codes:
        if invert or dtype != "int16" or not work.recording.get("binary"):
            options["file_object"] = codes
        return _run(work, options, settings, probe, asked, work.folder / OUTPUT, codes)


def arguments(work: Work) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[int] | None]:
    """(options, settings, probe, shanks) of `run_kilosort`; also for calling it without us."""
    params, job = dict(work.params), work.recording
    shank_idx = params.pop("shank_idx", None)
    for taken in ("invert_sign", "data_dtype", "probe", "bad_channels"):
        params.pop(taken, None)
    known = {p.name for p in _options()}
    options = {k: params.pop(k) for k in list(params) if k in known}
    options["torch_thread_lim"] = options.get("torch_thread_lim") or work.threads
    n = len(job["gain_uv"])
    positions = np.asarray(job["positions_um"], np.float32)
    probe = {
        "chanMap": np.arange(n),
        "xc": positions[:, 0].copy(),
        "yc": positions[:, 1].copy(),
        "kcoords": shanks(np.asarray(job["positions_um"], float)).astype(np.float32),
        "n_chan": n,
    }
    options["bad_channels"] = list(work.left_out) or None
    return options, {**params, "n_chan_bin": n, "fs": float(job["fs_hz"])}, probe, shank_idx or None


def _run(
    work: Work,
    options: dict[str, Any],
    settings: dict[str, Any],
    probe: dict[str, Any],
    asked: list[int] | None,
    out: Path,
    codes: Any,
) -> dict[str, Any]:
    import kilosort
    import torch
    from kilosort import run_kilosort

    remember("kilosort.CCG", "compute_CCG")
    device = torch.device(work.device)
    out.mkdir(parents=True, exist_ok=True)
    one_by_one: list[int | None] = [*asked] if asked else [None]
    for shank in one_by_one:
        ops, *_ = run_kilosort(settings=dict(settings), probe=dict(probe), results_dir=out, device=device, shank_idx=shank, **options)  # fmt: skip
        _keep_drift(out if shank is None else out / f"shank_{shank}", ops)
    if asked:
        _joined(out, asked, codes, work)
    return {"version": f"kilosort {kilosort.__version__}", "shanks": asked or []}


def _keep_drift(folder: Path, ops: dict[str, Any]) -> None:
    """What the report tells of drift, in a file that can run nothing: Kilosort's own ops.npy is a pickle."""
    shift = ops.get("dshift")
    um = np.zeros((0, 0)) if shift is None else np.asarray(shift, float).reshape(len(shift), -1)
    np.savez(folder / "drift.npz", um=um, batch_size=int(ops.get("batch_size", 60_000)))


def _joined(out: Path, asked: list[int], codes: Any, work: Work) -> None:
    """The shanks' results as one folder; each keeps its own, complete one below it."""
    from spiked.offline.sorters import phy

    samples, units, amplitudes = [], [], []
    columns: dict[str, list[Any]] = {"KSLabel": [], "ContamPct": [], "shank": []}
    first = 0
    for shank in asked:
        one = out / f"shank_{shank}"
        clusters = np.load(one / "spike_clusters.npy").ravel()
        there, unit = np.unique(clusters, return_inverse=True)
        samples.append(np.load(one / "spike_times.npy").ravel())
        units.append(unit + first)
        amplitudes.append(np.load(one / "amplitudes.npy").ravel())
        for name in ("KSLabel", "ContamPct"):
            told = _column(one / f"cluster_{name}.tsv")
            columns[name] += [told[int(u)] for u in there]
        columns["shank"] += [shank] * len(there)
        first += len(there)
    every = np.concatenate(samples), np.concatenate(units)
    positions = np.asarray(work.recording["positions_um"], float)
    phy.write(
        out, *every, codes, positions, work.recording["fs_hz"], np.concatenate(amplitudes), columns=columns
    )


def _column(path: Path) -> dict[int, str]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return {int(row[0]): row[1] for row in rows}
