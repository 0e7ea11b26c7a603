"""How well a network detects: logits of whole traces, peaks, precision and recall, choice of thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spiked_models.examples import MASKED, Labelled

TOLERANCE_MS = 0.4
THRESHOLDS = np.arange(1, 40) * 0.025
EDGE_MS = 3.5  # left out at either end: no network looks further
LOOSE_MARGIN = 15.0  # recall - precision in percent at the loose threshold (RT-Sort)


def logits_of(
    network: Callable[[Tensor], Tensor], data: Labelled, lookback: int, lookahead: int, gain: float
) -> np.ndarray:
    """(channels, samples) float32 logits; -inf in the first `lookback` and the last `lookahead` samples.

    The traces go through windows of 16 ms, each less the median of its middle 10 ms, times `gain` (what the
    network wants one noise SD to be).
    """
    fs_khz = data.fs_hz / 1000
    length = round(16 * fs_khz)
    hop, inner = length - lookback - lookahead, round(10 * fs_khz)
    n = data.traces.shape[1]
    out = np.full(data.traces.shape, -np.inf, np.float32)
    middle = slice((length - inner) // 2, (length + inner) // 2)
    for start in [*range(0, n - length, hop), max(0, n - length)]:
        x = torch.from_numpy(np.ascontiguousarray(data.traces[:, start : start + length]))
        x = (x - x[:, middle].median(dim=1, keepdim=True).values) * gain
        out[:, start + lookback : start + length - lookahead] = network(x).float().numpy()
    return out


def peaks_of(logits: np.ndarray, p: float) -> tuple[np.ndarray, np.ndarray]:
    """(channel, frame) where the logit exceeds both neighbours and reaches probability `p`."""
    mid = logits[:, 1:-1]
    is_peak = (mid > logits[:, :-2]) & (mid > logits[:, 2:]) & (mid >= np.log(p / (1 - p)))
    channel, frame = np.nonzero(is_peak)
    return channel, frame + 1


def _nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Index into sorted `b` of the value nearest to each of `a`."""
    right = np.clip(np.searchsorted(b, a), 1, len(b) - 1)
    return np.where(a - b[right - 1] <= b[right] - a, right - 1, right)


def count(logits: np.ndarray, data: Labelled, edge: int, p: float) -> np.ndarray:
    """[hits, detections, labels] at probability p; detections of masked waves are not counted, nor `edge` samples."""
    tolerance = round(TOLERANCE_MS * data.fs_hz / 1000)
    n = data.labels.shape[1]
    span = n + 4 * tolerance
    inside = np.zeros(n, bool)
    inside[edge + tolerance : n - edge - tolerance] = True
    channel, frame = np.nonzero((data.labels == 1) & inside)
    truth = channel * span + frame
    channel, frame = peaks_of(np.where(inside, logits, -np.inf), p)
    found = channel * span + frame
    if len(truth) < 2 or len(found) < 2:
        return np.array([0, len(found), len(truth)])
    to_truth, to_found = _nearest(found, truth), _nearest(truth, found)
    mutual = to_found[to_truth] == np.arange(len(found))
    hit = mutual & (np.abs(found - truth[to_truth]) <= tolerance)
    ignored = ~hit & (data.labels[channel, frame] == MASKED)
    return np.array([hit.sum(), len(found) - ignored.sum(), len(truth)])


def score(
    logits: Sequence[np.ndarray], recordings: Sequence[Labelled], reference: Sequence[Labelled] = ()
) -> dict[str, Any]:
    """Precision, recall and F1 (percent) over all recordings at every threshold, and the chosen thresholds.

    logits: of `logits_of`. stringent: best F1. loose: below it, where recall - precision is nearest to LOOSE_MARGIN.
    With `reference` (the same recordings, labelled by `found_in`), at the stringent threshold also against those.
    """
    counts, against = np.zeros((len(THRESHOLDS), 3)), np.zeros((len(THRESHOLDS), 3))
    for i, data in enumerate(recordings):
        edge = round(EDGE_MS * data.fs_hz / 1000)
        counts += np.stack([count(logits[i], data, edge, p) for p in THRESHOLDS])
        if reference:
            against += np.stack([count(logits[i], reference[i], edge, p) for p in THRESHOLDS])
    precision, recall, f1 = _shares(counts)
    best = int(f1.argmax())
    margin = np.abs(recall - precision - LOOSE_MARGIN)
    loose = int(margin[: max(best, 1)].argmin())

    def at(i: int) -> dict[str, float]:
        return {"p": round(float(THRESHOLDS[i]), 4), "precision": round(float(precision[i]), 2),
                "recall": round(float(recall[i]), 2), "f1": round(float(f1[i]), 2)}  # fmt: skip

    out = {"stringent": at(best), "loose": at(loose), "spikes": int(counts[0, 2]),
           "sweep": [at(i) for i in range(0, len(THRESHOLDS), 2)]}  # fmt: skip
    if reference:
        agreed = _shares(against)[2]
        out["f1 against the published network"] = round(float(agreed[best]), 2)
        out["best f1 against the published network"] = round(float(agreed.max()), 2)
    return out


def _shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 in percent from rows of [hits, detections, labels]."""
    precision = 100 * counts[:, 0] / np.maximum(counts[:, 1], 1)
    recall = 100 * counts[:, 0] / np.maximum(counts[:, 2], 1)
    return precision, recall, 2 * precision * recall / np.maximum(precision + recall, 1e-9)


def found_in(logits: np.ndarray, data: Labelled, p: float) -> Labelled:
    """The same traces with the detections of these logits at probability `p` as labels; nothing is masked."""
    labels = np.zeros(data.labels.shape, np.int8)
    labels[peaks_of(logits, p)] = 1
    return Labelled(data.traces, labels, data.fs_hz)
