"""Which units are pieces of one neuron: SLAy where it can run, SpikeInterface's preset elsewhere; and the merges themselves.

The autoencoder and parameters chosen on artificial splits need many units with many spikes; for sessions of minutes the template
distance with fixed parameters finds the most true merges (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Slay
from spiked.offline import slay, slay_network
from spiked.offline.truth import Trains

AUTOENCODER_UNITS, AUTOENCODER_S = 40, 1200.0
TOLD_PAIRS = 30

Say = Callable[[float, str], None]


def choose(
    similarity: str, n_units: int, duration_s: float, n_channels: int, channels: int = 8
) -> tuple[str, str]:
    """(method, why): slay_l2, slay_autoencoder, spikeinterface or none, for the wished `similarity`."""
    have_slay = importlib.util.find_spec("slay") is not None
    if similarity == "none":
        return "none", "merging is switched off"
    if n_units < 2:
        return "none", f"{n_units} unit{'s' * (n_units != 1)} left: nothing to merge"
    if similarity == "spikeinterface" or not have_slay:
        return "spikeinterface", "as configured" if have_slay else "SLAy is not installed (Python 3.11 only)"
    if similarity == "auto":
        long = n_units >= AUTOENCODER_UNITS and duration_s >= AUTOENCODER_S
        if long and n_channels >= channels:
            return "slay_autoencoder", f"{n_units} units in {duration_s:.0f} s"
        needs = f"{AUTOENCODER_UNITS} units, {AUTOENCODER_S / 60:.0f} min and {channels} electrodes"
        return "slay_l2", f"{n_units} units in {duration_s:.0f} s; the autoencoder needs {needs}"
    return f"slay_{similarity}", "as configured"


def propose(
    analyzer: Any,
    wish: Slay,
    duration_s: float,
    store: slay_network.Store,
    device: str,
    say: Say,
    witnesses: Collection[Any] = (),
) -> dict[str, Any]:
    """Units to merge: {"groups": [[ids]], "method", "why", "parameters", "pairs": scores, best first}.

    `analyzer` holds the units that may merge, and second detections of some, the `witnesses`: they take part in forming the groups, so
    that two neurons with a duplicate each are not taken for one, and are then left out. A method that fails on this session gives
    way to SpikeInterface's preset, and `why` says so.
    """
    n = len(analyzer.unit_ids) - len(witnesses)
    method, why = choose(wish.similarity, n, duration_s, analyzer.get_num_channels(), wish.channels)
    result: dict[str, Any] = {"groups": [], "method": method, "why": why, "parameters": {}, "pairs": []}
    if method == "none":
        return result
    say(0.1, f"looking for merges among {n} units ({method})")
    if method.startswith("slay"):
        try:
            found = _slay(analyzer, method, why, wish, store, device, say)
            return result | _without(found, witnesses)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, ImportError, ArithmeticError) as e:
            line = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            result |= {"method": "spikeinterface", "why": f"SLAy failed ({type(e).__name__}: {line})"}
    return result | _without(_spikeinterface(analyzer, wish), witnesses)


def _without(found: dict[str, Any], witnesses: Collection[Any]) -> dict[str, Any]:
    """What is left of groups and pairs when the witnesses have gone."""
    groups = [[u for u in g if u not in witnesses] for g in found["groups"]]
    pairs = [p for p in found["pairs"] if p["a"] not in witnesses and p["b"] not in witnesses]
    return {**found, "groups": [g for g in groups if len(g) > 1], "pairs": pairs}


def _slay(
    analyzer: Any, method: str, why: str, wish: Slay, store: slay_network.Store, device: str, say: Say
) -> dict[str, Any]:
    """SLAy's scores and groups; with the autoencoder, parameters from artificial splits where there are enough."""
    similarity_of: Callable[[Any], np.ndarray] = slay.l2
    told = [why]
    if method == "slay_autoencoder":
        network, how = slay_network.network_for(
            analyzer, wish, store, device, lambda f, t: say(0.1 + 0.6 * f, t)
        )
        channels = min(wish.channels, analyzer.get_num_channels())
        similarity_of = functools.partial(slay_network.similarity, network=network, channels=channels)
        told.append(how)
    found = slay.scores(analyzer, similarity_of(analyzer), wish)
    if wish.similarity == "auto":
        found = slay.weighed(analyzer, found, wish)
    parameters: dict[str, Any] = {"k1": wish.k1, "k2": wish.k2, "merge_threshold": wish.threshold}
    if wish.parameters == "auto":
        say(0.8, "splitting units on purpose, to choose the parameters")
        chosen, how = slay.automatic(analyzer, similarity_of, wish)
        parameters |= chosen or {}
        told.append(f"{'parameters chosen' if chosen else 'fixed parameters'}: {how}")
    how_alike = method.removeprefix("slay_")
    return {"why": "; ".join(told)} | _result(analyzer, found, parameters, wish, how_alike)


