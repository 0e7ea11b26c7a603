"""A bound on a quality metric, as a lab writes it: `firing_rate >= 0.05`, `isi_violations <= 1 %`.

Names are those of SpikeInterface's quality metrics, and a few of ours. A metric that is a share lies between 0 and 1; its bound may be
written in percent, and one that no unit could ever miss is refused: `isi_violations <= 1` means one hundred percent, not one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple


class Metric(NamedTuple):
    """Which of SpikeInterface's metrics gives this column ('' for ours), and whether it is a share."""

    computed_by: str
    share: bool = False


OURS = {
    "contamination": Metric("", True),  # foreign spikes by refractory violations, echoes left out
    "kilosort_contamination": Metric("", True),  # Kilosort's own estimate
    "isi_violations": Metric("", True),  # of a unit's spikes, those less than 1.5 ms after the one before
    "waveform_std": Metric(""),  # standard deviation at the peak over the peak of the average
}
METRICS = {
    "num_spikes": Metric("num_spikes"),
    "firing_rate": Metric("firing_rate"),
    "presence_ratio": Metric("presence_ratio", True),
    "snr": Metric("snr"),
    "isi_violations_ratio": Metric("isi_violation"),
    "isi_violations_count": Metric("isi_violation"),
    "rp_contamination": Metric("rp_violation", True),
    "rp_violations": Metric("rp_violation"),
    "sliding_rp_violation": Metric("sliding_rp_violation", True),
    "sync_spike_2": Metric("synchrony", True),
    "sync_spike_4": Metric("synchrony", True),
    "sync_spike_8": Metric("synchrony", True),
    "firing_range": Metric("firing_range"),
    "amplitude_cv_median": Metric("amplitude_cv"),
    "amplitude_cv_range": Metric("amplitude_cv"),
    "amplitude_cutoff": Metric("amplitude_cutoff", True),
    "noise_cutoff": Metric("noise_cutoff"),
    "noise_ratio": Metric("noise_cutoff"),
    "amplitude_median": Metric("amplitude_median"),
    "drift_ptp": Metric("drift"),
    "drift_std": Metric("drift"),
    "drift_mad": Metric("drift"),
    "sd_ratio": Metric("sd_ratio"),
    "isolation_distance": Metric("mahalanobis"),
    "l_ratio": Metric("mahalanobis"),
    "d_prime": Metric("d_prime"),
    "nn_hit_rate": Metric("nearest_neighbor", True),
    "nn_miss_rate": Metric("nearest_neighbor", True),
    "silhouette": Metric("silhouette"),
    "nn_isolation": Metric("nn_advanced", True),
    "nn_noise_overlap": Metric("nn_advanced", True),
    **OURS,
}
_BOUND = re.compile(r"\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Bound:
    """One criterion. `text` is the bound as it was written."""

    metric: str
    operator: str
    limit: float
    text: str

    @classmethod
    def parse(cls, metric: str, text: str) -> Bound:
        """ValueError, in one line, for a metric that does not exist or a bound that is none."""
        about = METRICS.get(metric)
        if about is None:
            raise ValueError(f"metric {metric!r} does not exist; known are {', '.join(sorted(METRICS))}")
        found = _BOUND.fullmatch(text)
        if found is None:
            raise ValueError(f"{metric} {text!r} is no bound; write it like '>= 0.05' or '<= 1 %'")
        operator, number, percent = found.groups()
        if percent and not about.share:
            raise ValueError(f"{metric} {text!r}: {metric} is no share of anything; give it without %")
        limit = float(number) / 100 if percent else float(number)
        bound = cls(metric, operator, limit, " ".join(text.split()))
        if about.share and (bound.holds(0.0) == bound.holds(1.0)):
            kind = "everything" if bound.holds(0.5) else "nothing"
            hint = f"; {operator} {float(number):g} % is written so" if not percent else ""
            raise ValueError(f"{metric} {text!r} lets {kind} pass: {metric} is a share from 0 to 1{hint}")
        return bound

    def holds(self, value: float | None) -> bool | None:
        """Whether the value is inside the bound; None where there is no value."""
        if value is None or not math.isfinite(value):
            return None
        return {
            "<=": value <= self.limit, ">=": value >= self.limit, "<": value < self.limit, ">": value > self.limit,
        }[self.operator]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.metric} {self.text}"


def bounds(criteria: dict[str, str]) -> list[Bound]:
    """All of a table `{metric: bound}`; ValueError as `Bound.parse`."""
    return [Bound.parse(metric, text) for metric, text in criteria.items()]


def parse(text: str) -> Bound:
    """'snr >= 5' as one string; ValueError where it is no criterion."""
    found = re.match(r"\s*([A-Za-z_]\w*)\s*(.*)", text)
    if found is None:
        raise ValueError(f"{text!r} is no criterion; write it like 'snr >= 5'")
    return Bound.parse(found[1], found[2])
