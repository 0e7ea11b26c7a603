"""The steps of a curation. Each gives a figure and a verdict for every unit; none changes what an earlier one found."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiked import criteria
from spiked.criteria import Bound
from spiked.errors import ConfigError
from spiked.offline.curation import metrics

MERGE = "merge_duplicates"
Unit = Any  # an int, or a str where the sorting calls its units so


@dataclass(frozen=True)
class StepResult:
    """One step. `metric` and `mask` have all units that were there, also those set aside before.

    A unit whose figure cannot be had is in `unknown`, and passes. `merged` are {new unit: what it is made of}.
    """

    step: str
    metric: dict[Unit, float | None]
    mask: dict[Unit, bool]
    removed: list[Unit]  # by this step
    unknown: list[Unit] = field(default_factory=list)
    merged: dict[Unit, list[Unit]] = field(default_factory=dict)
    censor_ms: float = 0.0


@dataclass(frozen=True)
class Keep:
    """Units inside a bound stay."""

    bound: Bound

    def __str__(self) -> str:
        return str(self.bound)

    def run(self, analyzer: Any, kept: list[Unit], duration_s: float) -> tuple[StepResult, Any]:
        values = metrics.compute(analyzer, [self.bound.metric], duration_s)[self.bound.metric]
        held = {u: self.bound.holds(v) for u, v in values.items()}
        mask = {u: ok is not False for u, ok in held.items()}
        unknown = [u for u, ok in held.items() if ok is None]
        return StepResult(str(self), values, mask, [u for u in kept if not mask[u]], unknown), analyzer


@dataclass(frozen=True)
class MergeDuplicates:
    """Units near each other that look the same become one, where that adds no refractory violations."""

    max_distance_um: float = 25.0
    min_similarity: float = 0.9  # cosine of the average waveforms, at the best lag
    max_lag_ms: float = 0.5
    max_violations: float = 0.04  # share of intervals below 1.5 ms, of either unit
    max_rise: float = 0.01  # of that share by the merge
    censor_ms: float = 0.4  # spikes closer than this are one

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_distance_um", 0, np.inf), ("min_similarity", 0, 1), ("max_lag_ms", 0, 5), ("max_violations", 0, 1),
            ("max_rise", 0, 1), ("censor_ms", 0, 5),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{MERGE} {name} = {getattr(self, name):g} must lie between {low:g} and {high:g}"
                )
        if self.max_violations == 1 or self.max_rise == 1:
            raise ConfigError(f"{MERGE}: violations are shares from 0 to 1; write 1 % as 1% or 0.01")

    def __str__(self) -> str:
        said = [
            f"{f.name}={getattr(self, f.name):g}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return " ".join([MERGE, *said])

    def run(self, analyzer: Any, kept: list[Unit], duration_s: float) -> tuple[StepResult, Any]:
        """The metric is the similarity with the most alike neighbour; None: there is none near enough."""
        units = [_plain(u) for u in analyzer.unit_ids]
        best: dict[Unit, float | None] = dict.fromkeys(units)
        pairs = self._pairs(analyzer, kept) if len(kept) > 1 else []
        for a, b, alike in pairs:
            best |= {u: max(best[u] or 0.0, alike) for u in (a, b)}
        groups = self._groups(analyzer, pairs)
        merged: dict[Unit, list[Unit]] = {}
        if groups:
            analyzer, merged = self._merge(analyzer, groups)
        gone = [u for g in groups for u in g]
        mask = {u: u not in gone for u in units} | dict.fromkeys(merged, True)
        best |= dict.fromkeys(merged)
        return StepResult(str(self), best, mask, gone, [], merged, self.censor_ms), analyzer

    def _pairs(self, analyzer: Any, kept: list[Unit]) -> list[tuple[Unit, Unit, float]]:
        """(unit, unit, similarity) of neighbours that look the same, most alike first."""
        from spikeinterface.curation import compute_merge_unit_groups

        metrics.ensure(analyzer, "templates")
        some = analyzer.select_units([u for u in analyzer.unit_ids if _plain(u) in set(kept)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alike = some.compute(
                "template_similarity", method="cosine", max_lag_ms=self.max_lag_ms, save=False
            ).get_data()
            metrics.ensure(some, "unit_locations")
            found = compute_merge_unit_groups(
                some, steps=["unit_locations", "template_similarity"], resolve_graph=False,
                steps_params={
                    "unit_locations": {"max_distance_um": self.max_distance_um},
                    "template_similarity": {"similarity_method": "cosine", "template_diff_thresh": 1 - self.min_similarity},
                },
            )  # fmt: skip
        at = {_plain(u): k for k, u in enumerate(some.unit_ids)}
        pairs = [(_plain(a), _plain(b)) for a, b in found]
        return sorted(((a, b, float(alike[at[a], at[b]])) for a, b in pairs), key=lambda p: -p[2])

    def _groups(self, analyzer: Any, pairs: list[tuple[Unit, Unit, float]]) -> list[list[Unit]]:
        """Pairs joined one after the other, each whole group checked for violations."""
        fs = analyzer.sampling_frequency
        trains = {_plain(u): np.sort(analyzer.sorting.get_unit_spike_train(u)) for u in analyzer.unit_ids}
        group: dict[Unit, list[Unit]] = {}
        for a, b, _ in pairs:
            left, right = group.get(a, [a]), group.get(b, [b])
            if left is right:
                continue
            apart = [violations(trains[u], fs) for u in left + right]
            once = without_close(
                np.concatenate([trains[u] for u in left + right]), self.censor_ms * fs / 1000
            )
            if max(apart) <= self.max_violations and violations(once, fs) <= max(apart) + self.max_rise:
                group |= dict.fromkeys(left + right, left + right)
        return list({id(g): g for g in group.values()}.values())

    def _merge(self, analyzer: Any, groups: list[list[Unit]]) -> tuple[Any, dict[Unit, list[Unit]]]:
        """A new analyzer; averages are measured anew where there is a recording."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, new = analyzer.merge_units(
                groups, censor_ms=self.censor_ms, merging_mode="hard" if metrics.has_traces(analyzer) else "soft",
                new_id_strategy="append", return_new_unit_ids=True, n_jobs=1, progress_bar=False,
            )  # fmt: skip
        return whole, {_plain(n): g for n, g in zip(new, groups, strict=True)}


