"""When a sample existed, when it was sent, and how long its spike took from there to the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spiked.bench.figures import WINDOW_MS, spread
from spiked.sources.recordings import GroundTruth

# a sorted spike as a client got it: monotonic ns of the chunk's arrival, of publication and of receipt
RECEIPT = np.dtype(
    [("sample", "i8"), ("unit", "i4"), ("arrival", "i8"), ("published", "i8"), ("received", "i8")]
)


@dataclass(frozen=True)
class Played:
    """What the simulated device did: `schedule` (bursts, 2) is one past the last sample, and when it had gone out."""

    fs_hz: float
    first_sample: int
    started_ns: int
    schedule: np.ndarray

    def existed_ns(self, sample: np.ndarray) -> np.ndarray:
        """When these samples (device numbers) existed, by the device's clock."""
        return self.started_ns + (sample - self.first_sample) * (1e9 / self.fs_hz)

    def sent_ns(self, sample: np.ndarray) -> np.ndarray:
        """When the bursts that hold these samples had been sent."""
        at = np.searchsorted(self.schedule[:, 0], sample - self.first_sample, side="right")
        return self.schedule[np.minimum(at, len(self.schedule) - 1), 1]

    def late_ms(self, start: int, stop: int) -> np.ndarray:
        """How long after its last sample existed each burst of the samples [start, stop) had been sent."""
        last = self.schedule[:, 0] + self.first_sample
        inside = (last > start) & (last <= stop)
        return (self.schedule[inside, 1] - self.existed_ns(last[inside])) / 1e6


def unrolled(
    truth: GroundTruth, length: int, first: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples and units of the true spikes in [start, stop), of a recording of `length` that begins at `first` and repeats."""
    samples, units = [], []
    for k in range(max(start - first, 0) // length, (stop - first - 1) // length + 1):
        samples.append(truth.samples + first + k * length)
        units.append(truth.units)
    s, u = np.concatenate(samples), np.concatenate(units)
    inside = (s >= start) & (s < stop)
    return s[inside], u[inside]


def matched(
    true_samples: np.ndarray, true_units: np.ndarray, got: np.ndarray, per_unit: dict[str, Any], fs_hz: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (in true, in got) of spikes that are one: of paired units, one to one, within 0.4 ms after the unit's lag."""
    window, pairs = round(WINDOW_MS * fs_hz / 1000), []
    for name, found in per_unit.items():
        if found["unit"] is None:
            continue
        a, b = np.flatnonzero(true_units == int(name)), np.flatnonzero(got["unit"] == found["unit"])
        a = a[np.argsort(true_samples[a], kind="stable")]
        times = got["sample"][b] - round(found["lag_ms"] * fs_hz / 1000)
        j = 0
        for i, t in zip(a.tolist(), true_samples[a].tolist(), strict=True):
            while j < len(b) and times[j] < t - window:
                j += 1
            if j < len(b) and times[j] <= t + window:
                pairs.append((i, int(b[j])))
                j += 1
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def delays(played: Played, trough: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """Spreads in ms over matched spikes: trough to receipt, and its three parts; `trough` in device samples."""
    existed = played.existed_ns(trough)
    ms = {
        "trough_to_receipt": got["received"] - existed,
        "trough_to_arrival": got["arrival"] - existed,
        "arrival_to_published": got["published"] - got["arrival"],
        "published_to_receipt": got["received"] - got["published"],
        "trough_until_sent": played.sent_ns(trough) - existed,
    }
    return {name: spread(v / 1e6) for name, v in ms.items()}
