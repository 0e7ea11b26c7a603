"""Curated units of any session of the rig, as spikes: SortingAnalyzer, SpikeInterface sorting, Phy or Kilosort folder, our session
folder, NWB units.

`read` looks at what it is given. Spikes are counted in samples of the recording that they were found in; `open_own` opens
that recording where the source says which it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, OfflineError, SpikedError
from spiked.offline.foreign import open_any
from spiked.offline.session import open_session
from spiked.sources.formats.recording import Choice
from spiked.sources.recordings import Recording, open_recording

KNOWN = (
    "a SortingAnalyzer folder, a sorting saved by SpikeInterface, a Phy or Kilosort folder, a session folder of ours, or an NWB "
    "file with units"
)
LABELS = ("label", "quality", "group", "curation_label", "KSLabel")  # properties and columns that hold one
UNSAID = ("", "nan", "none", "unsorted")

Opener = Callable[[Choice], Recording]


@dataclass(frozen=True)
class Curated:
    """Units somebody vouches for. `labels` and `names` (what the source calls a unit, where that is no number) by unit."""

    kind: str
    samples: np.ndarray  # (spikes,) int64, positions in the recording
    units: np.ndarray  # (spikes,) int64
    labels: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    fs_hz: float | None = None
    open_own: Opener | None = None
    filtered: bool = False  # its own recording went through a filter before

    @property
    def ids(self) -> np.ndarray:
        return np.unique(self.units)


def read(path: Path, stream: str | None = None) -> Curated:
    """The units of `path`. Raises ConfigError or OfflineError with one line that says what to do."""
    if not path.exists():
        raise ConfigError(f"there is nothing at {path}; give {KNOWN}")
    try:
        if path.is_file() and path.suffix == ".nwb":
            return _nwb(path, stream)
        if path.is_dir():
            if (
                (path / "spikeinterface_info.json").is_file()
                or path.suffix == ".zarr"
                or (path / "si_folder.json").is_file()
            ):
                return _saved(path)
            phy = next((p for p in (path, path / "sorter_output") if (p / "spike_times.npy").is_file()), None)
            if phy is not None:
                return _phy(phy)
            if (path / "spikeinterface_log.json").is_file():
                return _sorter_folder(path)
            if any(path.glob("*.nwb")):
                return _session(path, stream)
    except SpikedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as e:
        why = " ".join(f"{type(e).__name__} {e}".split())[:140]
        raise OfflineError(f"{path} cannot be read ({why}); save or copy it again") from e
    raise ConfigError(f"{path} holds no units that are known; give {KNOWN}")


def _numbered(names: list[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Ids of units called so: their own where all are different numbers from 0 on, else their places."""
    numbers = [int(n) if re.fullmatch(r"\d{1,9}", n) else -1 for n in names]
    if min(numbers, default=0) >= 0 and len(set(numbers)) == len(numbers):
        return np.array(numbers, np.int64), {}
    return np.arange(len(names)), dict(enumerate(names))


def _said(values: dict[int, Any]) -> dict[int, str]:
    """Labels without those that say nothing."""
    told = {u: (v.decode() if isinstance(v, bytes) else str(v)).strip().lower() for u, v in values.items()}
    return {u: v for u, v in told.items() if v not in UNSAID}


# ---- SpikeInterface ---------------------------------------------------------------------------------------------


def _saved(path: Path) -> Curated:
    """A SortingAnalyzer or a sorting, in a folder or zarr."""
    try:
        import spikeinterface.core as si
    except ImportError as e:
        raise ConfigError(
            f"{path} was saved by SpikeInterface; pip install 'spiked[offline]' to read it"
        ) from e
    if (path / "spikeinterface_info.json").is_file():  # what was computed is not needed here
        saved = si.load_sorting_analyzer(path, load_extensions=False)
    else:
        saved = si.load(path)
    if hasattr(saved, "get_extension"):
        recording = saved.recording if saved.has_recording() else None
        return _of_sorting("SortingAnalyzer", path, saved.sorting, recording)
    if not hasattr(saved, "to_spike_vector"):
        raise ConfigError(f"{path} is a saved {type(saved).__name__}, and no sorting; give {KNOWN}")
    return _of_sorting(
        "SpikeInterface sorting", path, saved, saved._recording if saved.has_recording() else None
    )