Step = Keep | MergeDuplicates


def step_of(text: str) -> Step:
    """'snr >= 5', 'isi_violations <= 1 %', 'merge_duplicates max_distance_um=50 max_rise=1%'; ConfigError for what is no step."""
    name, *rest = text.split() or [""]
    if name == MERGE:
        return MergeDuplicates(**dict(_parameter(p) for p in rest))
    try:
        return Keep(criteria.parse(text))
    except ValueError as e:
        raise ConfigError(f"step {e}") from e


def steps_of(texts: Iterable[str]) -> list[Step]:
    """All of them; the same metric twice is twice a step, and neither replaces the other."""
    return [step_of(t) for t in texts]


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = [f.name for f in dataclasses.fields(MergeDuplicates)]
    if name not in known:
        raise ConfigError(f"{MERGE} has no parameter {name!r}; known are {', '.join(known)}")
    try:
        return name, float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError as e:
        raise ConfigError(f"{MERGE} {text!r}: {value!r} is no number") from e


def violations(train: np.ndarray, fs_hz: float) -> float:
    """Share of spikes less than ISI_MS after the one before."""
    return float((np.diff(train) < metrics.ISI_MS * fs_hz / 1000).mean()) if len(train) > 1 else 0.0


def without_close(samples: np.ndarray, least: float) -> np.ndarray:
    """In order, without spikes at most `least` samples after the one before."""
    samples = np.sort(samples)
    return samples[np.concatenate([[True], np.diff(samples) > least])]


def _plain(unit: Any) -> Unit:
    return int(unit) if isinstance(unit, int | np.integer) else str(unit)
