"""Plain arrays: a simulated recording's folder, or one .dat / .raw / .bin / .npy file whose layout is told.

A folder holds traces.npy (time x channels), probe.json and params.json, and where the spikes are known
ground_truth.npz. A single file takes the same keys from a .json of its name beside it, or from the caller:
sampling_frequency, n_channels, dtype, lsb_uv, zero_code, code_min, code_max, probe.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.openephys import load_npy
from spiked.sources.formats.recording import (
    Choice,
    GroundTruth,
    Plain,
    Recording,
    codes_dtype,
    event_table,
    plain,
)
from spiked.sources.probe import load_probe
from spiked.stream import EventKind, StreamInfo

SUFFIXES = (".dat", ".raw", ".bin", ".npy")
DTYPES = ("int16", "uint16", "float32")


class ArrayRecording(Recording):
    """A memory-mapped (samples, channels) array with its description."""

    def __init__(self, path: Path, words: np.ndarray, told: dict[str, Any], choice: Choice) -> None:
        self._words = words
        n = words.shape[1]
        positions, known = choice.positions(n)
        try:
            gain = float(told["lsb_uv"])
            info = StreamInfo(
                name=(path.parent if path.name == "traces.npy" else path.with_suffix("")).name,
                fs_hz=choice.rate(_number(told, "sampling_frequency"), path),
                channel_ids=tuple(str(c) for c in range(n)),
                positions_um=positions,
                dtype=codes_dtype(words.dtype),
                gain_uv=(gain,) * n,
                zero_code=float(told.get("zero_code") or 0.0),
                code_min=_number(told, "code_min"),
                code_max=_number(told, "code_max"),
                geometry_known=known,
                source="array",
            )
        except (TypeError, ValueError) as e:
            raise ConfigError(
                f"the description of {path} has a value that is not a number ({e}); correct it"
            ) from e
        super().__init__(path, info, len(words), int(told.get("first_sample") or 0))
        self._on_close.append(self._let_go)

    def _let_go(self) -> None:
        self._words = self._words[:0].copy()

    @property
    def plain(self) -> Plain | None:
        return plain(self._words, np.arange(self.info.n_channels))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._words[start:stop]


def _number(told: dict[str, Any], key: str) -> float | None:
    return None if told.get(key) is None else float(told[key])


def open_folder(path: Path, choice: Choice) -> ArrayRecording:
    """A simulated recording's folder."""
    for name in ("params.json", "probe.json"):
        if not (path / name).exists():
            raise RecordingError(f"{path} has traces.npy but no {name}; copy the whole folder")
    told = _description(path / "params.json")
    words = _npy(path / "traces.npy", told.get("n_channels"))
    if told.get("n_samples") is not None and int(told["n_samples"]) != len(words):
        raise RecordingError(
            f"{path}: {len(words)} samples but params.json says {told['n_samples']}; copy the folder again"
        )
    _require(path / "params.json", told, "sampling_frequency", "lsb_uv")
    rec = ArrayRecording(
        path / "traces.npy", words, told, choice._replace(probe=choice.probe or path / "probe.json")
    )
    if (path / "ground_truth.npz").exists():
        _add_truth(rec, path / "ground_truth.npz")
    return rec


def open_array(path: Path, choice: Choice) -> ArrayRecording:
    """A single array file; what the .json beside it and the caller do not say is asked for."""
    beside = next((p for p in (path.with_suffix(".json"), Path(f"{path}.json")) if p.exists()), None)
    told = _description(beside) if beside else {}
    named = {
        "sampling_frequency": choice.fs_hz,
        "n_channels": choice.n_channels,
        "dtype": choice.dtype,
        "lsb_uv": choice.gain_uv,
        "zero_code": choice.zero_code,
    }
    told |= {k: v for k, v in named.items() if v is not None}
    probe = choice.probe or (path.parent / str(told["probe"]) if told.get("probe") else None)
    if probe is None:
        raise ConfigError(f"{path} does not say where its channels are; give a probe file")
    if path.suffix == ".npy":
        _require(path, told, "sampling_frequency", "lsb_uv")
        words = _npy(path, told.get("n_channels"))
    else:
        told.setdefault("n_channels", len(load_probe(probe).positions))
        _require(path, told, "sampling_frequency", "lsb_uv", "dtype")
        words = _binary(path, told)
    return ArrayRecording(path, words, told, choice._replace(probe=probe))


