"""Do merges put together what a sorter took apart? Units split on purpose, or a sorter's own pieces, against known neurons.

Ours runs as a job runs it: labels first, then the merges. The package is called directly, with all units, as its authors show, but for the
window of its autoencoder, which has to be told at other rates than 30 kHz.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.bench.machine import conditions
from spiked.config import Slay
from spiked.errors import ConfigError
from spiked.offline import analyze, labels, merges, slay, slay_network
from spiked.offline.curated import read
from spiked.offline.truth import Trains, coincidences, pair_lags, score, summary
from spiked.sources.recordings import open_recording

KINDS = ("alternate", "time", "amplitude", "burst")
BURST_MS = 12.0
PURE = 0.6  # share of a unit's spikes that are one neuron's, to be a piece of it
CENSOR_MS = 0.3
MIN_SPIKES = 100  # of a neuron that is split
Say = Callable[[str], None]


def bench(
    recording: Path,
    sorting: Path | None,
    methods: list[str],
    *,
    duration_s: float | None = None,
    seed: int = 0,
    say: Say = lambda _t: None,
) -> dict[str, Any]:
    """Figures per method: {"undone", "wrong": pairs of two neurons, "groups", "units", "accuracy", "well", "seconds", "cpu_s", "why"}.

    Without `sorting` every second neuron is split, in turn by alternate spikes, time, amplitude and bursts. A split is undone when both
    pieces are one unit, or when one is set aside as a second detection of the other's spikes.
    """
    from spiked.offline.curation.traces import OpenRecording

    with (
        open_recording(recording) as opened,
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as folder,
    ):
        warnings.simplefilter("ignore")
        fs, until = opened.info.fs_hz, min(opened.n_samples, round((duration_s or 1e9) * opened.info.fs_hz))
        true, everyone = _truth(recording, opened, until)
        rec = OpenRecording(opened).frame_slice(0, until)
        if sorting is None:
            samples, units, of = split(true, fs, rec, seed)
        else:
            found = read(sorting)
            keep = (found.samples >= 0) & (found.samples < until)
            samples, units = found.samples[keep], found.units[keep]
            of = pieces(everyone, Trains.of(samples, units), fs)
        wanted = list(splits(of))
        say(f"{len(np.unique(units))} units of {len(true.ids)} neurons, {len(wanted)} splits")
        start = time.perf_counter()
        analyzer = analyze.build(rec, samples, units, Path(folder) / "analyzer", lambda _f, _t: None)
        built = time.perf_counter() - start
        scene = Scene(
            analyzer, _labels(analyzer, samples, units, until, fs, opened.info), true, of, wanted, fs
        )
        rows = []
        for method in methods:
            rows.append(scene.run(method, until / fs, Path(folder)))
            told = rows[-1]
            say(
                f"{method}: {told['undone']} of {len(wanted)} undone, {len(told['wrong'])} wrong, accuracy {told['accuracy']} {told['why']}"
            )
        before = _accuracy(samples, units, true, fs)
        return {
            "bench": "merges", "recording": recording.name, "channels": opened.info.n_channels, "fs_hz": fs, "seconds": round(until / fs, 2),
            "sorting": "split on purpose" if sorting is None else str(sorting), "neurons": len(true.ids), "units": len(np.unique(units)),
            "splits": len(wanted), "analyzer_s": round(built, 1), "before": before, "rows": rows, "machine": conditions(),
        }  # fmt: skip


def _truth(recording: Path, opened: Any, until: int) -> tuple[Trains, Trains]:
    """(spikes of the neurons that are to be found, spikes of all), as sample numbers of the recording."""
    if opened.ground_truth is None:
        raise ConfigError(f"{recording} has no known spikes; give a simulated recording")
    samples = opened.ground_truth.samples - opened.first_sample
    early = samples < until
    true = Trains.of(samples[early], opened.ground_truth.units[early])
    file = recording / "ground_truth.npz"  # the readers leave out the cells of the background
    if not file.is_file():
        return true, true
    with np.load(file, allow_pickle=False) as z:
        early = z["spike_samples"] < until
        return true, Trains.of(z["spike_samples"][early], z["spike_units"][early])


@dataclass
class Scene:
    """A sorting whose units are known, for one method after the other."""

    analyzer: Any
    rows: list[labels.UnitLabel]
    true: Trains
    of: dict[int, int]
    splits: list[tuple[int, int]]
    fs_hz: float

    def run(self, method: str, seconds: float, folder: Path) -> dict[str, Any]:
        begin, cpu = time.perf_counter(), time.process_time()
        kept = [r.unit for r in self.rows if r.label in labels.KEPT]
        twins = {r.unit: r.duplicate_of for r in self.rows if r.duplicate_of is not None}
        who, similarity, *more = method.split(":")
        parameters = more[0] if more else "auto"
        if who == "ours":
            groups, why = _ours(self.analyzer, kept, list(twins), similarity, parameters, seconds, folder)
            enter = kept
        else:
            groups, why = _package(self.analyzer.copy(), similarity, parameters, folder)
            twins.clear()
            enter = [int(u) for u in self.analyzer.unit_ids]
        spent = {
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
        }
        told = judged(groups, self.of, self.splits, twins)
        return {"method": method, **told, **self.scored(groups, enter), **spent, "why": why}

    def scored(self, groups: list[list[int]], enter: list[int]) -> dict[str, Any]:
        """Accuracy of what is left, merged spikes within CENSOR_MS being one."""
        trains = merges.trains(self.analyzer)
        samples, units = trains.samples, trains.ids[trains.index].copy()
        for g in groups:
            units[np.isin(units, g)] = g[0]
        inside = np.isin(units, [*enter, *(g[0] for g in groups)])
        samples, units = samples[inside], units[inside]
        order = np.lexsort((samples, units))
        samples, units = samples[order], units[order]
        again = (np.diff(samples, prepend=-(10**9)) <= CENSOR_MS * self.fs_hz / 1000) & (
            np.diff(units, prepend=-1) == 0
        )
        return {
            "units": len(np.unique(units)),
            **_accuracy(samples[~again], units[~again], self.true, self.fs_hz),
        }


def _accuracy(samples: np.ndarray, units: np.ndarray, true: Trains, fs_hz: float) -> dict[str, Any]:
    figures = summary(score(true.samples, true.ids[true.index], samples, units, fs_hz))
    return {"accuracy": round(figures["accuracy"], 3), "well": figures["well"]}


def split(
    true: Trains, fs_hz: float, recording: Any, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """(samples, units, {unit: neuron}): every second rich neuron in two, the second piece under an id of its own."""
    units = true.ids[true.index].astype(np.int64)
    rich = [int(u) for u, n in zip(true.ids, true.counts, strict=True) if n >= MIN_SPIKES]
    of = {int(u): int(u) for u in true.ids}
    rng = np.random.default_rng(seed)
    amplitude = _amplitudes(true, recording)
    for kind, (k, unit) in zip(itertools.cycle(KINDS), enumerate(rich[::2]), strict=False):
        mine = np.flatnonzero(units == unit)
        t = true.samples[mine]
        if kind == "alternate":
            other = rng.random(len(t)) < 0.5
        elif kind == "time":  # a slow change from one to the other, in the middle of the recording
            other = rng.random(len(t)) < np.clip((t / t[-1] - 0.4) / 0.2, 0, 1)
        elif kind == "amplitude":
            other = amplitude[mine] < np.median(amplitude[mine])
        else:
            other = np.diff(t, prepend=-(10**9)) < BURST_MS * fs_hz / 1000
            other = other if other.sum() >= MIN_SPIKES / 4 else rng.random(len(t)) < 0.5
        new = int(true.ids.max()) + 1 + k
        units[mine[other]], of[new] = new, unit
    return true.samples, units, of


def _amplitudes(true: Trains, recording: Any) -> np.ndarray:
    """(spikes,) |microvolt| at the peak electrode of the spike's neuron."""
    import spikeinterface.core as si

    sorting = si.NumpySorting.from_samples_and_labels(
        [true.samples], [true.ids[true.index]], recording.sampling_frequency
    )
    a = si.create_sorting_analyzer(sorting, analyze.filtered(recording), sparse=False, **analyze.JOB)
    a.compute(["random_spikes", "templates", "spike_amplitudes"], **analyze.JOB)
    by_unit = a.get_extension("spike_amplitudes").get_data(outputs="by_unit", concatenated=True)
    out = np.zeros(len(true.samples))
    for k, u in enumerate(true.ids):
        out[true.index == k] = np.abs(by_unit[u])
    return out


