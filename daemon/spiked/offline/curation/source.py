"""Any sorting as a SortingAnalyzer in memory: its own where it is one, else made of its spikes and its recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, OfflineError
from spiked.offline import analyze
from spiked.offline.curated import Curated, assignments, read
from spiked.sources.formats.recording import Choice
from spiked.sources.recordings import open_recording

PLAIN = (".dat", ".bin", ".raw")
OUTSIDE = 0.01  # of the spikes may lie beyond the recording's end


@dataclass
class Source:
    """What is curated. `names` are what the sorting calls its units, where ours are numbers instead."""

    kind: str
    where: str
    analyzer: Any
    names: dict[int, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        return float(self.analyzer.get_total_duration())


@contextlib.contextmanager
def opened(
    given: Any, recording: Any = None, choice: Choice | None = None, spikes_until: int | None = None
) -> Iterator[Source]:
    """`given` is a path (Phy, SortingAnalyzer, session, NWB, SpikeInterface sorting), a SortingAnalyzer or a BaseSorting.

    `recording` (a path, or a BaseRecording for a BaseSorting) replaces the one that the sorting names. Without any only figures of the
    spike times can be had; `spikes_until`, a number of samples, asks for no more. ConfigError, RecordingError or OfflineError, in one line.
    """
    choice = choice or Choice()
    if hasattr(given, "get_extension"):
        yield Source("SortingAnalyzer", "in memory", _single(given.copy(), "the SortingAnalyzer"))
        return
    if hasattr(given, "to_spike_vector"):
        yield Source("sorting", "in memory", _of_sorting(given, recording))
        return
    path = Path(given).expanduser()
    analyzer = None if recording is not None else _saved(path)
    if analyzer is not None:
        yield Source("SortingAnalyzer", str(path), analyzer)
        return
    units = read(path, choice.stream)
    with contextlib.ExitStack() as stack:
        found = None
        told: list[str] = []
        if spikes_until is None:
            found, told = _traces(path, units, recording, choice, stack)
        else:
            units = replace(units, fs_hz=units.fs_hz or 1.0)
        samples, ids, note = _inside(path, units, found)
        if spikes_until is not None:
            early = (samples >= 0) & (samples < spikes_until)
            samples, ids = samples[early], ids[early]
        yield Source(units.kind, str(path), _build(units, found, samples, ids), units.names, told + note)


def _saved(path: Path) -> Any:
    """The analyzer in a folder, or None where the folder holds something else."""
    if not (path / "spikeinterface_info.json").is_file() and path.suffix != ".zarr":
        return None
    import spikeinterface.core as si

    try:
        saved = si.load(path)
    except Exception as e:  # every format has its own way to fail
        why = " ".join(f"{type(e).__name__} {e}".split())[:140]
        raise OfflineError(f"{path} cannot be read ({why}); save or copy it again") from e
    if not hasattr(saved, "get_extension"):
        return None
    return _single(saved, str(path)).copy()  # what is computed stays in memory


def _single(analyzer: Any, name: str) -> Any:
    if analyzer.get_num_segments() != 1:
        raise ConfigError(
            f"{name} has {analyzer.get_num_segments()} segments; give one of a single recording"
        )
    return analyzer


def _traces(
    path: Path, units: Curated, recording: Path | str | None, choice: Choice, stack: contextlib.ExitStack
) -> tuple[Any, list[str]]:
    """(SpikeInterface's recording or None, what the operator should know)."""
    if recording is None and units.kind == "Phy folder" and choice.probe is None:
        plain = _phy_binary(path if (path / "spike_times.npy").is_file() else path / "sorter_output")
        if plain is not None:
            return plain, ["the Phy folder does not say its gain: amplitudes are in codes, ratios as ever"]
    if recording is None and units.open_own is None:
        return None, [
            f"{path} does not say which recording it is of: only figures of the spike times can be had (--recording)"
        ]
    from spiked.offline.curation.traces import OpenRecording

    own = open_recording(recording, **choice._asdict()) if recording is not None else units.open_own(choice)  # type: ignore[misc]
    return OpenRecording(stack.enter_context(own)), []


def _phy_binary(folder: Path) -> Any:
    """The plain array that a Phy folder names, on the electrodes that were sorted; None where it is none or has a description."""
    import probeinterface
    import spikeinterface.core as si

    told = assignments(folder / "params.py")
    dat = told.get("dat_path", "")
    dat = dat[0] if isinstance(dat, list | tuple) and len(dat) == 1 else dat
    file = folder / str(dat)
    described = any(
        p.exists() for p in (file.with_suffix(".meta"), file.with_suffix(".json"), Path(f"{file}.json"))
    )
    if described or file.suffix not in PLAIN or not file.is_file():
        return None
    try:
        channels = np.load(folder / "channel_map.npy", allow_pickle=False).ravel().astype(int)
        places = np.load(folder / "channel_positions.npy", allow_pickle=False).astype(float)
        n, fs = int(told["n_channels_dat"]), float(told["sample_rate"])
        whole = si.BinaryRecordingExtractor(
            [file], fs, str(told["dtype"]), num_channels=n, file_offset=int(told.get("offset", 0)),
            gain_to_uV=[1.0] * n, offset_to_uV=[0.0] * n,
        )  # fmt: skip
        sorted_ones = whole.select_channels(whole.channel_ids[channels])
    except (OSError, KeyError, ValueError, IndexError) as e:
        why = " ".join(f"{type(e).__name__} {e}".split())[:100]
        raise ConfigError(
            f"{folder} does not describe {file} ({why}); give its recording with --recording"
        ) from e
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(places, shapes="circle", shape_params={"radius": 5.0})
    probe.set_device_channel_indices(np.arange(len(channels)))
    return sorted_ones.set_probe(probe)


def _inside(path: Path, units: Curated, recording: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Spikes within the recording; ConfigError where too many are not, or the rates differ."""
    if recording is None:
        if units.fs_hz is None:
            raise ConfigError(f"{path} does not say its sampling rate; give its recording with --recording")
        return units.samples, units.units, []
    fs, n = float(recording.sampling_frequency), recording.get_num_samples()
    if units.fs_hz is not None and abs(units.fs_hz - fs) > 1e-3 * units.fs_hz:
        raise ConfigError(
            f"{path} is of {units.fs_hz:g} Hz, the recording of {fs:g} Hz; give its own recording"
        )
    good = (units.samples >= 0) & (units.samples < n)
    lost = int(np.count_nonzero(~good))
    if lost > OUTSIDE * len(good):
        raise ConfigError(
            f"{lost} of {len(good)} spikes of {path} lie outside the recording of {n / fs:.0f} s; give the recording that was sorted"
        )
    note = [f"{lost} spikes outside the recording are left out"] if lost else []
    return units.samples[good], units.units[good], note


def _build(units: Curated, recording: Any, samples: np.ndarray, ids: np.ndarray) -> Any:
    import spikeinterface.core as si

    if not len(samples):
        raise OfflineError("there is no spike to curate", "biology")
    fs = float(units.fs_hz or 0.0) if recording is None else float(recording.sampling_frequency)
    sorting = si.NumpySorting.from_samples_and_labels([samples], [ids], fs)
    if recording is None:
        return _analyzer(sorting, _silence(fs, int(samples.max()) + 1), filtered=True)
    return _analyzer(sorting, recording, units.filtered)


def _of_sorting(sorting: Any, recording: Any) -> Any:
    if sorting.get_num_segments() != 1:
        raise ConfigError(
            f"the sorting has {sorting.get_num_segments()} segments; give one of a single recording"
        )
    if recording is None and sorting.has_recording():
        recording = sorting._recording
    if recording is None:
        last = int(sorting.to_spike_vector()["sample_index"].max(initial=0)) + 1
        return _analyzer(sorting, _silence(sorting.sampling_frequency, last), filtered=True)
    return _analyzer(sorting, recording, bool(recording.is_filtered()))


def _analyzer(sorting: Any, recording: Any, filtered: bool) -> Any:
    import spikeinterface.core as si

    n = recording.get_num_channels()
    shape = (
        {"sparse": False}
        if n <= analyze.DENSE_CHANNELS
        else {"sparse": True, "method": "radius", "radius_um": analyze.SPARSE_UM}
    )
    clean = recording if filtered else analyze.filtered(recording)
    return si.create_sorting_analyzer(sorting, clean, format="memory", **shape, **analyze.JOB)


def _silence(fs_hz: float, n_samples: int) -> Any:
    """As long as the spikes go, and nothing in it."""
    import spikeinterface.core as si

    empty = np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), (n_samples, 1), (0, 0))
    recording = si.NumpyRecording([empty], fs_hz)
    recording.set_channel_gains([1.0])
    recording.set_channel_offsets([0.0])
    recording.annotate(no_samples=True)  # see metrics.has_traces
    recording.set_dummy_probe_from_locations(np.zeros((1, 2)))
    return recording
