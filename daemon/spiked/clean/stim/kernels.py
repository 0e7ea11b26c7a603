"""The compiled passes of the streaming removal: one sample of all channels after the other, channels innermost.

Every decision about a sample is tied to samples at fixed distances from it, never to where a chunk ends. The moments of the
sliding cubic are whole numbers (int32, which may wrap on the way but not where they are used), so they cannot drift.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.clean.stim.blocks import resolve, right_halves
from spiked.clean.stim.state import (
    ARMED,
    BUSY,
    DEAD,
    FOUND,
    LEARN_AT,
    LOOK_UNTIL,
    MARKED,
    MAX_FOUND,
    NEVER,
    NEXT,
    ONSET,
    OPEN_UNTIL,
    PATTERN,
    RAW,
    READY,
    SLOT,
    UNSEEN,
    WAIT,
)
from spiked.clean.stim.stretch import begin, end_wait, learn

# mypy: disable-error-code="no-untyped-def"

ONSET_SIGMAS = 8.0  # a step of one sample this large is no noise
DETECT_SIGMAS = 12.0
JUMP_SIGMAS = 6.0  # a channel this far from its place just after an onset carries the artifact
PULSE_SHARE = 0.25  # a step this large, of the pulse's largest deflection, is still the pulse
TEMPLATE_SIGMAS = 2.0  # a template this large says that there is an artifact
NEAR_SIGMAS = 3.0  # what one sample can move the cubic by is bounded: a spike stays as it is
FLAT = 2  # equal steps in a row that mean an amplifier at its end


@njit(nogil=True, cache=True)
def jumps(s, t, sigmas):
    """How many channels step by more than so many noise SDs from sample t - 1 to t."""
    rows = len(s.raw)
    now, before = s.raw[t % rows], s.raw[(t - 1) % rows]
    n = np.int32(0)
    for c in range(len(now)):
        n += abs(now[c] - before[c]) > np.float32(sigmas) * s.sigma[c]
    return n


@njit(nogil=True, cache=True)
def first_jump(s, f, start, stop):
    """The sample in [start, stop) at which a stimulus begins: where most channels step at once; -1 without one."""
    best, at = f.marked - 1, -1
    for t in range(start, stop):
        n = jumps(s, t, ONSET_SIGMAS)
        if n > best:
            if at >= 0 and n < 2 * best:  # the pulse goes on
                continue
            best, at = n, t
    return at


@njit(nogil=True, cache=True)
def measure(s, first, stop):
    """Noise and baseline of every channel from the samples [first, stop)."""
    rows, channels = s.raw.shape
    n = np.float32(stop - first)
    for c in range(channels):
        s.w0[c] = 0
    mean, step = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for t in range(first, stop):
        row, before = s.raw[t % rows], s.raw[(max(t - 1, first)) % rows]
        for c in range(channels):
            mean[c] += row[c]
            step[c] += abs(row[c] - before[c])
    count, total = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
    for c in range(channels):
        mean[c] /= n
        s.sigma[c] = max(np.float32(0.3), np.float32(0.886) * step[c] / max(n - np.float32(1), np.float32(1)))
    for t in range(first, stop):
        row = s.raw[t % rows]
        for c in range(channels):
            near = abs(row[c] - mean[c]) < np.float32(3) * s.sigma[c]
            count[c] += np.float32(near)
            total[c] += row[c] if near else np.float32(0)
    for c in range(channels):
        s.base[c] = total[c] / count[c] if count[c] > 0 else mean[c]


@njit(nogil=True, cache=True)
def _take(s, f, t, codes, dead, zero):
    """One row of codes into the ring; whether a channel is clipped or missing."""
    k = t % len(s.raw)
    raw, peg = s.raw[k], s.peg[k]
    low, high = np.float32(f.low), np.float32(f.high)
    for c in range(len(raw)):
        raw[c] = np.float32(codes[c]) - zero
    any_bad = np.int32(0)
    for c in range(len(raw)):
        any_bad += np.int32(not (raw[c] > low and raw[c] < high))
    if any_bad:
        for c in range(len(raw)):
            peg[c] = not (raw[c] > low and raw[c] < high)
    else:
        peg[:] = False
    if len(dead) or any_bad:
        for c in range(len(raw)):
            if len(dead) and dead[c]:
                peg[c], raw[c] = True, s.base[c]
            elif not np.isfinite(raw[c]):
                raw[c] = s.base[c]
    return any_bad > 0 or len(dead) > 0


@njit(nogil=True, cache=True)
def _onset(s, f, t, o, seen):
    """A stimulus began at o, which is t or before."""
    s.ints[ONSET], s.ints[LOOK_UNTIL], s.ints[ARMED] = o, max(o + f.look, t), 0
    s.ints[UNSEEN] = not seen
    s.ints[LEARN_AT] = o + f.taught
    s.ints[OPEN_UNTIL] = o + f.longest
    k = s.ints[FOUND] % MAX_FOUND
    s.found[k].sample, s.found[k].pattern = o, s.ints[PATTERN]
    s.found[k].channels, s.found[k].peak_uv, s.found[k].clipped_until = 0, 0.0, o
    for c in range(len(s.phase)):  # clipped before it was known why
        if s.phase[c] == DEAD and s.onset[c] == o:
            s.found[k].channels += 1
            s.slot[c] = s.ints[SLOT]
    s.ints[FOUND] += 1


@njit(nogil=True, cache=True)
def _begin_all(s, f, channels, o, t):
    """A pulse began at o on these channels; t is the present sample."""
    if len(channels):
        right_halves(s, f, channels[(s.live[channels] != 0) & (s.weight[channels] != 0)], o, t)
    for c in channels:
        begin(s, f, c, o, t)


@njit(nogil=True, cache=True)
def _look(s, f, t, present):
    """Which channels leave their place at t, just after the onset; `present` is the newest sample."""
    rows, o = len(s.raw), s.ints[ONSET]
    now, before = s.raw[t % rows], s.raw[(o - 1) % rows]
    slot, k = s.ints[SLOT], (s.ints[FOUND] - 1) % MAX_FOUND
    last = t == s.ints[LOOK_UNTIL]
    found = np.zeros(len(now), np.bool_)
    for c in range(len(now)):
        if s.phase[c] == DEAD and s.onset[c] == o:
            continue
        away = abs(now[c] - before[c]) > np.float32(JUMP_SIGMAS) * s.sigma[c]
        carries = s.peg[t % rows, c] or (away and not s.ints[UNSEEN])
        if not carries and last and s.seen[slot, c] >= 5:
            carries = abs(s.template[slot, :, c].sum()) > np.float32(TEMPLATE_SIGMAS) * s.sigma[c]
        found[c] = carries
    _begin_all(s, f, np.flatnonzero(found), o, present)
    s.found[k].channels += found.sum()


@njit(nogil=True, cache=True)
def _states(s, f, t):
    """Every channel that is not simply untouched or cleaned, one sample on; how many there are."""
    rows = len(s.raw)
    now, before, peg = s.raw[t % rows], s.raw[(t - 1) % rows], s.peg[t % rows]
    record = s.found[(s.ints[FOUND] - 1) % MAX_FOUND]
    _begin_all(s, f, np.flatnonzero(peg & (s.live != 0)), t, t)
    busy = 0
    for c in range(len(now)):
        if s.live[c]:
            continue
        step = abs(now[c] - before[c])
        away = abs(now[c] - s.base[c])
        if away >= np.float32(0.95) * s.peak[c] and step == 0 and away > np.float32(20) * s.sigma[c]:
            s.flat[c] += 1
        else:
            s.flat[c] = 0
        s.peak[c] = max(s.peak[c], away)
        steep = step > max(np.float32(JUMP_SIGMAS) * s.sigma[c], np.float32(PULSE_SHARE) * s.peak[c])
        bad = peg[c] or steep or s.flat[c] >= FLAT
        if bad and s.phase[c] == WAIT:
            end_wait(s, f, c, t - 1)
            s.phase[c] = DEAD
        if s.phase[c] == DEAD:
            if bad:
                s.last_bad[c] = t
                record.clipped_until = max(record.clipped_until, t + 1)
                record.peak_uv = max(record.peak_uv, away * f.scale[c])
            if bad or t - s.last_bad[c] <= f.hold:
                s.out[t % rows, c], s.bad[t % rows, c] = s.base[c], True
                if t - s.onset[c] > f.timeout:
                    s.phase[c], s.live[c], s.weight[c] = RAW, True, 0
            else:
                s.phase[c], s.start[c] = WAIT, t
        busy += not s.live[c]
    return busy


FAST = {"contract", "nsz", "nnan", "ninf"}


@njit(nogil=True, cache=True, fastmath=FAST)
def _remainder(s, f, t, x):
    """x (C,) = sample t less baseline and what still decays, in quanta; the decay goes one sample on."""
    raw = s.raw[t % len(s.raw)]
    inverse, limit = np.float32(1.0 / f.quantum), np.float32(f.limit)
    for c in range(len(x)):
        x[c] = raw[c] - s.base[c]
    for k in range(len(s.z)):
        z, rho = s.z[k], f.rho[k]
        for c in range(len(x)):
            x[c] -= z[c]
            z[c] *= rho
    for c in range(len(x)):
        x[c] = np.rint(min(max(x[c] * inverse, -limit), limit))


@njit(nogil=True, cache=True, fastmath=FAST)
def _bring_near(s, f, x, held):
    """held (C,) = x, or where it lies further than noise does from the line through the window, the end of that reach."""
    reach, most = np.float32(NEAR_SIGMAS / f.quantum), np.int32(f.far)
    e0, e1 = np.float32(f.edge[0]), np.float32(f.edge[1])
    u0, u1, sigma, far = s.u0, s.u1, s.sigma, s.far
    for c in range(len(x)):
        held[c] = e0 * np.float32(u0[c]) + e1 * np.float32(u1[c])
    for c in range(len(x)):
        bound = reach * sigma[c]
        held[c] = min(max(x[c], held[c] - bound), held[c] + bound)
    for c in range(len(x)):
        far[c] = np.int32(far[c] + 1) if held[c] != x[c] else np.int32(0)
    for c in range(len(x)):
        held[c] = np.rint(held[c]) if far[c] <= most else x[c]


@njit(nogil=True, cache=True)
def _turn(w0, w1, w2, old, new, half):
    """The moments of a window one sample on. Small loops over few arrays: they become vector instructions."""
    n0, n1, n2, n3 = np.int32(half), np.int32(half + 1), np.int32(half * half), np.int32((half + 1) ** 2)
    for c in range(len(w2)):
        w2[c] = np.int32(w2[c] - np.int32(2) * w1[c] + w0[c] - n3 * old[c] + n2 * new[c])
    for c in range(len(w1)):
        w1[c] = np.int32(w1[c] - w0[c] + n1 * old[c] + n0 * new[c])
    for c in range(len(w0)):
        w0[c] = np.int32(w0[c] - old[c] + new[c])


@njit(nogil=True, cache=True, fastmath=FAST)
def _decide(s, f, t, off):
    """The sample `half` before t, where it can be decided; off (C,) is filled with what is its artifact."""
    k = (t - f.half) % len(s.raw)
    mid, was, out = s.rem[k], s.raw[k], s.out[k]
    a, b, q = np.float32(f.a), np.float32(f.b), np.float32(f.quantum)
    w0, w2, base, weight, live = s.w0, s.w2, s.base, s.weight, s.live
    for c in range(len(off)):
        off[c] = a * np.float32(w0[c]) - b * np.float32(w2[c]) - q * np.float32(mid[c])
    for c in range(len(off)):
        off[c] += was[c] - base[c]
    for c in range(len(off)):
        v = was[c] - weight[c] * off[c]
        out[c] = v if live[c] != 0 else out[c]


@njit(nogil=True, cache=True, fastmath=FAST)
def _fade(s, f, off):
    """Channels whose artifact stayed below the noise for long fade to the untouched; how many are not there yet."""
    down, need = np.float32(1.0 / f.fade), np.int32(f.calm)
    calm, weight, live, sigma = s.calm, s.weight, s.live, s.sigma
    for c in range(len(off)):
        calm[c] = np.int32(calm[c] + 1) if abs(off[c]) < sigma[c] else np.int32(0)
    for c in range(len(off)):
        calm[c] *= live[c]
    active = np.int32(0)
    for c in range(len(off)):
        w = weight[c]
        less = max(w - down, np.float32(0))
        w = less if live[c] != 0 and (calm[c] > need or w < np.float32(1)) else w
        weight[c] = w
        active += np.int32(w > np.float32(0))
    return active


@njit(nogil=True, cache=True)
def _slide(s, f, t, x, held):
    """All channels one sample on; how many are being cleaned. x and held (C,) are used."""
    rows = len(s.raw)
    _remainder(s, f, t, x)
    _bring_near(s, f, x, held)
    rem, near = s.rem[t % rows], s.near[t % rows]
    for c in range(len(x)):
        rem[c] = np.int32(x[c])
    for c in range(len(x)):
        near[c] = np.int32(held[c])
    last = (t - 2 * f.half - 1) % rows
    _turn(s.w0, s.w1, s.w2, s.near[last], near, f.half)
    _follow(s.u0, s.u1, s.rem[last], rem, f.half)
    _decide(s, f, t, x)
    return _fade(s, f, x)


@njit(nogil=True, cache=True)
def _follow(u0, u1, old, new, half):
    """As `_turn`, the first two."""
    n0, n1 = np.int32(half), np.int32(half + 1)
    for c in range(len(u1)):
        u1[c] = np.int32(u1[c] - u0[c] + n1 * old[c] + n0 * new[c])
    for c in range(len(u0)):
        u0[c] = np.int32(u0[c] - old[c] + new[c])


@njit(nogil=True, cache=True)
def arm(s, f, t, marked, pattern, slot):
    """A stimulus is marked at `marked`; t is the next sample. Its true onset is looked for in what came and what comes."""
    if abs(s.ints[ONSET] - marked) <= f.reach:  # it was found before
        k = (s.ints[FOUND] - 1) % MAX_FOUND
        if s.found[k].pattern == 0:
            s.found[k].pattern = pattern
            s.slot[:] = np.where(s.onset == s.ints[ONSET], slot, s.slot)
        return
    s.ints[MARKED], s.ints[PATTERN], s.ints[SLOT] = marked, pattern, slot
    s.ints[OPEN_UNTIL] = max(t, marked) + f.longest
    o = first_jump(s, f, max(marked - f.reach, t - f.history + 1), min(t, marked + f.reach + 1))
    if o >= 0:
        _onset(s, f, t, o, True)
        for k in range(o, min(t, o + f.look + 1)):
            _look(s, f, k, t - 1)
    elif t > marked + f.reach:
        _onset(s, f, t, marked, False)
    else:
        s.ints[ARMED] = marked + f.reach


@njit(nogil=True, cache=True)
def watch(s, f, first, codes, dead, zero, known_from, every):
    """Samples of a time without stimuli: how many come before one that nobody marked, all of them if none.

    Noise is measured anew every so many samples of the absolute grid.
    """
    for i in range(len(codes)):
        t = first + i
        _take(s, f, t, codes[i], dead[i] if len(dead) else dead[0:0, 0], zero)
        if t % every == 0 and t - f.history >= known_from:
            measure(s, t - f.history, t)
            s.ints[READY] = 1
        if (
            t == known_from
            or not s.ints[READY]
            or (len(dead) and (dead[i].any() or (i > 0 and dead[i - 1].any())))
        ):
            continue
        if jumps(s, t, DETECT_SIGMAS) >= f.detect:
            return i
    return len(codes)


@njit(nogil=True, cache=True)
def advance(s, f, first, codes, dead, zero):
    """Samples first, first + 1 ... of codes (n, C) while the window is open; how many were taken, and whether it closed.

    `dead` is (n, C) bool, or (0, 0).
    """
    channels = s.raw.shape[1]
    x, held = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for i in range(len(codes)):
        t = first + i
        s.bad[t % len(s.bad)] = False
        doubted = _take(s, f, t, codes[i], dead[i] if len(dead) else dead[0:0, 0], zero)
        if s.ints[ARMED] and jumps(s, t, ONSET_SIGMAS) >= f.marked:
            _onset(s, f, t, t, True)
        elif f.detect > 0 and t > s.ints[ONSET] + f.reach and jumps(s, t, DETECT_SIGMAS) >= f.detect:
            s.ints[PATTERN] = s.ints[SLOT] = 0
            _onset(s, f, t, t, True)
        elif s.ints[ARMED] and t >= s.ints[ARMED]:
            _onset(s, f, t, s.ints[MARKED], False)
        if t <= s.ints[LOOK_UNTIL]:
            _look(s, f, t, t)
            doubted = True
        if doubted or s.ints[BUSY]:
            s.ints[BUSY] = _states(s, f, t)
        active = _slide(s, f, t, x, held)
        s.ints[NEXT] = t + 1
        if s.ints[BUSY]:
            resolve(s, f, t)
        elif active == 0 and t > s.ints[LOOK_UNTIL] and not s.ints[ARMED]:
            _untouched(s, f, t)
            return i + 1, True
        if f.learn and t - f.half - s.ints[LEARN_AT] >= 0:
            s.ints[LEARN_AT] = NEVER
            for c in range(channels):
                learn(s, f, c)
        if t >= s.ints[OPEN_UNTIL]:
            give_up(s, f)
    return len(codes), False


@njit(nogil=True, cache=True)
def give_up(s, f):
    """Long after the last pulse: whatever is still not right is left to itself."""
    for c in range(len(s.live)):
        if not s.live[c]:
            end_wait(s, f, c, s.ints[OPEN_UNTIL])
            s.phase[c], s.live[c], s.weight[c] = RAW, True, 0
        elif s.weight[c] == 1:
            s.weight[c] -= np.float32(1.0 / f.fade)
    s.ints[BUSY] = 0
    s.ints[OPEN_UNTIL] += f.longest


@njit(nogil=True, cache=True)
def _untouched(s, f, t):
    """The last samples of a window are as they came."""
    rows = len(s.raw)
    for k in range(t - f.half + 1, t + 1):
        s.out[k % rows] = s.raw[k % rows]
        s.bad[k % rows] = False


@njit(nogil=True, cache=True)
def decided(s, f):
    """The first sample that is not decided yet, when the window is open."""
    until = s.ints[NEXT] - f.half
    for c in range(len(s.phase)):
        if s.phase[c] == WAIT:
            until = min(until, s.start[c])
    return until


@njit(nogil=True, cache=True)
def flush(s, f, first, stop):
    """Decide everything before `stop`: what is neither blank nor untouched nor cleaned yet is blank."""
    rows, half = len(s.raw), f.half
    for c in range(len(s.live)):
        if s.live[c] and s.weight[c] == 0:
            for k in range(stop - half, stop):
                s.out[k % rows, c], s.bad[k % rows, c] = s.raw[k % rows, c], False
        elif s.live[c]:
            right_halves(s, f, np.full(1, c), stop, stop - 1)
            begin(s, f, c, stop, stop - 1)
        else:
            end_wait(s, f, c, stop - 1)


@njit(nogil=True, cache=True)
def read(s, first, zero, x, bad):
    """Decided samples from `first` on, as codes."""
    rows = len(s.out)
    for i in range(len(x)):
        k = (first + i) % rows
        for c in range(x.shape[1]):
            x[i, c] = s.out[k, c] + zero
            bad[i, c] = s.bad[k, c]
