"""The live part of template matching: filter, project, score, match, subtract.

Every value is the sum of the same terms in the same order however the stream was cut into chunks, and every decision
belongs to one sample number, so the spikes do not depend on the cut. Nothing here allocates.

Words. The score b of unit u at sample t is the correlation of the stream with u's filter, trough at t; it comes from
projections, the correlations of each channel with K temporal components. A spike of amplitude a (1: the template) of unit v at s adds
a x gram[v, u, t - s] to it. The gain of u at t is twice the log likelihood ratio of "a spike of u" against "none", its
amplitude at its best: 2ab - a^2 N - (a - level)^2 l, N the template's energy, level the unit's present amplitude, 1/l the variance
about it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# mypy: disable-error-code="no-untyped-def"

LANE = 16  # values of a vector; taps and components are filled up with zeros to whole ones
# Sums may be split into vectors, which depends on their length alone: each value is the same in any chunk.
SPLIT = {"reassoc", "contract", "nsz"}
MOST_AT_ONCE = (
    256  # spikes decided at one sample, over the whole array: no bad template can hold up the stream
)
# places in the state
KNOWN, SETTLED, N_PAST, N_OUT, DROPPED = 0, 1, 2, 3, 4


def whole_vectors(rows: np.ndarray, front: bool = False) -> np.ndarray:
    """(n, length) float32 with zeros behind every row, or before it, up to whole vectors."""
    more = -rows.shape[1] % LANE
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (more, 0) if front else (0, more))), np.float32)


@njit(nogil=True, cache=True, fastmath=SPLIT)
def _convolve(low, taps, out, at, n):
    """out[i] = sum over k of taps[k] low[i - len(taps) + 1 + k], for at <= i < at + n."""
    length = len(taps)
    for i in range(at, at + n):
        piece = low[i - length + 1 : i + 1]
        total = np.float32(0)
        for k in range(length):
            total += taps[k] * piece[k]
        out[i] = total


@njit(nogil=True, cache=True)
def whiten(x, sos, state, taps, filtered, at):
    """High-pass and whiten in time: second-order sections, then a causal FIR, over x (C, n) float32.

    `filtered` (2, C, room): the sections' output goes to [0, :, at:], the FIR's to [1, :, at:]; both hold the past before
    `at`. taps: whole vectors, the present sample's last.
    """
    n = x.shape[1]
    for c in range(x.shape[0]):
        low = filtered[0, c]
        for s in range(sos.shape[0]):
            b0, b1, b2, a1, a2 = sos[s, 0], sos[s, 1], sos[s, 2], sos[s, 4], sos[s, 5]
            one, two = state[c, s, 0], state[c, s, 1]
            for i in range(n):
                v = np.float64(x[c, i]) if s == 0 else np.float64(low[at + i])
                w = b0 * v + one
                one = b1 * v - a1 * w + two
                two = b2 * v - a2 * w
                low[at + i] = w
            state[c, s, 0], state[c, s, 1] = one, two
        if sos.shape[0] == 0:
            low[at : at + n] = x[c]
        _convolve(low, taps, filtered[1, c], at, n)


@njit(nogil=True, cache=True, fastmath=SPLIT)
def project(x, basis, out, n):
    """out[c, k, i] = sum over tau of basis[k, tau] x[c, i + tau], for i < n; basis in whole vectors."""
    components, length = basis.shape
    for c in range(x.shape[0]):
        for i in range(n):
            piece = x[c, i : i + length]
            for k in range(components):
                row = basis[k]
                total = np.float32(0)
                for tau in range(length):
                    total += row[tau] * piece[tau]
                out[c, k, i] = total


@njit(nogil=True, cache=True)
def score(projected, n, ptr, channel, weight, total, scores, first):
    """scores[u, (first + i) % columns] = sum over u's channels and components of weight x projection, for i < n.

    The number of components is even.
    """
    columns = scores.shape[1]
    for u in range(len(ptr) - 1):
        total[:n] = np.float32(0)
        for e in range(ptr[u], ptr[u + 1]):
            for k in range(0, weight.shape[1], 2):
                w, v = weight[e, k], weight[e, k + 1]
                a, b = projected[channel[e], k], projected[channel[e], k + 1]
                for i in range(n):
                    total[i] += w * a[i] + v * b[i]
        for i in range(n):
            scores[u, (first + i) % columns] = total[i]


@njit(nogil=True, cache=True)
def put(found, n, scores, first):
    """scores[u, (first + i) % columns] = found[u, i], for i < n."""
    for u in range(scores.shape[0]):
        for i in range(n):
            scores[u, (first + i) % scores.shape[1]] = found[u, i]


@njit(nogil=True, inline="always")
def _amplitude(b, energy, prior, level, high):
    return min((b + prior * level) / (energy + prior), high * level)


@njit(nogil=True, inline="always")
def _gain(b, energy, prior, level, low, high):
    """0 where the spike would be smaller than `low` times what the unit's spikes are now."""
    if b < low * level * energy:
        return np.float32(0)
    a = _amplitude(b, energy, prior, level, high)
    return 2 * a * b - a * a * energy - (a - level) * (a - level) * prior


@njit(nogil=True, cache=True)
def _subtract(u, t, a, first, last, scores, gram_ptr, gram_unit, gram, back):
    """Take a spike of u at t out of the scores of all units in columns [first, last]; gram[:, back] is lag 0."""
    columns = scores.shape[1]
    first, last = max(first, t - back), min(last, t + gram.shape[1] - back - 1)
    for g in range(gram_ptr[u], gram_ptr[u + 1]):
        v = gram_unit[g]
        for s in range(first, last + 1):
            scores[v, s % columns] -= a * gram[g, s - t + back]


