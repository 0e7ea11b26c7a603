"""Which units are pieces of one neuron: SLAy where it can run, SpikeInterface's preset elsewhere.

SLAy: Koukuntla et al. 2025, bioRxiv 2025.06.20.660590; a pair's score is similarity + k1 * correlogram metric
- k2 * refractory penalty. Its automatic parameters and its autoencoder need many units with many spikes; for
sessions of minutes the template distance with fixed parameters found the most true merges.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.offline.truth import Trains

MANUAL = {"k1": 0.25, "k2": 1.0, "merge_threshold": 0.5}
CORRELOGRAM = {"window_ms": 100.0, "bin_ms": 0.5, "method": "auto"}
MAX_DISTANCE_UM = 100
CENSOR_MS = 0.3
AUTOENCODER_UNITS, AUTOENCODER_S, AUTOENCODER_CHANNELS = 40, 1200.0, 8
AUTOENCODER_MIN_SPIKES = 20
SNIPPET_MS = (0.5, 1.5)  # around the spike, for the autoencoder


def choose(merger: str, n_units: int, duration_s: float, n_channels: int) -> tuple[str, str]:
    """(method, why): slay_l2, slay_autoencoder, spikeinterface or none, for the wished `merger`."""
    have_slay = importlib.util.find_spec("slay") is not None
    if merger == "none":
        return "none", "curation is switched off"
    if n_units < 2:
        return "none", f"{n_units} unit{'s' * (n_units != 1)} left: nothing to merge"
    if merger == "spikeinterface" or not have_slay:
        return "spikeinterface", "as configured" if have_slay else "SLAy is not installed (Python 3.11 only)"
    if merger == "auto":
        long = n_units >= AUTOENCODER_UNITS and duration_s >= AUTOENCODER_S
        if long and n_channels >= AUTOENCODER_CHANNELS:
            return "slay_autoencoder", f"{n_units} units in {duration_s:.0f} s"
        needs = f"{AUTOENCODER_UNITS} units and {AUTOENCODER_S / 60:.0f} min"
        return "slay_l2", f"{n_units} units in {duration_s:.0f} s; the autoencoder needs {needs}"
    if merger == "slay_autoencoder" and n_channels < AUTOENCODER_CHANNELS:
        return "slay_l2", f"the autoencoder needs {AUTOENCODER_CHANNELS} channels"
    return merger, "as configured"


def propose(
    analyzer: Any, merger: str, duration_s: float, folder: Path, say: Callable[[float, str], None]
) -> dict[str, Any]:
    """Units to merge: {"groups": [[ids]], "method", "why", "parameters", "pairs": scores of candidates}.

    `analyzer` holds the units that may merge, dense, with integer ids. A method that fails on this
    session gives way to SpikeInterface's preset, and `why` says so.
    """
    method, why = choose(merger, len(analyzer.unit_ids), duration_s, analyzer.get_num_channels())
    result: dict[str, Any] = {"groups": [], "method": method, "why": why, "parameters": {}, "pairs": []}
    if method == "none":
        return result
    say(0.1, f"looking for merges among {len(analyzer.unit_ids)} units ({method})")
    if method.startswith("slay"):
        try:
            return result | _slay(analyzer, method, folder)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as e:
            line = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            result |= {"method": "spikeinterface", "why": f"SLAy failed ({type(e).__name__}: {line})"}
    return result | _spikeinterface(analyzer)


def _slay(analyzer: Any, method: str, folder: Path) -> dict[str, Any]:
    """SLAy with its joblib calls held to this process: its own default starts a process per core."""
    import joblib
    import torch
    from slay import compute_slay_merges

    torch.manual_seed(0)
    options: dict[str, Any] = {"similarity_type": "l2"}
    if method == "slay_autoencoder":
        options = _autoencoder(analyzer, folder)
    with joblib.parallel_config(backend="threading", n_jobs=1):
        groups, _, metrics = compute_slay_merges(
            analyzer,
            merge_parameters=MANUAL,
            max_distance=MAX_DISTANCE_UM,
            correlogram_params=CORRELOGRAM,
            **options,
        )
    ids = [int(u) for u in analyzer.unit_ids]
    return {
        "groups": [sorted(int(u) for u in g) for g in groups],
        "parameters": {
            **MANUAL,
            "similarity": options["similarity_type"],
            "max_distance_um": MAX_DISTANCE_UM,
        },
        "pairs": _pairs(ids, metrics),
    }


def _autoencoder(analyzer: Any, folder: Path) -> dict[str, Any]:
    """SLAy's network sized to this rate's snippets; trained per session, kept beside the analyzer."""
    from slay.autoencoder import AE

    n = int(SNIPPET_MS[0] * analyzer.sampling_frequency / 1000) + int(
        SNIPPET_MS[1] * analyzer.sampling_frequency / 1000
    )
    if min(len(analyzer.sorting.get_unit_spike_train(u)) for u in analyzer.unit_ids) < AUTOENCODER_MIN_SPIKES:
        raise ValueError(f"a unit has fewer than {AUTOENCODER_MIN_SPIKES} spikes")
    return {
        "similarity_type": "autoencoder",
        "autoencoder_params": {
            "num_chan": AUTOENCODER_CHANNELS,
            "ms_before": SNIPPET_MS[0],
            "ms_after": SNIPPET_MS[1],
        },
        "autoencoder_architecture": functools.partial(AE, num_chan=AUTOENCODER_CHANNELS, num_samp=n),
        "model_path": str(folder / f"slay_autoencoder_{n}x{AUTOENCODER_CHANNELS}.pt"),
        "retrain_autoencoder": True,
    }


def _pairs(ids: list[int], metrics: dict[str, np.ndarray], top: int = 30) -> list[dict[str, float]]:
    """The best-scored pairs with their parts, best first."""
    final = np.triu(metrics["final_metric"], 1)
    order = np.argsort(final, axis=None)[::-1][:top]
    rows = []
    for i, j in zip(*np.unravel_index(order, final.shape), strict=True):
        if j > i and metrics["similarity"][i, j] > 0:
            parts = {k: round(float(v[i, j]), 4) for k, v in metrics.items()}
            rows.append({"a": ids[i], "b": ids[j], **parts})
    return rows


def _spikeinterface(analyzer: Any) -> dict[str, Any]:
    from spikeinterface.curation import compute_merge_unit_groups

    groups = compute_merge_unit_groups(analyzer, preset="slay", resolve_graph=True, force_copy=True)
    return {
        "groups": [sorted(int(u) for u in g) for g in groups],
        "parameters": {"preset": "slay"},
        "pairs": [],
    }


def merged_analyzer(analyzer: Any, groups: list[list[int]], folder: Path) -> tuple[Any, dict[int, list[int]]]:
    """A new analyzer in `folder` with the groups merged (hard mode: recomputed from the recording)."""
    shutil.rmtree(folder, ignore_errors=True)
    if not groups:
        return analyzer.save_as(format="binary_folder", folder=folder), {}
    merged, new_ids = analyzer.merge_units(
        groups,
        merging_mode="hard",
        new_id_strategy="append",
        censor_ms=CENSOR_MS,
        return_new_unit_ids=True,
        format="binary_folder",
        folder=folder,
        n_jobs=1,
        progress_bar=False,
    )
    return merged, {int(new): sorted(int(u) for u in old) for new, old in zip(new_ids, groups, strict=True)}


def trains(analyzer: Any) -> Trains:
    """The spike trains an analyzer holds."""
    vector = analyzer.sorting.to_spike_vector()
    ids = np.array([int(u) for u in analyzer.unit_ids])
    return Trains.of(vector["sample_index"], ids[vector["unit_index"]])
