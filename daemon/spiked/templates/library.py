"""Templates: what the live sorter `templates` knows of every unit, and the portable file it is kept in.

Everything refers to cleaned microvolts that were high-passed and whitened in time by the filters kept here. Two lists say
what belongs to unit u. Entries wave_ptr[u] to wave_ptr[u + 1]: the electrodes that see it, with their mean waveforms. Entries
ptr[u] to ptr[u + 1]: the electrodes of the filter that finds it, as coefficients in the temporal components: the mean waveforms times the
precision of the noise, the matched filter in correlated noise. It leaves weak electrodes out and ends before the waveforms
do: a spike is found soon and cheaply, but all of it is subtracted.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spiked import __version__, portable
from spiked.errors import ConfigError
from spiked.stream import StreamInfo
from spiked.templates.gram import Gram

FORMAT = "spiked-templates"
FORMAT_VERSION = 1
EARLY_MS = 0.4  # of a filter after the trough, for early decisions

_PER_UNIT = {
    "unit_ids": np.int32, "roots": np.int32, "root_amplitude_uv": np.float32, "n_spikes": np.int64, "rate_hz": np.float32,
    "amplitude_sd": np.float32, "threshold": np.float32, "low": np.float32, "high": np.float32, "id_confidence": np.float32,
}  # fmt: skip
_LISTS = {"ptr": ("channel", "weight"), "wave_ptr": ("wave_channel", "waveform")}
_COEFFICIENTS = ("waveform", "weight")
_CHANNELS = {"channel": np.int32, "wave_channel": np.int32}
_WHOLE = {"positions_um": np.float64, "sos": np.float64, "taps": np.float32, "basis": np.float32, "precision": np.float32, "ptr": np.int64, "wave_ptr": np.int64}  # fmt: skip


def library_path(session: Path, stream: str) -> Path:
    """Where the rig keeps the curated units of this stream, beside its session folders."""
    return session.absolute().parent / "library" / f"{stream}.templates.h5"


@dataclass(frozen=True, eq=False)
class Templates:
    """All units of one calibration, or of a curated session."""

    fs_hz: float
    channel_ids: tuple[str, ...]
    positions_um: np.ndarray  # (channels, 2)
    sos: np.ndarray  # (sections, 6) float64, the causal high-pass
    taps: np.ndarray  # (taps,) float32, causal whitening in time
    precision: np.ndarray  # (channels, channels) float32, of the noise across electrodes, unit-free after it
    before: int  # samples of filters and waveforms before the trough
    basis: np.ndarray  # (components, samples) float32, orthonormal

    unit_ids: np.ndarray  # (units,)
    roots: np.ndarray  # channel index of the largest trough
    root_amplitude_uv: np.ndarray  # mean, negative for ordinary spikes
    n_spikes: np.ndarray  # that made the template
    rate_hz: np.ndarray
    amplitude_sd: np.ndarray  # of a spike's amplitude about the unit's, in units of it
    threshold: np.ndarray  # least gain (twice a log likelihood ratio) of a spike
    low: np.ndarray  # least amplitude of a spike, in units of the unit's
    high: np.ndarray

    ptr: np.ndarray  # (units + 1,)
    channel: np.ndarray  # (filter entries,)
    weight: np.ndarray  # (filter entries, components)
    wave_ptr: np.ndarray  # (units + 1,)
    wave_channel: np.ndarray  # (waveform entries,)
    waveform: (
        np.ndarray
    )  # (waveform entries, samples) filtered microvolts, `before` of them before the trough

    id_confidence: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # 0: new unit
    expected: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # sorter -> figure -> per unit
    source: dict[str, str] = field(default_factory=dict)  # what found the units: sorter, version, file
    first_sample: int = 0  # calibration span, sample numbers
    stop_sample: int = 0
    next_unit_id: int = 0  # ids below have been given out, maybe to units that are no longer found
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not len(self.id_confidence):
            object.__setattr__(self, "id_confidence", np.zeros(len(self.unit_ids), np.float32))
        for name, dtype in {
            **_PER_UNIT,
            **_CHANNELS,
            **_WHOLE,
            **dict.fromkeys(_COEFFICIENTS, np.float32),
        }.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        largest = max(int(self.next_unit_id), int(self.unit_ids.max(initial=-1)) + 1)
        object.__setattr__(self, "next_unit_id", largest)
        problem = self._problem()
        if problem:
            raise ConfigError(f"templates are not consistent: {problem}; calibrate again")

    def _problem(self) -> str | None:
        n, c = len(self.unit_ids), len(self.channel_ids)
        if self.positions_um.shape != (c, 2) or self.precision.shape != (c, c):
            return (
                f"{c} channels but positions {self.positions_um.shape} and precision {self.precision.shape}"
            )
        if any(len(getattr(self, k)) != n for k in _PER_UNIT):
            return "per-unit arrays differ in length"
        for pointer, lists in _LISTS.items():
            p = getattr(self, pointer)
            if (
                len(p) != n + 1
                or p[0] != 0
                or (np.diff(p) < 1).any()
                or any(len(getattr(self, k)) != p[-1] for k in lists)
            ):
                return "a list of electrodes per unit is broken"
        if self.basis.ndim != 2 or not 0 <= self.before < self.basis.shape[1] or self.sos.shape[1:] != (6,):
            return "the components or the filter are broken"
        if self.weight.shape[1:] != (len(self.basis),) or len(self.basis) % 2:
            return "coefficients do not fit the components"
        if self.waveform.ndim != 2 or self.waveform.shape[1] < self.basis.shape[1]:
            return "waveforms shorter than their filters"
        for where in (self.roots, self.channel, self.wave_channel):
            if len(where) and (where.min() < 0 or where.max() >= c):
                return "a channel outside the array"
        if len(np.unique(self.unit_ids)) != n:
            return "a unit id occurs twice"
        names = [k for k, d in _PER_UNIT.items() if d is np.float32] + [*_COEFFICIENTS, *_WHOLE]
        if not self.fs_hz > 0 or not all(np.isfinite(getattr(self, k)).all() for k in names):
            return "values that are not finite"
        return None

    def __len__(self) -> int:
        return len(self.unit_ids)

    @property
    def n_channels(self) -> int:
        return len(self.channel_ids)

    @property
    def length(self) -> int:
        """Samples of a filter."""
        return int(self.basis.shape[1])

    @cached_property
    def gram(self) -> Gram:
        """What a spike of each unit adds to the scores of all; made when it is first asked for, which takes a while for many units."""
        return Gram(self)

    @cached_property
    def early(self) -> Templates:
        """The same units with filters that see only the beginning of a spike; its least gain stays what it is."""
        n = min(self.length, self.before + 1 + round(EARLY_MS * self.fs_hz / 1000))
        return dataclasses.replace(self, basis=self.basis[:, :n])

    def waveforms(self) -> np.ndarray:
        """(units, channels, samples) float32: the mean waveforms, filtered microvolts."""
        out = np.zeros((len(self), self.n_channels, self.waveform.shape[1]), np.float32)
        unit = np.repeat(np.arange(len(self)), np.diff(self.wave_ptr))
        out[unit, self.wave_channel] = self.waveform
        return out

    def check(self, info: StreamInfo) -> None:
        """ConfigError unless these templates were made on this stream's channels and rate."""
        info.check_array("templates", self.fs_hz, self.channel_ids, self.positions_um)

    def with_ids(
        self, unit_ids: np.ndarray, next_unit_id: int = 0, id_confidence: np.ndarray | None = None
    ) -> Templates:
        """The same units under other ids; ids below `next_unit_id` will not be given to new units."""
        sure = self.id_confidence if id_confidence is None else id_confidence
        return dataclasses.replace(self, unit_ids=unit_ids, next_unit_id=next_unit_id, id_confidence=sure)

    def keep(self, units: np.ndarray) -> Templates:
        """Only these units (bool mask or positions); ids stay."""
        units = np.arange(len(self))[units]
        changed: dict[str, Any] = {k: getattr(self, k)[units] for k in _PER_UNIT}
        for pointer, lists in _LISTS.items():
            p = getattr(self, pointer)
            entry = np.concatenate([np.zeros(0, int), *(np.arange(p[u], p[u + 1]) for u in units)])
            changed[pointer] = np.concatenate([[0], np.cumsum(np.diff(p)[units])])
            changed |= {k: getattr(self, k)[entry] for k in lists}
        expected = {s: {k: [v[u] for u in units] for k, v in f.items()} for s, f in self.expected.items()}
        return dataclasses.replace(self, expected=expected, **changed)

    def save(self, path: Path | str) -> None:
        """Write a portable HDF5 file; what was there stays until the new one is complete on disk."""

        def fill(f: Any) -> None:
            f.attrs.update(self._header())
            for name in (*_PER_UNIT, *_CHANNELS, *_COEFFICIENTS, *_WHOLE):
                f.create_dataset(name, data=getattr(self, name))

        portable.save(Path(path), "templates", fill)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "format_version": FORMAT_VERSION, "written_by": f"spiked {__version__}", "created": self.created,
            "fs_hz": float(self.fs_hz), "channel_ids": json.dumps(list(self.channel_ids)), "before": int(self.before),
            "source": json.dumps(self.source), "expected": json.dumps(self.expected), "first_sample": int(self.first_sample),
            "stop_sample": int(self.stop_sample), "next_unit_id": int(self.next_unit_id),
        }  # fmt: skip

    @classmethod
    def load(cls, path: Path | str) -> Templates:
        """Read what `save` wrote; ConfigError for anything else."""
        import h5py

        if not Path(path).is_file():
            raise ConfigError(f"no templates at {path}; calibrate first or correct the path")
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
                f"{path} is not a whole templates file ({type(e).__name__}); calibrate again"
            ) from e

    @classmethod
    def _read(cls, f: Any, path: str) -> Templates:
        a = f.attrs
        if a.get("format") != FORMAT:
            raise ConfigError(f"{path} is not a templates file of spiked; give a .templates.h5")
        if int(a["format_version"]) > FORMAT_VERSION:
            raise ConfigError(
                f"{path} was written by a newer version ({a['written_by']}); update spiked or calibrate again"
            )
        return cls(
            fs_hz=float(a["fs_hz"]),
            channel_ids=tuple(str(c) for c in json.loads(a["channel_ids"])),
            before=int(a["before"]),
            source={str(k): str(v) for k, v in json.loads(a["source"]).items()},
            expected=json.loads(a["expected"]),
            first_sample=int(a["first_sample"]),
            stop_sample=int(a["stop_sample"]),
            next_unit_id=int(a["next_unit_id"]),
            created=str(a["created"]),
            **{name: f[name][()] for name in (*_PER_UNIT, *_CHANNELS, *_COEFFICIENTS, *_WHOLE)},
        )