@njit(nogil=True, cache=True)
def take_out_past(n, state, past, scores, gram_ptr, gram_unit, gram, back):
    """n new columns have come: what spikes found before still add to them is taken out; older spikes are forgotten."""
    first, last = state[KNOWN] + 1, state[KNOWN] + n
    reach = gram.shape[1] - back - 1
    kept = 0
    for p in range(state[N_PAST]):
        u, t, a = int(past[p, 0]), int(past[p, 1]), past[p, 2]
        if t + reach >= first:
            _subtract(u, t, a, first, last, scores, gram_ptr, gram_unit, gram, back)
        if t + reach > last:
            past[kept] = past[p]
            kept += 1
    state[N_PAST], state[KNOWN] = kept, last


@njit(nogil=True, cache=True)
def _rival(
    u, t, gain, scores, rivals_ptr, rivals, energy, prior, level, limits, threshold, refractory, latest, window
):  # fmt: skip
    """Whether another candidate within `window` of t, of u or of a unit that shares electrodes with it, gains more."""
    columns = scores.shape[1]
    for r in range(rivals_ptr[u], rivals_ptr[u + 1]):
        v = rivals[r]
        least = limits[v, 0] * level[v] * energy[v]
        for s in range(t - window, t + window + 1):
            b = scores[v, s % columns]
            if b < least or abs(s - latest[v]) < refractory:
                continue
            g = _gain(b, energy[v], prior[v], level[v], limits[v, 0], limits[v, 1])
            if g >= threshold[v] and (g > gain or (g == gain and (s < t or (s == t and v < u)))):
                return True
    return False


@njit(nogil=True, cache=True)
def match(
    state, scores, energy, prior, level, level_rate, limits, threshold, refractory, latest, rivals_ptr, rivals,
    gram_ptr, gram_unit, gram, back, window, past, out,
):  # fmt: skip
    """Decide on every sample up to KNOWN - window, one after the other; a spike is subtracted before the next is sought.

    past (m, 3) float64: unit, sample, amplitude of spikes that reach beyond the known columns; out (m, 4): and their gain.
    """
    columns, again_from, reach = scores.shape[1], 2 * window + 2, gram.shape[1] - back - 1
    while state[SETTLED] < state[KNOWN] - window:
        state[SETTLED] += 1
        settled = state[SETTLED]
        begin, found, left = settled, True, MOST_AT_ONCE
        while found and left > 0:  # a spike taken out may uncover others before it
            found, left = False, left - 1
            for t in range(begin, settled + 1):
                at = t % columns
                for u in range(len(energy)):
                    b = scores[u, at]
                    if b < limits[u, 0] * level[u] * energy[u] or abs(t - latest[u]) < refractory:
                        continue
                    gain = _gain(b, energy[u], prior[u], level[u], limits[u, 0], limits[u, 1])
                    if gain < threshold[u] or _rival(
                        u, t, gain, scores, rivals_ptr, rivals, energy, prior, level, limits, threshold, refractory, latest, window
                    ):  # fmt: skip
                        continue
                    a = _amplitude(b, energy[u], prior[u], level[u], limits[u, 1])
                    _subtract(u, t, a, t - back, state[KNOWN], scores, gram_ptr, gram_unit, gram, back)
                    latest[u] = t
                    level[u] = min(max(level[u] + level_rate * (a - level[u]), 0.5), 2.0)
                    if t + reach > state[KNOWN]:
                        if state[N_PAST] == len(past):
                            state[DROPPED] += 1
                        else:
                            past[state[N_PAST], 0], past[state[N_PAST], 1], past[state[N_PAST], 2] = u, t, a
                            state[N_PAST] += 1
                    if state[N_OUT] == len(out):
                        state[DROPPED] += 1
                    else:
                        k = state[N_OUT]
                        out[k, 0], out[k, 1], out[k, 2], out[k, 3] = u, t, a, gain
                        state[N_OUT] += 1
                    found = True
                    break
                if found:
                    break
            begin = settled - again_from


@njit(nogil=True, cache=True)
def slide(filtered, n, tail):
    """Forget the oldest n samples of both rows: what follows them moves to the front."""
    for f in range(filtered.shape[0]):
        for c in range(filtered.shape[1]):
            row = filtered[f, c]
            for i in range(tail):
                row[i] = row[i + n]


@njit(nogil=True, cache=True)
def tell(
    out, state, unit_ids, roots, amplitude_uv, threshold, first_sample, bad, dirty, guard, after, spikes
):
    """The spikes found, as SPIKE records in order of sample, then unit; how many there are. Empties `out`.

    Left out are those before `first_sample` and, where something was invalid lately (`dirty`), those with an invalid sample of their root
    from `guard` before to `after` behind; bad (channels, columns) bool is a ring by sample number.
    """
    n, columns = 0, bad.shape[1]
    for i in range(state[N_OUT]):
        u, t = int(out[i, 0]), int(out[i, 1])
        seen = t >= first_sample
        if dirty and seen:
            for s in range(t - guard, t + after + 1):
                seen &= not bad[roots[u], s % columns]
        if not seen:
            continue
        k = n
        while k > 0 and (
            spikes[k - 1].sample > t or (spikes[k - 1].sample == t and spikes[k - 1].unit > unit_ids[u])
        ):
            spikes[k] = spikes[k - 1]
            k -= 1
        spikes[k].sample, spikes[k].unit, spikes[k].channel, spikes[k].flags = t, unit_ids[u], roots[u], 0
        spikes[k].amplitude_uv = out[i, 2] * amplitude_uv[u]
        spikes[k].score = out[i, 3] / threshold[u]
        n += 1
    state[N_OUT] = 0
    return n
