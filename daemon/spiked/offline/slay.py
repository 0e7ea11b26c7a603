"""SLAy's scores of pairs of units, with the package's own metrics, and its parameters chosen on units split on purpose.

SLAy: Koukuntla et al. 2025, bioRxiv 2025.06.20.660590. A pair's score is similarity + k1 * correlogram metric - k2 * refractory penalty;
pairs above the threshold whose peak electrodes are near are merged, groups only where every pair in them is above it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import poisson

from spiked.config import Slay
from spiked.offline.labels import LabelRules

ALIKE, ALIKE_UM = (
    0.8,
    50.0,
)  # pairs at least so similar and so near are taken for the same until their spikes object
DIP = 0.05  # as likely as that, so few spikes within the refractory period are no chance
SHOULDER_MS = (5.0, 50.0)  # where two units' spikes show how often they would meet by chance
MIN_SPLITS = 10  # fewer units split on purpose say nothing: from four of them SLAy once chose to lose three of four true merges


@dataclass(frozen=True)
class Scores:
    """(units, units) each, symmetric. `ccg_metric` -4: too few coincidences to tell."""

    similarity: np.ndarray
    ccg_metric: np.ndarray
    refractory_penalty: np.ndarray

    def final(self, k1: float, k2: float) -> np.ndarray:
        score = self.similarity + k1 * self.ccg_metric - k2 * self.refractory_penalty
        score = np.minimum(score, score.T)
        np.fill_diagonal(score, 0)
        return score


@contextlib.contextmanager
def held() -> Iterator[None]:
    """The package without processes of its own and without progress bars.

    It asks joblib for all cores; the workers that are started would each import torch and SpikeInterface anew.
    """
    import joblib
    import slay.autoselect_params
    import slay.metrics
    from tqdm import tqdm

    def quiet(items: Any, **_: Any) -> Any:
        return items

    modules = (slay.metrics, slay.autoselect_params)
    for module in modules:
        module.tqdm = quiet
    try:
        with joblib.parallel_config(backend="sequential"):
            yield
    finally:
        for module in modules:
            module.tqdm = tqdm


def l2(analyzer: Any) -> np.ndarray:
    """(units, units) similarity of the average templates."""
    from spikeinterface.postprocessing import compute_template_similarity

    extension = analyzer.get_extension("template_similarity")
    if extension is not None and extension.params["method"] == "l2":
        return np.asarray(extension.get_data())
    return np.asarray(compute_template_similarity(analyzer, method="l2", save=False))


def correlograms(analyzer: Any, wish: Slay) -> np.ndarray:
    """(units, units, bins) of the wished window and bin."""
    extension = analyzer.get_extension("correlograms")
    if extension is None or (extension.params["window_ms"], extension.params["bin_ms"]) != (
        wish.window_ms,
        wish.bin_ms,
    ):
        extension = analyzer.compute("correlograms", window_ms=wish.window_ms, bin_ms=wish.bin_ms, save=False)
    return np.asarray(extension.get_data()[0])


def scores(analyzer: Any, similarity: np.ndarray, wish: Slay) -> Scores:
    """The package's metrics of all pairs that are similar enough."""
    from slay.metrics import compute_ccg_metric, compute_refractory_penalty

    similarity = np.minimum(similarity, similarity.T)  # of a sparse analyzer the package's is not symmetric
    candidates = similarity >= wish.min_similarity
    counts = correlograms(analyzer, wish)
    with held():
        ccg = compute_ccg_metric(analyzer, counts, wish.bin_ms, candidates)
        penalty = compute_refractory_penalty(
            analyzer, counts, wish.bin_ms, wish.max_contamination, candidates
        )
    return Scores(similarity, ccg, penalty)


def weighed(analyzer: Any, found: Scores, wish: Slay) -> Scores:
    """The scores for sessions of minutes, where a correlogram of two units holds a handful of spikes: what those few say, and no more.

    The package asks the correlogram for proof that two units are one, and in minutes there mostly is none. Its scale is the highest bin,
    which one spike found by both units fills as well as a burst would. Here the spikes within the refractory period are counted and held
    against those that two independent cells with these rates would have there, second detections left out:

    - units that look different need the spikes' word: clearly fewer than that, or they are not merged;
    - units that look the same, nearly and side by side, are merged unless the spikes object: clearly more than a contaminated cell's.
    """
    from spikeinterface.curation.auto_merge import compute_xcorr_and_rp

    near = peak_distances(analyzer)
    candidates = np.triu((found.similarity >= wish.min_similarity) & (near < wish.max_distance_um), 1)
    if not candidates.any():
        return found
    alike = candidates & (found.similarity >= ALIKE) & (near <= ALIKE_UM)
    correlograms(analyzer, wish)
    full, _ = compute_xcorr_and_rp(analyzer, alike)
    ccg = np.where(alike | alike.T, np.maximum(found.ccg_metric, full + full.T), found.ccg_metric)
    penalty = found.refractory_penalty.copy()
    for i, j in np.argwhere(candidates).tolist():
        seen, expected = refractory_pairs(analyzer, i, j)
        if alike[i, j]:
            penalty[i, j] = penalty[j, i] = poisson.cdf(seen - 1, wish.max_contamination * expected)
        elif poisson.cdf(seen, expected) > DIP:
            penalty[i, j] = penalty[j, i] = max(penalty[i, j], 1.0)
    return Scores(found.similarity, ccg, penalty)


