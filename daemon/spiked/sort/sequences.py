"""Sequences: what RT-Sort knows of every unit, and the portable file it is kept in.

A sequence is a root electrode and companion electrodes, each with a latency after the root, an amplitude in noise
SDs and a probability of being seen (van der Molen, Lim et al. 2024). The companions of all units lie one after the
other (CSR): unit u owns entries ptr[u] to ptr[u + 1], its root first.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from spiked import __version__, portable
from spiked.errors import ConfigError
from spiked.sort.parameters import RTSortParameters
from spiked.stream import StreamInfo
from spiked_models.sentinel import Sentinel

FORMAT = "spiked-sequences"
FORMAT_VERSION = 1
ROOT, LOOSE, INNER = 1, 2, 4  # bits of `flags`

_PER_UNIT = {
    "unit_ids": np.int32, "roots": np.int32, "root_amp_mean": np.float32, "root_amp_sd": np.float32,
    "root_amplitude_uv": np.float32, "min_loose": np.int32, "min_inner": np.int32, "n_spikes": np.int64, "rate_hz": np.float32,
}  # fmt: skip
_PER_ENTRY = {
    "electrode": np.int32, "latency": np.float32, "latency_sd": np.float32, "amp": np.float32, "amp_sd": np.float32,
    "prob": np.float32, "flags": np.uint8,
}  # fmt: skip


def _empty(dtype: Any) -> Any:
    return field(default_factory=lambda: np.zeros(0, dtype))


@dataclass(frozen=True, eq=False)
class Sequences:
    """All units of one calibration. Latencies in samples after the root, amplitudes in noise SDs unless `_uv`."""

    fs_hz: float
    channel_ids: tuple[str, ...]
    positions_um: np.ndarray  # (channels, 2)
    stringent_logit: float
    loose_logit: float
    parameters: RTSortParameters
    first_sample: int = 0  # calibration span, sample numbers
    stop_sample: int = 0
    network: dict[str, str] = field(default_factory=dict)  # name, sha256
    inference_scaling: float | None = None
    sentinel: Sentinel | None = None  # where the network need not run, learned on the calibration span
    imported_from: dict[str, str] = field(
        default_factory=dict
    )  # another program's file, its sha256, what it lacked
    next_unit_id: int = 0  # ids below have been given out, maybe to units that are no longer found
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    unit_ids: np.ndarray = _empty(np.int32)
    roots: np.ndarray = _empty(np.int32)  # channel index
    root_amp_mean: np.ndarray = _empty(np.float32)
    root_amp_sd: np.ndarray = _empty(np.float32)
    root_amplitude_uv: np.ndarray = _empty(np.float32)  # mean, negative for ordinary spikes
    min_loose: np.ndarray = _empty(np.int32)  # electrodes above loose that a spike needs
    min_inner: np.ndarray = _empty(np.int32)
    n_spikes: np.ndarray = _empty(np.int64)  # in the calibration span
    rate_hz: np.ndarray = _empty(np.float32)
    # how surely a unit is the one that had its id in the calibration before (sort/match.py), 0: the id is new
    id_confidence: np.ndarray = _empty(np.float32)

    # (pairs, 3): two units, by their place here, of which only one is reported within so many samples (sort/echoes.py)
    echoes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int32))

    ptr: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # (units + 1,)
    electrode: np.ndarray = _empty(np.int32)
    latency: np.ndarray = _empty(np.float32)
    latency_sd: np.ndarray = _empty(np.float32)
    amp: np.ndarray = _empty(np.float32)
    amp_sd: np.ndarray = _empty(np.float32)
    prob: np.ndarray = _empty(np.float32)
    flags: np.ndarray = _empty(np.uint8)

    def __post_init__(self) -> None:
        for name, dtype in (
            *_PER_UNIT.items(),
            *_PER_ENTRY.items(),
            ("id_confidence", np.float32),
            ("echoes", np.int32),
            ("ptr", np.int64),
            ("positions_um", np.float64),
        ):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        if not len(self.id_confidence):
            object.__setattr__(self, "id_confidence", np.zeros(len(self.unit_ids), np.float32))
        object.__setattr__(
            self, "next_unit_id", max(int(self.next_unit_id), int(self.unit_ids.max(initial=-1)) + 1)
        )
        problem = self._problem()
        if problem:
            raise ConfigError(f"sequences are not consistent: {problem}; calibrate again")

    def _problem(self) -> str | None:
        n, c = len(self.unit_ids), len(self.channel_ids)
        if self.positions_um.shape != (c, 2):
            return f"{c} channels but positions {self.positions_um.shape}"
        if any(len(getattr(self, k)) != n for k in (*_PER_UNIT, "id_confidence")):
            return "per-unit arrays differ in length"
        p = self.ptr
        if (
            len(p) != n + 1
            or p[0] != 0
            or (np.diff(p) < 1).any()
            or any(len(getattr(self, k)) != p[-1] for k in _PER_ENTRY)
        ):
            return "the list of electrodes per unit is broken"
        if n and (
            self.roots.min() < 0
            or self.roots.max() >= c
            or self.electrode.min() < 0
            or self.electrode.max() >= c
        ):
            return "a channel outside the array"
        if self.echoes.ndim != 2 or self.echoes.shape[1] != 3:
            return "the list of echoes is broken"
        if self.echoes.size and (self.echoes.min() < 0 or self.echoes[:, :2].max() >= n):
            return "an echo of a unit that is not there"
        if (self.electrode[p[:-1]] != self.roots).any():
            return "the root is not first in its list"
        if len(np.unique(self.unit_ids)) != n:
            return "a unit id occurs twice"
        floats = [k for k, d in (*_PER_UNIT.items(), *_PER_ENTRY.items()) if d is np.float32]
        if not self.fs_hz > 0 or not all(np.isfinite(getattr(self, k)).all() for k in floats):
            return "values that are not finite"
        return None

    def __len__(self) -> int:
        return len(self.unit_ids)

    @property
    def n_channels(self) -> int:
        return len(self.channel_ids)

    def check(self, info: StreamInfo) -> None:
        """ConfigError unless these sequences were made on this stream's channels and rate."""
        if self.n_channels != info.n_channels:
            what = f"{self.n_channels} channels, the stream has {info.n_channels}"
        elif abs(self.fs_hz - info.fs_hz) > 0.01 * info.fs_hz:
            what = f"{self.fs_hz:g} Hz, the stream runs at {info.fs_hz:g} Hz"
        elif tuple(self.channel_ids) != tuple(info.channel_ids):
            k = next(
                i for i, (a, b) in enumerate(zip(self.channel_ids, info.channel_ids, strict=True)) if a != b
            )
            what = f"channel {k} being {self.channel_ids[k]}, in the stream it is {info.channel_ids[k]}"
        elif info.geometry_known and not np.allclose(self.positions_um, info.positions, atol=1.0):
            what = "other electrode positions"
        else:
            return
        raise ConfigError(f"stream {info.name}: the sequences were made with {what}; calibrate again")

    def with_ids(
        self, unit_ids: np.ndarray, next_unit_id: int = 0, id_confidence: np.ndarray | None = None
    ) -> Sequences:
        """The same units under other ids; ids below `next_unit_id` will not be given to new units."""
        return dataclasses.replace(
            self,
            unit_ids=np.asarray(unit_ids, np.int32),
            next_unit_id=next_unit_id,
            id_confidence=np.zeros(len(self), np.float32) if id_confidence is None else id_confidence,
        )

    def save(self, path: Path | str) -> None:
        """Write a portable HDF5 file; what was there stays until the new one is complete on disk."""

        def fill(f: Any) -> None:
            f.attrs.update(self._header())
            for name in (*_PER_UNIT, *_PER_ENTRY, "id_confidence", "echoes", "ptr", "positions_um"):
                f.create_dataset(name, data=getattr(self, name))
            for name, values in (self.sentinel.to_arrays() if self.sentinel else {}).items():
                f.create_dataset(f"sentinel/{name}", data=values)

        portable.save(Path(path), "sequences", fill)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "format_version": FORMAT_VERSION, "written_by": f"spiked {__version__}", "created": self.created,
            "fs_hz": float(self.fs_hz), "channel_ids": json.dumps(list(self.channel_ids)), "network": json.dumps(self.network),
            "inference_scaling": float("nan") if self.inference_scaling is None else float(self.inference_scaling),
            "stringent_logit": float(self.stringent_logit), "loose_logit": float(self.loose_logit),
            "parameters": self.parameters.to_json(), "first_sample": int(self.first_sample), "stop_sample": int(self.stop_sample),
            "next_unit_id": int(self.next_unit_id), "imported_from": json.dumps(self.imported_from),
        }  # fmt: skip

    @classmethod
    def load(cls, path: Path | str) -> Sequences:
        """Read what `save` wrote; ConfigError for anything else."""
        import h5py

        if not Path(path).is_file():
            raise ConfigError(f"no sequences at {path}; calibrate first or correct the path")
        try:
            with h5py.File(path, "r") as f:
                return cls._read(f, str(path))
        except (
            OSError,
            KeyError,
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as e:
            raise ConfigError(
                f"{path} is not a whole sequences file ({type(e).__name__}); calibrate again"
            ) from e

    @classmethod
    def _read(cls, f: Any, path: str) -> Sequences:
        a = f.attrs
        if a.get("format") != FORMAT:
            raise ConfigError(f"{path} is not a sequences file of spiked; give a .sequences.h5")
        if int(a["format_version"]) > FORMAT_VERSION:
            raise ConfigError(
                f"{path} was written by a newer version ({a['written_by']}); update spiked or calibrate again"
            )
        scaling = float(a["inference_scaling"])
        return cls(
            fs_hz=float(a["fs_hz"]),
            channel_ids=tuple(str(c) for c in json.loads(a["channel_ids"])),
            stringent_logit=float(a["stringent_logit"]),
            loose_logit=float(a["loose_logit"]),
            parameters=RTSortParameters.from_json(a["parameters"]),
            first_sample=int(a["first_sample"]),
            stop_sample=int(a["stop_sample"]),
            next_unit_id=int(a["next_unit_id"]),
            imported_from=dict(json.loads(a.get("imported_from", "{}"))),
            network={str(k): str(v) for k, v in json.loads(a["network"]).items()},
            inference_scaling=None if np.isnan(scaling) else scaling,
            created=str(a["created"]),
            sentinel=Sentinel.from_arrays({k: v[()] for k, v in f["sentinel"].items()})
            if "sentinel" in f
            else None,
            id_confidence=f["id_confidence"][()] if "id_confidence" in f else np.zeros(0, np.float32),
            echoes=f["echoes"][()] if "echoes" in f else np.zeros((0, 3), np.int32),
            **{name: f[name][()] for name in (*_PER_UNIT, *_PER_ENTRY, "ptr", "positions_um")},
        )
