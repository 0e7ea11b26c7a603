"""Waveforms, templates and quality of the sorted units, by SpikeInterface's SortingAnalyzer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from spiked.compiled import remember
from spiked.errors import OfflineError

BAND_HZ = (300.0, 6000.0)
MS_BEFORE, MS_AFTER = 1.0, 2.0
MAX_SPIKES = 300  # waveforms per unit
DENSE_CHANNELS = 128  # above this the analyzer is sparse
SPARSE_UM = 100.0
COMMON_REFERENCE_CHANNELS = 16  # fewer channels than this share too much signal for a common reference
JOB = {"n_jobs": 1, "chunk_duration": "1s", "progress_bar": False}


def filtered(recording: Any) -> Any:
    """The recording band-passed, and median-referenced where there are enough channels."""
    import spikeinterface.preprocessing as sp

    top = min(BAND_HZ[1], 0.45 * recording.sampling_frequency)
    out = sp.bandpass_filter(recording, freq_min=BAND_HZ[0], freq_max=top, dtype="float32")
    if recording.get_num_channels() >= COMMON_REFERENCE_CHANNELS:
        out = sp.common_reference(out, reference="global", operator="median")
    return out


def build(
    recording: Any,
    samples: np.ndarray,
    units: np.ndarray,
    folder: Path,
    say: Callable[[float, str], None],
) -> Any:
    """A SortingAnalyzer saved in `folder`: waveforms, templates, noise, amplitudes, correlograms, positions.

    `recording` is the int16 binary with gains; `samples`, `units` the spikes in time order. Unit ids stay
    integers. Raises OfflineError('biology') when there are no units.
    """
    import spikeinterface.core as si

    ids = np.unique(units)
    if not len(ids):
        raise OfflineError("Kilosort found no units", "biology", "analyze")
    sorting = si.NumpySorting.from_samples_and_labels([samples], [units], recording.sampling_frequency)
    shape = (
        {"sparse": False}
        if recording.get_num_channels() <= DENSE_CHANNELS
        else {"sparse": True, "method": "radius", "radius_um": SPARSE_UM}
    )
    analyzer = si.create_sorting_analyzer(
        sorting, filtered(recording), format="binary_folder", folder=folder, overwrite=True, **shape, **JOB
    )
    steps: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("random_spikes", "choosing spikes", {"max_spikes_per_unit": MAX_SPIKES, "seed": 0}),
        ("noise_levels", "measuring noise", {"random_slices_kwargs": {"seed": 0}}),
        ("waveforms", "reading waveforms", {"ms_before": MS_BEFORE, "ms_after": MS_AFTER}),
        ("templates", "averaging templates", {"operators": ["average", "std"]}),
        ("spike_amplitudes", "reading amplitudes", {}),
        ("unit_locations", "locating units", {"method": "monopolar_triangulation"}),
        ("template_similarity", "comparing templates", {"method": "l2"}),
        ("correlograms", "correlograms", {"window_ms": 100.0, "bin_ms": 0.5}),
        (
            "quality_metrics",
            "quality metrics",
            {"metric_names": ["num_spikes", "firing_rate", "presence_ratio", "snr"]},
        ),
    )
    remember("spikeinterface.postprocessing.template_similarity", "_compute_similarity_matrix_numba")  # 10 s
    for k, (name, text, parameters) in enumerate(steps):
        say(k / len(steps), f"{text} of {len(ids)} units")
        job = JOB if name in ("waveforms", "spike_amplitudes", "noise_levels") else {}
        analyzer.compute(name, **parameters, **job)
    return analyzer


def load(folder: Path) -> Any:
    """The analyzer saved in `folder`."""
    import spikeinterface.core as si

    return si.load_sorting_analyzer(folder)


def only(analyzer: Any, units: Collection[int]) -> Any:
    """The analyzer with these units alone, in the order in which it has them.

    SpikeInterface's own select_units takes ids in any order, and leaves waveforms, templates and similarities in the analyzer's: each unit
    then has the figures of another.
    """
    wanted = {int(u) for u in units}
    return analyzer.select_units([u for u in analyzer.unit_ids if int(u) in wanted])


def shapes(analyzer: Any, positions_um: np.ndarray) -> dict[int, dict[str, float]]:
    """Per unit, from its average template in microvolt: what the labels and the report need.

    peak_uv (signed, on the peak channel), snr (|peak| over that channel's MAD noise), channel (index),
    x_um, y_um (peak channel), footprint (share of channels with at least half the peak), edge (the peak
    lies in the first or last tenth of the window), width_ms (time between trough and the following peak).
    """
    templates = analyzer.get_extension("templates").get_templates(operator="average")
    noise = np.asarray(analyzer.get_extension("noise_levels").get_data())
    fs, n = analyzer.sampling_frequency, templates.shape[1]
    out: dict[int, dict[str, float]] = {}
    for unit, t in zip(analyzer.unit_ids, templates, strict=True):
        depth = np.abs(t).max(0)
        channel = int(depth.argmax())
        at = int(np.abs(t[:, channel]).argmax())
        peak = float(t[at, channel])
        after = t[at:, channel] * -np.sign(peak)
        out[int(unit)] = {
            "peak_uv": peak,
            "snr": abs(peak) / max(float(noise[channel]), 1e-9),
            "channel": channel,
            "x_um": float(positions_um[channel, 0]),
            "y_um": float(positions_um[channel, 1]),
            "footprint": float((depth >= 0.5 * depth.max()).mean()),
            "edge": float(at < n // 10 or at >= n - n // 10),
            "width_ms": float(after.argmax() * 1000 / fs),
        }
    return out