def refractory_pairs(analyzer: Any, i: int, j: int) -> tuple[int, float]:
    """(pairs of spikes of two units, by row, within the refractory period; how many independent cells with their rates would have).

    The rates are those of SHOULDER_MS around each other: units that never fire at the same time of the session tell nothing.
    """
    sorting, fs = analyzer.sorting, analyzer.sampling_frequency
    a, b = (np.sort(sorting.get_unit_spike_train(analyzer.unit_ids[k])) for k in (i, j))

    def between(low_ms: float, high_ms: float) -> int:
        low, high = low_ms * fs / 1000, high_ms * fs / 1000
        later = np.searchsorted(b, a + high, "right") - np.searchsorted(b, a + low, "right")
        earlier = np.searchsorted(b, a - low, "left") - np.searchsorted(b, a - high, "left")
        return int(later.sum() + earlier.sum())

    rules = LabelRules()
    period = rules.refractory_ms - rules.censored_ms
    seen = between(rules.censored_ms, rules.refractory_ms)
    return seen, between(*SHOULDER_MS) * period / (SHOULDER_MS[1] - SHOULDER_MS[0])


def peak_distances(analyzer: Any) -> np.ndarray:
    """(units, units) um between the electrodes with the largest average waveform."""
    templates = analyzer.get_extension("templates").get_templates(operator="average")
    peak = analyzer.get_channel_locations()[np.ptp(templates, axis=1).argmax(1)]
    return np.asarray(cdist(peak, peak))


def grouped(score: np.ndarray, near: np.ndarray, threshold: float) -> list[list[int]]:
    """Which rows to merge: pairs in order of their score, groups joined where all pairs in them reach the threshold.

    SLAy's rule, with every pair looked at once (its own halving of the sorted matrix loses pairs of equal score).
    """
    n = len(score)
    first, second = np.triu_indices(n, 1)
    values = score[first, second]
    wanted = np.flatnonzero((values > threshold) & near[first, second])
    group: dict[int, list[int]] = {}
    for k in wanted[np.argsort(-values[wanted], kind="stable")].tolist():
        i, j = int(first[k]), int(second[k])
        a, b = group.get(i, [i]), group.get(j, [j])
        if a is b:
            continue
        whole = a + b
        if all(score[x, y] >= threshold for x in a for y in b):
            group |= dict.fromkeys(whole, whole)
    return sorted(sorted(g) for g in {id(g): g for g in group.values()}.values())


def automatic(
    analyzer: Any, similarity_of: Callable[[Any], np.ndarray], wish: Slay
) -> tuple[dict[str, float] | None, str]:
    """(k1, k2 and merge_threshold, why), or None and why there are none, from units that are split on purpose.

    The package splits units of at least 1000 spikes (bursts, amplitude, time, at random) and takes the parameters that
    find most of the splits for the fewest merges.
    """
    from slay.artificial_splits import make_artificial_splits
    from slay.autoselect_params import (
        compute_parameter_performances,
        get_best_parameters,
        get_pareto_frontier,
    )

    rich = sum(n >= 1000 for n in analyzer.sorting.count_num_spikes_per_unit(outputs="array"))
    planned = 4 * int(wish.split_share / 4 * len(analyzer.unit_ids))
    if min(rich, planned) < MIN_SPLITS:
        return None, f"of {MIN_SPLITS} units that are needed {min(rich, planned)} could be split on purpose"
    try:
        split, pairs, kinds = make_artificial_splits(analyzer, wish.split_share)
    except (ValueError, IndexError, KeyError, TypeError) as e:
        return None, f"no unit could be split on purpose ({type(e).__name__})"
    if len(pairs) < MIN_SPLITS:
        return None, f"of {MIN_SPLITS} units that are needed {len(pairs)} could be split on purpose"
    found = scores(split, similarity_of(split), wish)
    with held():
        tried, merged, recall = compute_parameter_performances(
            None, split, list(pairs.values()), list(kinds.values()), found.similarity, found.ccg_metric, found.refractory_penalty
        )  # fmt: skip
    best = get_pareto_frontier(merged, recall)
    chosen = get_best_parameters([tried[k] for k in best], merged[best], recall[best]) or tried[best[0]]
    why = f"of {len(pairs)} units split on purpose they find {chosen['recall']:.0%}"
    return {k: float(chosen[k]) for k in ("k1", "k2", "merge_threshold")}, why