def pieces(true: Trains, found: Trains, fs_hz: float) -> dict[int, int]:
    """{unit: the neuron whose spikes it mostly has}; -1 where it is nobody's."""
    window, most = round(0.4 * fs_hz / 1000), round(0.5 * fs_hz / 1000)
    lags, heights = pair_lags(true, found, most)
    lag = lags[heights.argmax(0), np.arange(len(found.ids))]
    matched = coincidences(true, found, window, np.broadcast_to(lag, lags.shape))
    share = matched / np.maximum(found.counts, 1)
    return {
        int(u): int(true.ids[share[:, k].argmax()]) if share[:, k].max() >= PURE else -1
        for k, u in enumerate(found.ids)
    }


def splits(of: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Pairs of units that are pieces of one neuron; of more than two pieces, each with the first."""
    for neuron in sorted(set(of.values()) - {-1}):
        first, *more = sorted(u for u, n in of.items() if n == neuron)
        yield from ((first, u) for u in more)


def judged(
    groups: list[list[int]], of: dict[int, int], wanted: list[tuple[int, int]], twins: dict[int, int]
) -> dict[str, Any]:
    """Splits that were undone, by a merge or as second detections of their own neuron, and pairs merged that are not one neuron's."""
    group = {u: k for k, g in enumerate(groups) for u in g}

    def whole(u: int) -> int:
        """The unit that stands for u: of a second detection the one it repeats, while that is the same neuron's."""
        other = twins.get(u)
        return u if other is None or of[other] != of[u] else whole(other)

    undone = 0
    for a, b in wanted:
        x, y = whole(a), whole(b)
        undone += x == y or (x in group and group[x] == group.get(y))
    wrong = [[a, b] for g in groups for a, b in itertools.combinations(g, 2) if of[a] != of[b] or of[a] < 0]
    return {"undone": undone, "groups": len(groups), "wrong": wrong}


def _labels(
    analyzer: Any, samples: np.ndarray, units: np.ndarray, n_samples: int, fs_hz: float, info: Any
) -> list[labels.UnitLabel]:
    """As a job labels them; Kilosort's own word is not asked."""
    shapes = analyze.shapes(analyzer, info.positions)
    return labels.label_units(samples, units, shapes, {}, {}, n_samples, fs_hz, info.n_channels)


def _ours(
    analyzer: Any,
    kept: list[int],
    twins: list[int],
    similarity: str,
    parameters: str,
    seconds: float,
    folder: Path,
) -> tuple[list[list[int]], str]:
    wish = Slay.model_validate({"similarity": similarity, "parameters": parameters})
    twins = [u for u in twins if u not in kept]
    store = slay_network.Store(folder / "networks")
    subset = analyze.only(analyzer, kept + twins)
    found = merges.propose(subset, wish, seconds, store, "cpu", lambda _f, _t: None, twins)
    return found["groups"], f"{found['method']}: {found['why']}"


def _package(analyzer: Any, similarity: str, parameters: str, folder: Path) -> tuple[list[list[int]], str]:
    """compute_slay_merges itself; in its own words where it fails."""
    import functools

    import joblib
    from slay import compute_slay_merges
    from slay.autoencoder import AE

    n = sum(int(ms * analyzer.sampling_frequency / 1000) for ms in slay_network.WINDOW_MS)
    before, after = slay_network.WINDOW_MS
    options = {
        "autoencoder_params": {"num_chan": 8, "ms_before": before, "ms_after": after},
        "autoencoder_architecture": functools.partial(AE, num_chan=8, num_samp=n),
        "model_path": str(folder / f"package_{n}.pt"),
    }
    try:
        with slay.held(), joblib.parallel_config(backend="sequential"):
            groups, _, _ = compute_slay_merges(
                analyzer, merge_parameters="auto" if parameters == "auto" else None, similarity_type=similarity,
                **(options if similarity == "autoencoder" else {}),
            )  # fmt: skip
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as e:
        return [], " ".join(f"{type(e).__name__}: {e}".split())[:120]
    return [[int(u) for u in g] for g in groups], ""