def _sorter_folder(path: Path) -> Curated:
    """What `run_sorter` left, of a sorter whose output is no Phy folder."""
    import spikeinterface.sorters as ss

    sorting = ss.read_sorter_folder(path)
    return _of_sorting(
        "sorter folder", path, sorting, sorting._recording if sorting.has_recording() else None
    )


def _of_sorting(kind: str, path: Path, sorting: Any, recording: Any) -> Curated:
    if sorting.get_num_segments() != 1:
        raise ConfigError(f"{path} has {sorting.get_num_segments()} segments; give one of a single recording")
    ids, names = _numbered([str(u) for u in sorting.unit_ids])
    spikes = sorting.to_spike_vector()
    keys = [k for k in LABELS if k in sorting.get_property_keys()]
    labels = _said(dict(zip(ids.tolist(), sorting.get_property(keys[0]), strict=True))) if keys else {}
    root = None if recording is None else _unprocessed(recording)
    return Curated(
        kind, spikes["sample_index"].astype(np.int64), ids[spikes["unit_index"]], labels, names,
        float(sorting.sampling_frequency), None if root is None else lambda choice: _opened(root, path, choice),
        root is not None and bool(root.is_filtered()),
    )  # fmt: skip


def _unprocessed(recording: Any) -> Any:
    """The recording before SpikeInterface's preprocessing, as long as it counts the same samples."""
    while True:
        parent = recording.get_parent()
        if parent is None or parent.get_num_segments() != 1:
            return recording
        if (parent.get_num_samples(0), parent.sampling_frequency) != (
            recording.get_num_samples(0),
            recording.sampling_frequency,
        ):
            return recording
        recording = parent


def _opened(root: Any, path: Path, choice: Choice) -> Recording:
    """The recording by our own reader where that sees the same array (it knows names and rails), else by SpikeInterface's."""
    from spiked.sources.formats.spikeinterface_folder import SpikeInterfaceRecording

    told = root._kwargs
    if type(root).__name__ == "StoredRecording":  # of our own jobs
        return _stored(json.loads(told["source"]), choice)
    for key in ("file_path", "folder_path", "file_paths"):
        value = told.get(key)
        where = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(where, str | Path):
            continue
        try:
            own = open_recording(where, **choice._asdict())
        except SpikedError:
            continue
        same = (own.n_samples, own.info.n_channels) == (root.get_num_samples(0), root.get_num_channels())
        if same and own.info.fs_hz == root.sampling_frequency:
            return own
        own.close()
    return SpikeInterfaceRecording(path, root, choice)


def _stored(source: dict[str, Any], choice: Choice) -> Recording:
    """The recording that a job of ours read, from what reading.source_of said of it."""
    if "session_file" in source:
        return open_recording(source["session_file"], **choice._asdict())
    if len(source["paths"]) > 1:
        raise ConfigError(
            "its units are of several recordings that were joined; give one of them with --recording"
        )
    said = source["choice"] | {k: v for k, v in choice._asdict().items() if v is not None}
    return open_any(
        Path(source["paths"][0]), Choice(**{**said, "probe": said.get("probe") and Path(said["probe"])})
    )


# ---- Phy and Kilosort -------------------------------------------------------------------------------------------


def _phy(path: Path) -> Curated:
    samples = np.load(path / "spike_times.npy", allow_pickle=False).ravel().astype(np.int64)
    which = "spike_clusters" if (path / "spike_clusters.npy").is_file() else "spike_templates"
    units = np.load(path / f"{which}.npy", allow_pickle=False).ravel().astype(np.int64)
    if len(samples) != len(units):
        raise OfflineError(f"{path}: {len(samples)} spike times but {len(units)} clusters; copy it again")
    told = assignments(path / "params.py")
    dat = told.get("dat_path", "")
    dat = dat[0] if isinstance(dat, list | tuple) and len(dat) == 1 else dat
    labels: dict[int, str] = {}
    for name in (
        "cluster_KSLabel.tsv",
        "cluster_info.tsv",
        "cluster_group.tsv",
    ):  # what a person said comes last
        labels |= _said(_table(path / name))
    rate = told.get("sample_rate")
    return Curated(
        "Phy folder", samples, units, labels, {}, None if rate is None else float(rate),
        (lambda choice: _beside(path, str(dat), choice)) if dat else None, bool(told.get("hp_filtered", False)),
    )  # fmt: skip