def _require(path: Path, told: dict[str, Any], *keys: str) -> None:
    absent = [k for k in keys if told.get(k) is None]
    if absent:
        raise ConfigError(
            f"{path} does not say its {', '.join(absent)}; give it, or write it in {path.stem}.json beside it"
        )


def _description(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read as JSON ({e}); correct it") from e
    if not isinstance(told, dict):
        raise ConfigError(f"{path} is not a table of settings; correct it")
    return told


def _npy(path: Path, n_channels: Any) -> np.ndarray:
    words = load_npy(path)
    if words.ndim != 2 or words.dtype.kind not in "iuf":
        raise RecordingError(f"{path} holds {words.ndim}-dimensional {words.dtype}; give time x channels")
    if n_channels is not None and words.shape[1] != int(n_channels):
        raise RecordingError(
            f"{path} is {words.shape[0]} x {words.shape[1]}, not time x {n_channels} channels; "
            "check n_channels"
        )
    return words


def _binary(path: Path, told: dict[str, Any]) -> np.ndarray:
    try:
        dtype, n = np.dtype(told["dtype"]), int(told["n_channels"])
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"{path}: dtype {told['dtype']!r} x {told['n_channels']!r} channels makes no sense; correct it"
        ) from e
    if dtype.newbyteorder("=").name not in DTYPES or n < 1:
        raise ConfigError(f"{path}: {n} channels of {told['dtype']}; use {', '.join(DTYPES)}")
    size = path.stat().st_size
    if not size or size % (n * dtype.itemsize):
        raise RecordingError(
            f"{path} is cut off or has another layout: {size} bytes are not whole samples of "
            f"{n} {dtype} channels; check n_channels and dtype, or copy it again"
        )
    return np.memmap(path, dtype, "r").reshape(-1, n)


def _add_truth(rec: ArrayRecording, path: Path) -> None:
    """Read true spikes (without background units) and stimulation pulses."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as z:
            g = {
                k: z[k]
                for k in z.files
                if k.startswith(("spike_", "unit_", "stim_")) and z[k].dtype != object
            }
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as e:
        raise RecordingError(f"{path} cannot be read ({type(e).__name__} {e}); copy it again") from e
    if not {"spike_samples", "spike_units"} <= g.keys():
        raise RecordingError(f"{path} holds no spike_samples and spike_units; copy it again")
    samples, units = g["spike_samples"].astype(np.int64), g["spike_units"].astype(np.int64)
    ids = g.get("unit_ids", np.unique(units)).astype(np.int64)
    if len(samples) != len(units):
        raise RecordingError(f"{path}: {len(samples)} spikes but {len(units)} units; copy it again")
    real = ~g.get("unit_background", np.zeros(len(ids), bool)).astype(bool)
    keep = np.flatnonzero(np.isin(units, ids[real]))
    keep = keep[np.argsort(samples[keep], kind="stable")]
    rec.ground_truth = GroundTruth(
        samples[keep] + rec.first_sample,
        units[keep],
        ids[real],
        g.get("unit_snr", np.full(len(ids), np.nan)).astype(np.float64)[real],
        g.get("unit_peak_channel", np.full(len(ids), -1)).astype(np.int64)[real],
    )
    if len(g.get("stim_samples", ())):
        zero = np.zeros(len(g["stim_samples"]))
        table = event_table(
            g["stim_samples"] + rec.first_sample,
            EventKind.STIM,
            g.get("stim_channels", zero),
            1,
            g.get("stim_amp", zero),
            [str(t) for t in g.get("stim_type", ())],
        )
        rec.set_events(table)
