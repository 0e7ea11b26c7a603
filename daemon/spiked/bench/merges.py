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
from pathlib import Path
from typing import Any

import numpy as np

from spiked.bench.machine import conditions
from spiked.config import Slay
from spiked.errors import ConfigError
from spiked.offline import analyze, labels, merges, slay_network
from spiked.offline.curated import read
from spiked.offline.truth import Trains, coincidences, pair_lags
from spiked.sources.recordings import open_recording

KINDS = ("alternate", "time", "amplitude", "burst")
BURST_MS = 12.0
PURE = 0.6  # share of a unit's spikes that are one neuron's, to be a piece of it
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
    """Figures per method: {"recovered", "splits", "wrong", "groups", "seconds", "why"}.

    Without `sorting` every second neuron is split, in turn by alternate spikes, time, amplitude and bursts.
    """
    with (
        open_recording(recording) as opened,
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as folder,
    ):
        warnings.simplefilter("ignore")
        truth = opened.ground_truth
        if truth is None:
            raise ConfigError(f"{recording} has no known spikes; give a simulated recording")
        fs, until = opened.info.fs_hz, min(opened.n_samples, round((duration_s or 1e9) * opened.info.fs_hz))
        early = truth.samples - opened.first_sample < until
        true = Trains.of(truth.samples[early] - opened.first_sample, truth.units[early])
        from spiked.offline.curation.traces import OpenRecording

        rec = OpenRecording(opened).frame_slice(0, until)
        if sorting is None:
            samples, units, of = split(true, fs, rec, Path(folder), seed)
        else:
            found = read(sorting)
            keep = (found.samples >= 0) & (found.samples < until)
            samples, units = found.samples[keep], found.units[keep]
            of = pieces(true, Trains.of(samples, units), fs)
        wanted = list(splits(of))
        say(f"{len(np.unique(units))} units of {len(true.ids)} neurons, {len(wanted)} pairs to be merged")
        start = time.perf_counter()
        analyzer = analyze.build(rec, samples, units, Path(folder) / "analyzer", lambda _f, _t: None)
        built = time.perf_counter() - start
        kept = _kept(analyzer, samples, units, until, fs, opened.info)
        rows = []
        for method in methods:
            begin, cpu = time.perf_counter(), time.process_time()
            groups, why = _run(method, analyzer, kept, until / fs, Path(folder))
            spent = {
                "seconds": round(time.perf_counter() - begin, 1),
                "cpu_s": round(time.process_time() - cpu, 1),
            }
            rows.append({"method": method, **judged(groups, of, wanted), **spent, "why": why})
            say(f"{method}: {rows[-1]['recovered']} of {len(wanted)}, {rows[-1]['wrong']} wrong ({why})")
        return {
            "bench": "merges", "recording": recording.name, "channels": opened.info.n_channels, "fs_hz": fs, "seconds": round(until / fs, 2), "sorting": "split on purpose" if sorting is None else str(sorting),
            "neurons": len(true.ids), "units": len(np.unique(units)), "kept": len(kept), "splits": len(wanted), "analyzer_s": round(built, 1), "rows": rows, "machine": conditions(),
        }  # fmt: skip


def split(
    true: Trains, fs_hz: float, recording: Any, folder: Path, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """(samples, units, {unit: neuron}): every second rich neuron in two, the second piece under an id of its own."""
    units = true.ids[true.index].astype(np.int64)
    rich = [int(u) for u, n in zip(true.ids, true.counts, strict=True) if n >= MIN_SPIKES]
    of = {int(u): int(u) for u in true.ids}
    rng = np.random.default_rng(seed)
    amplitude = _amplitudes(true, recording, folder)
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


def _amplitudes(true: Trains, recording: Any, folder: Path) -> np.ndarray:
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


def judged(groups: list[list[int]], of: dict[int, int], wanted: list[tuple[int, int]]) -> dict[str, int]:
    """Splits that were undone, and merges of what is not one neuron's."""
    group = {u: k for k, g in enumerate(groups) for u in g}
    recovered = sum(a in group and group[a] == group.get(b) for a, b in wanted)
    wrong = sum(len({of[u] for u in g}) > 1 or of[g[0]] < 0 for g in groups)
    return {"recovered": recovered, "groups": len(groups), "wrong": wrong}


def _kept(
    analyzer: Any, samples: np.ndarray, units: np.ndarray, n_samples: int, fs_hz: float, info: Any
) -> list[int]:
    """Units that our labels let merge; Kilosort's own are not asked."""
    shapes = analyze.shapes(analyzer, info.positions)
    rows = labels.label_units(samples, units, shapes, {}, {}, n_samples, fs_hz, info.n_channels)
    return [r.unit for r in rows if r.label in labels.KEPT]


def _run(
    method: str, analyzer: Any, kept: list[int], seconds: float, folder: Path
) -> tuple[list[list[int]], str]:
    who, similarity, *more = method.split(":")
    parameters = more[0] if more else "auto"
    if who == "ours":
        wish = Slay.model_validate({"similarity": similarity, "parameters": parameters})
        store = slay_network.Store(folder / "networks")
        found = merges.propose(analyzer.select_units(kept), wish, seconds, store, "cpu", lambda _f, _t: None)
        return found["groups"], f"{found['method']}: {found['why']}"
    try:
        return _package(analyzer.copy(), similarity, parameters, folder), ""
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as e:
        return [], " ".join(f"{type(e).__name__}: {e}".split())[:120]


def _package(analyzer: Any, similarity: str, parameters: str, folder: Path) -> list[list[int]]:
    """compute_slay_merges itself."""
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
    with joblib.parallel_config(backend="sequential"):
        groups, _, _ = compute_slay_merges(
            analyzer, merge_parameters="auto" if parameters == "auto" else None, similarity_type=similarity,
            **(options if similarity == "autoencoder" else {}),
        )  # fmt: skip
    return [[int(u) for u in g] for g in groups]
