"""The lab's own criteria for a good unit, in place of our rules: every unit with the figure that decided.

What is no neuron's waveform, or a second detection of another unit's spikes, stays noise. A unit good by every figure that is known,
with one that needs more spikes than it has, is undetermined and stays in.
"""

from __future__ import annotations

from dataclasses import replace

from spiked.criteria import Bound
from spiked.offline.labels import LabelRules, UnitLabel

Values = dict[str, dict[int, float | None]]


def relaxed(criteria: list[Bound], rules: LabelRules | None = None) -> LabelRules:
    """Our rules for noise, without those on a figure that the lab sets its own bound to: two minima would be one too many."""
    rules, named = rules or LabelRules(), {b.metric for b in criteria}
    if "num_spikes" in named:
        rules = replace(rules, min_spikes=1)
    return replace(rules, min_snr=0.0) if "snr" in named else rules


def relabel(units: list[UnitLabel], values: Values, criteria: list[Bound], combine: str) -> list[UnitLabel]:
    """The units with the lab's label. `values` are {metric: {unit: value}}; `combine` as in config.Labels."""
    return [
        _relabelled(u, {b.metric: values[b.metric].get(u.unit) for b in criteria}, criteria, combine)
        for u in units
    ]


def _relabelled(
    u: UnitLabel, values: dict[str, float | None], criteria: list[Bound], combine: str
) -> UnitLabel:
    if u.label == "noise":
        return replace(u, criteria=values)
    verdict, reason = judge(values, criteria)
    kilosort = {"good": True, "mua": False}.get(u.ks_label)
    if kilosort is not None and combine == "and":
        verdict = False if not kilosort else verdict
        reason += f"; Kilosort says {u.ks_label}"
    elif kilosort is not None and combine == "or":
        verdict = True if kilosort else verdict
        reason += f"; Kilosort says {u.ks_label}"
    ours = LabelRules()
    rubbish = u.n_spikes < ours.min_spikes or u.shape["snr"] < ours.min_snr
    label = "undetermined" if verdict is None else "good" if verdict else "noise" if rubbish else "mua"
    return replace(u, label=label, reason=reason, criteria=values)


def judge(values: dict[str, float | None], criteria: list[Bound]) -> tuple[bool | None, str]:
    """(whether all bounds hold, None if one is not known and none fails; the figures that decided)."""
    held = {b: b.holds(values[b.metric]) for b in criteria}
    failed = [f"{b.metric} {values[b.metric]:.3g}, not {b.text}" for b, ok in held.items() if ok is False]
    unknown = [f"{b.metric} needs more spikes" for b, ok in held.items() if ok is None]
    if failed:
        return False, "; ".join(failed)
    if unknown:
        return None, "; ".join(unknown)
    return True, ", ".join(f"{b.metric} {values[b.metric]:.3g}" for b in criteria)