def _spikeinterface(analyzer: Any, wish: Slay) -> dict[str, Any]:
    """The scores of SpikeInterface's "slay" preset, at the similarity that SLAy asks for (the preset's own is 0.75 of l1)."""
    from spikeinterface.curation.auto_merge import compute_xcorr_and_rp

    slay.correlograms(analyzer, wish)
    alike = slay.l2(analyzer)
    alike = np.minimum(alike, alike.T)
    candidates = np.triu(alike >= wish.min_similarity, 1)
    ccg, penalty = compute_xcorr_and_rp(analyzer, candidates)
    found = slay.Scores(alike, ccg + ccg.T, penalty + penalty.T)
    parameters = {"k1": wish.k1, "k2": wish.k2, "merge_threshold": wish.threshold}
    return _result(analyzer, found, parameters, wish, "l2")


def _result(
    analyzer: Any, found: slay.Scores, parameters: dict[str, Any], wish: Slay, similarity: str
) -> dict[str, Any]:
    """Groups of unit ids and the scores behind them."""
    ids = [_plain(u) for u in analyzer.unit_ids]
    distance = slay.peak_distances(analyzer)
    score = found.final(parameters["k1"], parameters["k2"])
    rows = slay.grouped(
        np.where(found.similarity >= wish.min_similarity, score, -np.inf), distance < wish.max_distance_um, parameters["merge_threshold"]
    )  # fmt: skip
    groups = [sorted(ids[k] for k in row) for row in rows]
    limits = {
        "similarity": similarity,
        "min_similarity": wish.min_similarity,
        "max_distance_um": wish.max_distance_um,
    }
    return {
        "groups": groups,
        "parameters": {**parameters, **limits},
        "pairs": _pairs(ids, found, score, distance, rows),
    }


def _plain(unit: Any) -> Any:
    return int(unit) if isinstance(unit, int | np.integer) else str(unit)


def _pairs(
    ids: list[Any], found: slay.Scores, score: np.ndarray, distance: np.ndarray, groups: list[list[int]]
) -> list[dict[str, Any]]:
    """Every pair inside a merge, and the best of the others, best first, each with the parts of its score."""
    together = {(i, j) for g in groups for i in g for j in g if i < j}
    first, second = np.triu_indices(len(ids), 1)
    order = np.argsort(-score[first, second], kind="stable")
    rows, others = [], 0
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        merged = (i, j) in together
        if not merged and (others >= TOLD_PAIRS or not found.ccg_metric[i, j] or found.similarity[i, j] <= 0):
            continue
        others += not merged
        parts = {"similarity": found.similarity, "ccg_metric": found.ccg_metric, "refractory_penalty": found.refractory_penalty, "final_metric": score, "distance_um": distance}  # fmt: skip
        rows.append(
            {
                "a": ids[i],
                "b": ids[j],
                **{k: round(float(v[i, j]), 4) for k, v in parts.items()},
                "merged": merged,
            }
        )
    return rows


def merged_analyzer(
    analyzer: Any, groups: list[list[int]], folder: Path, censor_ms: float, first_id: int
) -> tuple[Any, dict[int, list[int]], dict[int, int]]:
    """(a new analyzer in `folder` with the groups merged, {new unit: its parts}, {new unit: spikes that were there twice}).

    New units are numbered from `first_id` on: the ids of units that were set aside are not in `analyzer`, and must not be given twice.
    Templates are measured anew from the recording; of spikes closer than `censor_ms` in a merged unit the first stays.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if not groups:
        return analyzer.save_as(format="binary_folder", folder=folder), {}, {}
    merged, new_ids = analyzer.merge_units(
        groups,
        merging_mode="hard",
        new_unit_ids=list(range(first_id, first_id + len(groups))),
        censor_ms=censor_ms,
        return_new_unit_ids=True,
        format="binary_folder",
        folder=folder,
        n_jobs=1,
        progress_bar=False,
    )
    mapping = {int(new): sorted(int(u) for u in old) for new, old in zip(new_ids, groups, strict=True)}
    before = analyzer.sorting.count_num_spikes_per_unit(outputs="dict")
    after = merged.sorting.count_num_spikes_per_unit(outputs="dict")
    return merged, mapping, {u: int(sum(before[p] for p in parts) - after[u]) for u, parts in mapping.items()}


def trains(analyzer: Any) -> Trains:
    """The spike trains an analyzer holds."""
    vector = analyzer.sorting.to_spike_vector()
    ids = np.array([int(u) for u in analyzer.unit_ids])
    return Trains.of(vector["sample_index"], ids[vector["unit_index"]])
