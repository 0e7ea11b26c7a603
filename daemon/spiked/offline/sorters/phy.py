"""A folder that Phy, SpikeInterface and everything after the sorter read, for sorters that only say who fired when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spiked.sources.formats.recording import Plain

BEFORE_MS, AFTER_MS = 1.0, 2.0
AVERAGED = 100  # spikes of a unit, at most


def write(
    folder: Path,
    samples: np.ndarray,
    units: np.ndarray,
    codes: Any,
    positions_um: np.ndarray,
    fs_hz: float,
    amplitudes: np.ndarray | None = None,
    columns: dict[str, list[Any]] | None = None,
) -> np.ndarray:
    """Write spikes (any order, any labels); units are numbered from 0 there: returns (units,) their labels.

    `codes` is sliced as (samples, channels); the templates are means of it, less each channel's median, in codes.
    `columns`: {name: value per unit} become cluster_NAME.tsv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = np.argsort(samples, kind="stable")
    labels, unit = np.unique(np.asarray(units)[order], return_inverse=True)
    at = np.asarray(samples, np.int64)[order]
    templates = mean_waveforms(codes, at, unit, len(labels), fs_hz)
    height = np.abs(templates).max((1, 2)) if len(labels) else np.zeros(0)
    own = height[unit] if amplitudes is None else np.abs(np.asarray(amplitudes, float)[order])
    n = len(positions_um)
    arrays = {
        "spike_times": at,
        "spike_clusters": unit.astype(np.int32),
        "spike_templates": unit.astype(np.int32),
        "amplitudes": own.astype(np.float64),
        "templates": templates,
        "templates_ind": np.tile(np.arange(n), (len(labels), 1)),
        "similar_templates": _similarity(templates),
        "channel_map": np.arange(n, dtype=np.int32),
        "channel_positions": np.asarray(positions_um, np.float64),
        "whitening_mat": np.eye(n),
        "whitening_mat_inv": np.eye(n),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    table(folder, "group", ["unsorted"] * len(labels))
    for name, values in (columns or {}).items():
        table(folder, name, values)
    params_py(folder, n, fs_hz)
    return labels


def table(folder: Path, name: str, values: list[Any]) -> None:
    """cluster_NAME.tsv with one row per unit."""
    rows = "".join(f"{k}\t{v}\n" for k, v in enumerate(values))
    (folder / f"cluster_{name}.tsv").write_text(f"cluster_id\t{name}\n{rows}", encoding="utf-8")


def params_py(folder: Path, n_channels: int, fs_hz: float, plain: Plain | None = None) -> None:
    """What Phy opens. Without a file of plain samples it shows everything but traces."""
    path, offset = ("no_path.bin", 0) if plain is None else (str(plain.path.resolve()), plain.offset)
    n = n_channels if plain is None else plain.n_columns
    (folder / "params.py").write_text(
        f"dat_path = {path!r}\nn_channels_dat = {n}\noffset = {offset}\nsample_rate = {fs_hz}\n"
        "dtype = 'int16'\nhp_filtered = False\n",
        encoding="utf-8",
    )


def show_traces(output: Path, plain: Plain, fs_hz: float) -> None:
    """Point Phy, in `output` and the shanks' folders below it, to the recording's own file."""
    for params in (*output.glob("params.py"), *output.glob("*/params.py")):
        if (params.parent / "temp_wh.dat").is_file():
            continue  # preprocessed traces, which were asked for
        rows = params.parent / "channel_map.npy"
        mapped = plain.columns[np.load(rows).ravel()].astype(np.int32)
        np.save(rows, mapped)
        params_py(params.parent, plain.n_columns, fs_hz, plain)


def mean_waveforms(codes: Any, at: np.ndarray, unit: np.ndarray, n_units: int, fs_hz: float) -> np.ndarray:
    """(units, samples, channels) float32, from up to AVERAGED spikes of each, spread over the recording."""
    n_samples, n_channels = codes.shape
    before, after = round(BEFORE_MS * fs_hz / 1000), round(AFTER_MS * fs_hz / 1000)
    total = np.zeros((n_units, before + after, n_channels), np.float64)
    inside = np.flatnonzero((at >= before) & (at < n_samples - after))
    chosen = []
    for u in range(n_units):
        mine = inside[unit[inside] == u]
        chosen.append(mine[np.unique(np.linspace(0, len(mine) - 1, min(len(mine), AVERAGED)).astype(int))])
    counts = np.array([max(len(c), 1) for c in chosen])
    # in the order of the file, in one read per stretch of neighbours
    for k in np.sort(np.concatenate([*chosen, np.zeros(0, np.int64)]).astype(np.int64)):
        x = np.asarray(codes[int(at[k]) - before : int(at[k]) + after], np.float32)
        total[unit[k]] += x - np.median(x, 0)
    return (total / counts[:, None, None]).astype(np.float32)


def _similarity(templates: np.ndarray) -> np.ndarray:
    """(units, units) cosine of the templates."""
    flat = templates.reshape(len(templates), -1)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = flat / np.maximum(norm, 1e-9)
    return (flat @ flat.T).astype(np.float32)