def assignments(path: Path) -> dict[str, Any]:
    """`name = value` lines of a params.py; it is read, not run."""
    out: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, equals, value = line.partition("=")
        if equals and name.strip().isidentifier():
            try:
                out[name.strip()] = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                continue
    return out


def _table(path: Path) -> dict[int, str]:
    """{cluster: label} of one of Phy's tab-separated tables."""
    if not path.is_file():
        return {}
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    column = next((header.index(k) for k in ("group", "KSLabel") if k in header), None)
    key = next((header.index(k) for k in ("cluster_id", "id") if k in header), None)
    if column is None or key is None:
        return {}
    return {int(r[key]): r[column] for r in rows if len(r) > max(key, column)}


def _beside(path: Path, dat: str, choice: Choice) -> Recording:
    where = path / dat  # an absolute path stays what it is
    if where.exists():
        return open_recording(where, **choice._asdict())
    for folder in path.resolve().parents[:2]:  # of a job of ours, whose analyzer knows what was sorted
        if (folder / "stages.json").is_file() and (folder / "analyzer").is_dir():
            known = _saved(folder / "analyzer").open_own
            if known is not None:
                return known(choice)
    raise ConfigError(f"{path} was sorted from {dat}, which is not there; put it back")


# ---- our sessions, and NWB --------------------------------------------------------------------------------------


def _session(path: Path, stream: str | None) -> Curated:
    """The offline units of a session folder; of several sorters the latest."""
    session = open_session(path)
    files = session.stream(stream)
    found = [session.folder(files, s.name) / "units.npz" for s in (path / "offline").glob("*")]
    found = sorted((f for f in found if f.is_file()), key=lambda f: f.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"{path} has no offline units; run `spiked sort {path}` first, or give {files.nwb.name} for its live units"
        )
    from spiked.offline.manifest import Manifest

    stages = Manifest(found[-1].parent).stages
    rows = stages.get("merge", {}).get("result", {}).get("units", [])
    with np.load(found[-1], allow_pickle=False) as z:
        samples, units = z["samples"] - int(z["first_sample"]), z["units"]
    return Curated(
        "session", samples.astype(np.int64), units.astype(np.int64), _said({int(r["unit"]): r["label"] for r in rows}), {},
        files.fs_hz, lambda choice: open_recording(files.nwb, **choice._asdict()),
    )  # fmt: skip


def _nwb(path: Path, stream: str | None) -> Curated:
    import h5py

    with h5py.File(path, "r", locking=False) as f:
        if "units/spike_times" not in f:
            raise ConfigError(f"{path} has no units; give {KNOWN}")
        table = f["units"]
        seconds, ends = table["spike_times"][...], table["spike_times_index"][...].astype(np.int64)
        ids, names = _numbered([str(i) for i in table["id"][...]])
        counts = np.diff(np.concatenate([[0], ends]))
        keys = [k for k in LABELS if k in table]
        labels = _said(dict(zip(ids.tolist(), table[keys[0]][...], strict=True))) if keys else {}
        samples, fs_hz = _positions_in(f, path, stream, seconds)
    return Curated(
        "NWB units", samples, np.repeat(ids, counts), labels, names, fs_hz,
        lambda choice: open_recording(path, **choice._asdict()),
    )  # fmt: skip


def _positions_in(
    f: Any, path: Path, stream: str | None, seconds: np.ndarray
) -> tuple[np.ndarray, float | None]:
    """Where in the ElectricalSeries these times are, and its rate; without a series the times are refused."""
    series: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if item.attrs.get("neurodata_type") == "ElectricalSeries" and "data" in item:
            series[name] = item

    f["acquisition"].visititems(visit)
    named = {n: s for n, s in series.items() if stream in (n, n.rsplit("/", 1)[-1])} or series
    if len(named) != 1:
        has = ", ".join(series) or "no ElectricalSeries"
        raise ConfigError(f"{path} holds {has}; its units' times need the one they were found in (--stream)")
    one = next(iter(named.values()))
    if "starting_time" in one:
        start, rate = float(one["starting_time"][()]), float(one["starting_time"].attrs["rate"])
        return np.rint((seconds - start) * rate).astype(np.int64), rate
    times = one["timestamps"][...]
    half = float(np.median(np.diff(times[: 1 << 16]))) / 2
    return np.searchsorted(times, seconds - half).astype(np.int64), None
