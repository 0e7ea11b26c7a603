"""A sentinel tells where the detection network need not run: a small network that foresees its detections.

Filters over a millisecond on either side of a sample, ReLU, one weighted sum: less than a hundredth of the work
of the network it guards. It is learned from minutes in which the network ran everywhere, so it fits the array, its
noise and the network; its threshold is the highest that keeps the asked share of the network's peaks on minutes it
did not learn from, and what it keeps there is written down with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

FILTERS = 16
REACH_MS = 1.0
MARGIN_MS = 0.15
NEAR_SAMPLES = 3  # a sample this close to a peak counts as one
KEEP_STRINGENT, KEEP_LOOSE = 0.999, 0.995
MOST_OPEN = 0.6  # a gate that closes less than this is not worth its work
STEPS, BATCH = 2500, 1024
PEAKS, SILENT = 60_000, 200_000  # examples of either kind
SECONDS = 20.0  # read for learning, and again for choosing the threshold
CHANNELS = 128  # read at most, evenly spread


@dataclass(frozen=True)
class Sentinel:
    """Filters (FILTERS, 2 * reach + 1) on the network's scaled input, and what they kept where they were tried.

    A logit is computed where the score reaches `threshold` within `margin` samples.
    """

    filters: np.ndarray
    bias: np.ndarray
    weights: np.ndarray
    offset: float
    threshold: float
    margin: int
    kept_stringent: float
    kept_loose: float
    open_share: float

    @property
    def reach(self) -> int:
        """Samples on either side that a score needs."""
        return self.filters.shape[1] // 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates per score."""
        return self.filters.size + len(self.weights)

    def score(self, x: np.ndarray) -> np.ndarray:
        """Scaled traces (n,) -> scores (n - 2 * reach,), the first for sample `reach`."""
        windows = np.lib.stride_tricks.sliding_window_view(x, self.filters.shape[1])
        hidden = np.maximum(windows @ self.filters.T + self.bias, 0)
        return np.asarray(hidden @ self.weights + self.offset, np.float32)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """For a file; `from_arrays` is the way back."""
        numbers = (
            self.offset,
            self.threshold,
            self.margin,
            self.kept_stringent,
            self.kept_loose,
            self.open_share,
        )
        return {
            "filters": self.filters, "bias": self.bias, "weights": self.weights,
            "numbers": np.array(numbers, np.float64),
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Sentinel:
        """ValueError when the arrays do not fit together."""
        filters, bias, weights = (np.asarray(arrays[k], np.float32) for k in ("filters", "bias", "weights"))
        numbers = np.asarray(arrays["numbers"], np.float64)
        if (
            filters.ndim != 2
            or filters.shape[1] % 2 == 0
            or not bias.shape == weights.shape == (len(filters),)
        ):
            raise ValueError("the sentinel's arrays do not fit together")
        if numbers.shape != (6,) or not all(np.isfinite(a).all() for a in (filters, bias, weights, numbers)):
            raise ValueError("the sentinel's numbers are not finite")
        offset, threshold, margin, stringent, loose, share = numbers.tolist()
        return cls(filters, bias, weights, offset, threshold, int(margin), stringent, loose, share)


Read = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def learn(
    read: Read,
    n_channels: int,
    n_samples: int,
    fs_hz: float,
    scale: float,
    stringent_logit: float,
    loose_logit: float,
) -> Sentinel | None:
    """A sentinel from what the network said; None when there is too little to learn from or nothing to gain.

    `read(start, stop)` returns traces and logits of these samples, (channels, stop - start), logits below -50000
    where nothing was seen. Traces times `scale` are the network's input.
    """
    reach = max(2, round(REACH_MS * fs_hz / 1000))
    half = n_samples // 2
    span = min(half, round(SECONDS * fs_hz))
    if span < 20 * reach:
        return None
    rows = np.unique(np.linspace(0, n_channels - 1, min(n_channels, CHANNELS)).astype(int))
    rng = np.random.default_rng(0)
    found = _examples(read, rows, (half - span, half), reach, scale, loose_logit, rng)
    if found is None:
        return None
    model = _fit(*found)
    with torch.inference_mode():
        filters, bias = (p.numpy().copy() for p in (model[0].weight, model[0].bias))
        weights, offset = model[2].weight[0].numpy().copy(), float(model[2].bias)
    margin = max(1, round(MARGIN_MS * fs_hz / 1000))
    tried = Sentinel(filters, bias, weights, offset, 0.0, margin, 0.0, 0.0, 1.0)
    return _with_threshold(tried, read, rows, (half, half + span), scale, stringent_logit, loose_logit, fs_hz)


def peaks(q: np.ndarray, threshold: float) -> np.ndarray:
    """(channels, n) bool: local peaks of the logits at or above the threshold."""
    out = np.zeros(q.shape, bool)
    middle = q[:, 1:-1]
    out[:, 1:-1] = (middle >= threshold) & (middle > q[:, :-2]) & (middle >= q[:, 2:])
    return out


def _examples(
    read: Read, rows: np.ndarray, span: tuple[int, int], reach: int, scale: float, loose: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Windows near a detection and windows far from any; None when either is missing."""
    near: list[np.ndarray] = []
    far: list[np.ndarray] = []
    n_pieces = 10
    edges = np.linspace(*span, n_pieces + 1).astype(int)
    for start, stop in pairwise(edges):
        x, q = read(int(start), int(stop))
        x, q = x[rows].astype(np.float32) * scale, q[rows].astype(np.float32)
        at = peaks(q, loose)
        close = _widened(at, NEAR_SAMPLES)
        silent = ~_widened(at, 3 * NEAR_SAMPLES) & (q > -1000)
        for mask, wanted, out in ((close, PEAKS, near), (silent, SILENT, far)):
            mask[:, :reach], mask[:, x.shape[1] - reach :] = False, False
            places = np.flatnonzero(mask)
            if len(places) > wanted // n_pieces:
                places = rng.choice(places, wanted // n_pieces, replace=False)
            c, t = np.divmod(places, x.shape[1])
            out.append(np.lib.stride_tricks.sliding_window_view(x, 2 * reach + 1, axis=1)[c, t - reach])
    yes, no = np.concatenate(near), np.concatenate(far)
    if len(yes) < 1000 or len(no) < 1000:
        return None
    return torch.from_numpy(yes), torch.from_numpy(no)


def _widened(mask: np.ndarray, by: int) -> np.ndarray:
    out = mask.copy()
    for d in range(1, by + 1):
        out[:, d:] |= mask[:, :-d]
        out[:, :-d] |= mask[:, d:]
    return out


def _fit(yes: Tensor, no: Tensor) -> nn.Sequential:
    """Both kinds weigh the same; the same examples give the same sentinel."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(yes.shape[1], FILTERS), nn.ReLU(), nn.Linear(FILTERS, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.0))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    target = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])
    for _ in range(STEPS):
        a, b = (torch.randint(len(part), (BATCH,), generator=generator) for part in (yes, no))
        out = model(torch.cat([yes[a], no[b]]))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _with_threshold(
    s: Sentinel, read: Read, rows: np.ndarray, span: tuple[int, int], scale: float, stringent: float, loose: float,
    fs_hz: float,
) -> Sentinel | None:  # fmt: skip
    """The highest threshold that keeps what must be kept, and what it costs."""
    best: list[list[np.ndarray]] = [[], []]
    everywhere = []
    step = round(fs_hz)
    for start in range(span[0], span[1], step):
        x, q = read(start, min(start + step, span[1]))
        if q.shape[1] < 4 * s.reach:
            continue
        for c in rows:
            score = s.score(x[c].astype(np.float32) * scale)
            padded = np.pad(score, s.margin, constant_values=-np.inf)
            top = np.lib.stride_tricks.sliding_window_view(padded, 2 * s.margin + 1).max(1)
            inner = q[c : c + 1, s.reach : q.shape[1] - s.reach].astype(np.float32)
            for kind, limit in enumerate((stringent, loose)):
                best[kind].append(top[peaks(inner, limit)[0]])
            everywhere.append(top[::17])
    tops = [np.concatenate(b) for b in best]
    if min(len(t) for t in tops) < 1000:
        return None
    threshold = min(
        float(np.quantile(t, 1 - k)) for t, k in zip(tops, (KEEP_STRINGENT, KEEP_LOOSE), strict=True)
    )
    share = float((np.concatenate(everywhere) >= threshold).mean())
    if share > MOST_OPEN:
        return None
    kept = [float((t >= threshold).mean()) for t in tops]
    return Sentinel(s.filters, s.bias, s.weights, s.offset, threshold, s.margin, kept[0], kept[1], share)
