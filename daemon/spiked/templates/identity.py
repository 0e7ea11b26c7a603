"""Which units of an earlier calibration these templates are: the same cells keep their ids.

Two mean waveforms are compared over all electrodes that both sessions have, in units of the noise: filtered by the same
whitening in time, whitened across electrodes, at the best small lag. What noise adds to a mean of so many spikes is taken out of its
energy, so weak units are not judged by their noise. Pairs are chosen so that the summed similarity is largest; what resembles
nothing, or is a fragment of something that found its own, gets a new id, after the largest ever used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked.errors import ConfigError
from spiked.templates.learn import MAX_SPIKES
from spiked.templates.library import Templates

# One cell in two recordings with other noise had a cosine above 0.95 (SNR above 4; 0.65 to 0.95 below), another cell on the same
# electrodes below 0.76. Cells also move and change, so the scale is wider than that.
# A pair whose cosine is this much below 1, or whose log sizes or log rates differ by so much, is exp(-1/2) similar. Rates hardly
# count: they only tell a cell's main unit from a fragment of it.
COSINE, LOUDNESS, RATE = 0.15, 0.5, 3.0
MIN_COSINE, MAX_LOUDNESS = 0.7, 1.0  # beyond, two waveforms are not one cell's
MIN_SIMILARITY = 0.15
MIN_OF_BEST = 1 / 3  # of either unit's best similarity to anything: less is a fragment of that, not this
SAME_UM = 1.0  # an electrode array may be routed anew: a channel is then elsewhere
LAG_MS = 0.3  # that troughs may be apart: of electrodes that see a cell equally well, now one is lowest and now another


@dataclass(frozen=True)
class Match:
    """`templates` under matched ids. Per unit of them: `previous_id` (-1: new) and `confidence` (0 to 1).

    Confidence is the similarity, lowered to half of it as the second-best candidate becomes as similar. It is also
    kept in the templates, as `id_confidence`.
    """

    templates: Templates
    previous_id: np.ndarray
    confidence: np.ndarray


def _common(a: Templates, b: Templates) -> tuple[np.ndarray, np.ndarray]:
    """Channel indices in a and in b of the channels that both have, at the same place."""
    at = {c: k for k, c in enumerate(b.channel_ids)}
    pairs = np.array([(k, at[c]) for k, c in enumerate(a.channel_ids) if c in at], np.int64).reshape(-1, 2)
    apart = np.hypot(*(a.positions_um[pairs[:, 0]] - b.positions_um[pairs[:, 1]]).T)
    return pairs[apart <= SAME_UM, 0], pairs[apart <= SAME_UM, 1]


def _covariance(t: Templates, channels: np.ndarray) -> np.ndarray:
    """(channels, channels) of the noise on these alone."""
    ridge = 1e-6 * float(np.trace(t.precision)) / t.n_channels * np.eye(t.n_channels)
    return np.linalg.inv(t.precision.astype(float) + ridge)[np.ix_(channels, channels)]


def whitened(previous: Templates, new: Templates) -> tuple[np.ndarray, np.ndarray, int]:
    """Waveforms (units, channels, samples) of both, comparable, in SDs of the noise; and how far they may be shifted.

    Those of `new` have that many samples less at either end.
    """
    from scipy.signal import lfilter

    mine, theirs = _common(new, previous)
    covariance = (_covariance(new, mine) + _covariance(previous, theirs)) / 2
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    reach = round(LAG_MS * new.fs_hz / 1000)
    before = min(previous.before, new.before)
    length = min(t.waveform.shape[1] - t.before for t in (previous, new)) + before

    def cut(t: Templates, waveforms: np.ndarray) -> np.ndarray:
        first = t.before - before
        return np.einsum("ab,ubl->ual", whiten, waveforms[:, :, first : first + length]).astype(np.float32)

    # What was whitened in time by the filter of then, by the filter of now.
    earlier = lfilter(new.taps, previous.taps, previous.waveforms()[:, theirs], axis=2)
    return cut(previous, earlier), cut(new, new.waveforms()[:, mine])[:, :, reach : length - reach], reach


def _energy(z: np.ndarray, t: Templates) -> np.ndarray:
    """(units,) of whitened waveforms, less what the noise of a mean adds."""
    whole = (z**2).sum((1, 2))
    entries = np.diff(t.wave_ptr) * z.shape[2]
    noise = entries / np.clip(t.n_spikes, 1, MAX_SPIKES)
    return np.maximum(whole - noise, 0.3 * whole)


def resemblance(previous: Templates, new: Templates) -> tuple[np.ndarray, np.ndarray]:
    """(new units, previous units): the cosine between waveforms, noise corrected, and the log of their sizes' ratio."""
    a, b, reach = whitened(previous, new)
    n = b.shape[2]
    size_b = _energy(b, new)
    best = np.zeros((len(new), len(previous)))
    ratio = np.zeros_like(best)
    flat = b.reshape(len(b), -1)
    for lag in range(2 * reach + 1):
        shifted = a[:, :, lag : lag + n]
        size = _energy(shifted, previous)
        cosine = flat @ shifted.reshape(len(a), -1).T / np.sqrt(np.maximum(np.outer(size_b, size), 1e-9))
        better = cosine > best
        best[better] = cosine[better]
        ratio[better] = 0.5 * np.log(np.maximum(size_b[:, None], 1e-9) / np.maximum(size, 1e-9))[better]
    return np.minimum(best, 1.0), ratio


def similarity(previous: Templates, new: Templates) -> np.ndarray:
    """(new units, previous units), 0 to 1."""
    if previous.fs_hz != new.fs_hz:
        raise ConfigError(
            f"templates of {previous.fs_hz:g} Hz cannot be compared with those of {new.fs_hz:g} Hz; calibrate without the former"
        )
    if not len(previous) or not len(new) or not len(_common(new, previous)[0]):
        return np.zeros((len(new), len(previous)))
    cosine, ratio = resemblance(previous, new)
    rates = [np.log(np.maximum(t.rate_hz, 1e-3)) for t in (new, previous)]
    apart = rates[0][:, None] - rates[1][None]
    far = ((1 - cosine) / COSINE) ** 2 + (ratio / LOUDNESS) ** 2 + (apart / RATE) ** 2
    return np.where((cosine >= MIN_COSINE) & (np.abs(ratio) <= MAX_LOUDNESS), np.exp(-0.5 * far), 0.0)


def match_ids(previous: Templates, new: Templates) -> Match:
    """Give the units of `new` the ids of the units of `previous` that they are; channels are matched by id.

    Raises ConfigError when the sampling rates differ.
    """
    from scipy.optimize import linear_sum_assignment

    s = similarity(previous, new)
    best = np.maximum(s.max(1, initial=0)[:, None], s.max(0, initial=0)[None])
    possible = np.where((s >= MIN_SIMILARITY) & (s >= MIN_OF_BEST * best), s, 0.0)
    known, confidence = np.full(len(new), -1, np.int32), np.zeros(len(new), np.float32)
    for i, j in zip(*linear_sum_assignment(-possible), strict=True):
        if possible[i, j] <= 0:
            continue
        rival = max(np.delete(s[i], j).max(initial=0), np.delete(s[:, j], i).max(initial=0))
        known[i] = previous.unit_ids[j]
        confidence[i] = s[i, j] * (1 - 0.5 * min(1.0, rival / s[i, j]))
    fresh = known < 0
    ids = known.copy()
    ids[fresh] = previous.next_unit_id + np.arange(fresh.sum())
    return Match(new.with_ids(ids, previous.next_unit_id, confidence), known, confidence)
