"""Quality metrics of all units by name: SpikeInterface's where it has them, ours where it does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from spiked.criteria import METRICS
from spiked.errors import OfflineError

ISI_MS = 1.5
NEEDS = {  # what SpikeInterface wants computed before
    "snr": ("noise_levels", "templates"),
    "amplitude_cv": ("spike_amplitudes",),
    "amplitude_cutoff": ("spike_amplitudes",),
    "noise_cutoff": ("spike_amplitudes",),
    "amplitude_median": ("spike_amplitudes",),
    "drift": ("spike_locations",),
    "sd_ratio": ("noise_levels", "spike_amplitudes"),
    "mahalanobis": ("principal_components",),
    "d_prime": ("principal_components",),
    "nearest_neighbor": ("principal_components",),
    "silhouette": ("principal_components",),
    "nn_advanced": ("principal_components",),
    "waveform_std": ("waveforms",),
}
FIRST = ("random_spikes", "waveforms", "templates")  # of these all others are made
NEEDS_TRACES = ("waveforms", "templates", "spike_amplitudes", "spike_locations", "noise_levels")
LONG_BIN_S, SHORT_BINS = 300.0, 10  # of the presence ratio: five minutes, or tenths of a shorter recording
PARAMETERS: dict[str, dict[str, Any]] = {
    "random_spikes": {"max_spikes_per_unit": 300, "seed": 0},
    "noise_levels": {"random_slices_kwargs": {"seed": 0}},
    "waveforms": {"ms_before": 1.0, "ms_after": 2.0},
    "templates": {"operators": ["average", "std"]},
    "principal_components": {"n_components": 3, "mode": "by_channel_local"},
}
QUIET = {"n_jobs": 1, "progress_bar": False}
TAKES_JOBS = (
    "waveforms",
    "templates",
    "spike_amplitudes",
    "spike_locations",
    "noise_levels",
    "principal_components",
)


def compute(analyzer: Any, names: Iterable[str], duration_s: float) -> dict[str, dict[Any, float | None]]:
    """{metric: {unit id: value}} for all units; None where a unit has too few spikes for a value.

    What is missing is computed in memory; a saved analyzer stays as it is on disk. Raises OfflineError where the analyzer has no
    recording and what it holds is not enough.
    """
    names = [n for n in dict.fromkeys(names) if n != "kilosort_contamination"]
    wanted = dict.fromkeys(METRICS[n].computed_by for n in names if METRICS[n].computed_by)
    if "isi_violations" in names:
        wanted |= dict.fromkeys(("num_spikes", "isi_violation"))
    for metric in (*wanted, *names):
        for extension in NEEDS.get(metric, ()):
            ensure(analyzer, extension)
    table = _spikeinterface(analyzer, list(wanted), duration_s)
    ids = [_plain(u) for u in analyzer.unit_ids]
    out: dict[str, dict[Any, float | None]] = {}
    for name in names:
        if name == "waveform_std":
            out[name] = waveform_std(analyzer)
        elif name == "contamination":
            out[name] = contamination(analyzer, duration_s)
        elif name == "isi_violations":
            share = {u: _ratio(table["isi_violations_count"][u], table["num_spikes"][u]) for u in ids}
            out[name] = share
        elif name in table:
            out[name] = table[name]
        else:
            raise OfflineError(
                f"SpikeInterface gives no {name} for these units; leave it out, or see its warnings with -v"
            )
    return out


def ensure(analyzer: Any, extension: str) -> None:
    """Compute an extension, and what it is made of, where it is missing."""
    if analyzer.has_extension(extension):
        return
    if extension != "noise_levels":
        for name in FIRST[: FIRST.index(extension)] if extension in FIRST else FIRST:
            ensure(analyzer, name)
    if extension in NEEDS_TRACES and not has_traces(analyzer):
        raise OfflineError(
            f"{extension.replace('_', ' ')} must be measured, and there is no recording to measure them in; give it with --recording"
        )
    job = QUIET if extension in TAKES_JOBS else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analyzer.compute(extension, **PARAMETERS.get(extension, {}), save=False, **job)


def has_traces(analyzer: Any) -> bool:
    """Whether there are samples to measure in."""
    there = analyzer.has_recording() or analyzer.has_temporary_recording()
    return bool(there and not analyzer.recording.get_annotation("no_samples"))


def _spikeinterface(
    analyzer: Any, metrics: list[str], duration_s: float
) -> dict[str, dict[Any, float | None]]:
    """{column: {unit id: value}} of SpikeInterface's metrics."""
    if not metrics:
        return {}
    bins = max(SHORT_BINS, int(duration_s // LONG_BIN_S))
    parameters = {
        "presence_ratio": {"bin_duration_s": duration_s / bins},
        "isi_violation": {"isi_threshold_ms": ISI_MS},
        "nn_advanced": {"seed": 0},
    }
    with warnings.catch_warnings():  # about units with few spikes: None says it
        warnings.simplefilter("ignore")
        found = analyzer.compute(
            "quality_metrics", metric_names=metrics, metric_params={k: v for k, v in parameters.items() if k in metrics},
            delete_existing_metrics=True, save=False,
        ).get_data()  # fmt: skip
    rows = [(_plain(u), row) for u, row in found.iterrows()]
    return {str(c): {u: known(row[c]) for u, row in rows} for c in found.columns}


def waveform_std(analyzer: Any) -> dict[Any, float | None]:
    """Standard deviation over the average's peak, both at the peak of the largest electrode: 0 for spikes all alike."""
    out: dict[Any, float | None] = {}
    extension = analyzer.get_extension("waveforms")
    for unit in analyzer.unit_ids:
        waveforms = extension.get_waveforms_one_unit(unit, force_dense=False)
        if len(waveforms) < 2:
            out[_plain(unit)] = None
            continue
        mean = waveforms.mean(0)
        at = np.unravel_index(np.abs(mean).argmax(), mean.shape)
        out[_plain(unit)] = known(float(waveforms[:, at[0], at[1]].std() / max(abs(float(mean[at])), 1e-9)))
    return out


def contamination(analyzer: Any, duration_s: float) -> dict[Any, float | None]:
    """Share of foreign spikes by refractory violations, echoes left out (`labels.refractory`)."""
    from spiked.offline.labels import LabelRules, refractory
    from spiked.offline.labels import contamination as share

    rules, fs = LabelRules(), analyzer.sampling_frequency
    trains = {u: analyzer.sorting.get_unit_spike_train(u) for u in analyzer.unit_ids}
    return {_plain(u): share(*refractory(np.sort(t), fs, duration_s, rules)) for u, t in trains.items()}


def known(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _plain(unit: Any) -> Any:
    return int(unit) if isinstance(unit, int | np.integer) else str(unit)
