"""Every number of RT-Sort's calibration and assignment, with its unit in its name.

Presets follow the published ones for MEA and Neuropixels (van der Molen, Lim et al. 2024, PLoS ONE 19:e0312438),
except that all arrays use the tighter similarity limits of the Neuropixels preset: on simulated MEA recordings the
published MEA limits merge different neurons (docs/rtsort-mends.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from spiked.errors import ConfigError


@dataclass(frozen=True)
class RTSortParameters:
    """Calibration and assignment. Amplitudes are in noise SDs, probabilities in 0 to 1, distances in micrometre."""

    # what is looked at around a spike
    coincidence_ms: float = 0.5  # an electrode takes part when its detection peak is this near to the root's
    inner_radius_um: float = 50.0
    outer_radius_um: float = 100.0  # also how far from its root a sequence can reach

    # spikes that no sequence is made from
    array_noise_min: int = 100  # drop a moment at which this many electrodes (or this fraction) exceed loose
    array_noise_fraction: float = 0.1
    sequence_noise_min: int = 300  # a sequence this wide is noise
    sequence_noise_fraction: float = 0.05

    # forming clusters
    min_rate_hz: float = 0.05
    min_spikes: int = 10
    min_root_neighbours: int = 2  # stringent neighbours that a spike needs to count as activity of its root
    max_latency_parts: int = 4
    max_amplitude_parts: int = 4
    min_part: float = 0.1  # smallest part of a cluster that may become its own
    min_extend_part: float = 0.5  # a part this large looks at the neighbours of the electrode it came from
    patience: int = 6  # distances in a row that may bring nothing
    amplitude_dip_p: float = 0.1  # split amplitudes when Hartigan's dip test gives less

    # what a sequence must have
    min_prob: float = 0.03
    min_inner_loose: int = 3
    min_loose: int = 4
    min_loose_fraction: float = 1 / 3

    # a spike belongs to a sequence within these
    min_loose_spike: int = 2  # electrodes (or spike_loose_fraction of the sequence's) that must see it, live;
    min_inner_spike: int = 2  # while calibrating the numbers that a sequence must have
    spike_loose_fraction: float = 0.5
    max_latency_diff_ms: float = 0.0833
    max_amplitude_diff: float = 0.45  # relative
    max_root_amplitude_sd: float = 2.5  # while calibrating;
    root_amplitude_sd_spike: float = 4.0  # live
    cleaned_amplitude_diff: float = 0.65  # for max_amplitude_diff where a stimulus' artifact was removed
    clip_factor: float = 2.0

    # two sequences are one within these
    merge_latency_diff_ms: float = 0.045
    merge_amplitude_diff: float = 0.15
    merge_root_amplitude_sd: float = 2.5
    merge_factor: float = 1.6  # all amplitudes of a sequence may be so many times the other's
    rounds: int = 2  # of merging and reassigning
    merge_loose_fraction: float = 1 / 3

    # roots
    reroot_min_prob: float = 0.95  # of the surest electrode's probability; among these the largest amplitude

    # one spike, one unit
    overlap_ms: float = 0.2  # units rooted within inner_radius_um
    shared_overlap_ms: float = 0.5  # units rooted within outer_radius_um that share electrodes
    shared_fraction: float = 1 / 3
    refractory_ms: float = 0.5  # after its spike a unit is not reported again
    echo_fraction: float = (
        0.02  # of a unit's spikes: coincide with another's at one lag; above 1: not looked for
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            v = getattr(self, f.name)
            if not isinstance(v, int | float) or not math.isfinite(v) or v < 0:
                raise ConfigError(f"RT-Sort parameter {f.name} = {v!r} must be a number of at least 0")

    @classmethod
    def mea(cls) -> RTSortParameters:
        """20-kHz arrays with 17.5-um pitch."""
        return cls()

    @classmethod
    def neuropixels(cls) -> RTSortParameters:
        """30-kHz probes: the same limits in samples of 30 kHz."""
        return cls(max_latency_diff_ms=2.5 / 30)

    @classmethod
    def default(cls, fs_hz: float) -> RTSortParameters:
        """The preset nearest to a sampling rate."""
        return cls.neuropixels() if fs_hz > 25_000 else cls.mea()

    @classmethod
    def published_mea(cls) -> RTSortParameters:
        """The limits of the published MEA preset (SpikeLab 0.1.2), with its rules where they are parameters."""
        return cls(
            **AS_PUBLISHED, max_latency_diff_ms=3.5 / 20, merge_latency_diff_ms=3.5 / 20, max_amplitude_diff=0.65, cleaned_amplitude_diff=0.65,
            merge_amplitude_diff=0.65, merge_root_amplitude_sd=1e9,
        )  # fmt: skip

    @classmethod
    def published_neuropixels(cls) -> RTSortParameters:
        """The limits of the published Neuropixels preset."""
        return cls(
            **AS_PUBLISHED, max_latency_diff_ms=2.5 / 30, merge_latency_diff_ms=2.5 / 30, max_amplitude_diff=0.45, cleaned_amplitude_diff=0.45,
            merge_amplitude_diff=0.45,
        )  # fmt: skip

    @classmethod
    def published(cls, fs_hz: float) -> RTSortParameters:
        """The published preset nearest to a sampling rate."""
        return cls.published_neuropixels() if fs_hz > 25_000 else cls.published_mea()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RTSortParameters:
        """Parameters this version does not know are refused by name."""
        d = json.loads(text)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(d, dict) or not set(d) <= known:
            raise ConfigError(
                f"unknown RT-Sort parameters: {', '.join(sorted(set(d) - known))}; made by a newer version"
            )
        return cls(**d)


# What the published rule has otherwise: docs/rtsort-mends.md 13, 16, 25, 31 to 38.
AS_PUBLISHED: dict[str, Any] = {
    "min_loose_spike": 4, "min_inner_spike": 3, "spike_loose_fraction": 1 / 3, "merge_factor": 1.0, "rounds": 1,
    "root_amplitude_sd_spike": 2.5, "reroot_min_prob": 1.0, "shared_fraction": 2.0, "refractory_ms": 0.2, "echo_fraction": 2.0,
}  # fmt: skip
