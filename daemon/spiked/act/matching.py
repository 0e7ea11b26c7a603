"""Which rules a run of spikes completes: one pass, spike by spike, no allocation and no loop over units.

Everything is counted in sample numbers, so that how the stream was cut into chunks changes nothing.
"""

from __future__ import annotations

from numba import njit

from spiked_client.protocol import TRIGGERS

# mypy: disable-error-code="no-untyped-def"

COUNT, SHARE, SEQUENCE = range(3)
# columns of `rule` (rules, N_RULE) int64
(KIND, NEED, WINDOW, REFRACTORY, LAST, HEAD, FILL, DISTINCT, N_STEPS, N_RULE) = range(10)
QUEUE = 4096  # spikes a window holds; in a fuller one the oldest are forgotten
MAX_STEPS, KEPT = 8, 32  # of a sequence: steps, and unfinished runs kept per step
MAX_HELD = 4096  # spikes that wait until their order is final; more are let through at once
NEVER = -(1 << 62)


@njit(nogil=True, cache=True)
def put_in_order(held, n, spikes):
    """Insert spikes into held[:n] (SPIKE, by sample, then unit); how many are held then. There must be room."""
    for s in spikes:
        i = n
        while i > 0 and (
            held[i - 1].sample > s.sample or (held[i - 1].sample == s.sample and held[i - 1].unit > s.unit)
        ):
            held[i] = held[i - 1]
            i -= 1
        held[i] = s
        n += 1
    return n


@njit(nogil=True, cache=True)
def ready(held, n, until):
    """How many of held[:n] lie before sample number `until`."""
    k = 0
    while k < n and held[k].sample < until:
        k += 1
    return k


@njit(nogil=True, cache=True)
def drop_first(held, n, k):
    """Forget the first k of held[:n]; how many are left."""
    for i in range(k, n):
        held[i - k] = held[i]
    return n - k


@njit(nogil=True, inline="always")
def _expire(rule, r, t, q_sample, q_index, present):
    """Forget what has left the window (t - window, t]."""
    while rule[r, FILL] > 0:
        at = (rule[r, HEAD] - rule[r, FILL]) % QUEUE
        if q_sample[r, at] > t - rule[r, WINDOW] and rule[r, FILL] < QUEUE:
            return
        rule[r, FILL] -= 1
        if rule[r, KIND] == SHARE:
            u = q_index[r, at]
            present[r, u] -= 1
            rule[r, DISTINCT] -= present[r, u] == 0


@njit(nogil=True, inline="always")
def _enter(rule, r, t, u, q_sample, q_index, present):
    at = rule[r, HEAD] % QUEUE
    q_sample[r, at], q_index[r, at] = t, u
    rule[r, HEAD] += 1
    rule[r, FILL] += 1
    if rule[r, KIND] == SHARE:
        rule[r, DISTINCT] += present[r, u] == 0
        present[r, u] += 1


@njit(nogil=True, inline="always")
def _tell_window(rule, r, k, q_sample, q_index, present, fired, trig_sample, trig_index):
    """The newest spikes of the window as the triggers of firing k; the window begins anew."""
    n = min(rule[r, FILL], TRIGGERS)
    for i in range(n):
        at = (rule[r, HEAD] - n + i) % QUEUE
        trig_sample[k, i], trig_index[k, i] = q_sample[r, at], q_index[r, at]
    fired[k, 2] = n
    if rule[r, KIND] == SHARE:
        present[r, :] = 0
    rule[r, FILL] = rule[r, DISTINCT] = 0


@njit(nogil=True, inline="always")
def _advance(rule, r, t, u, step_unit, step_least, step_most, runs, run_at):
    """Take a spike into the unfinished runs of a sequence; the last step's row when it is complete, else -1.

    runs (rules, steps, KEPT, steps): per step the newest runs that reached it, as the samples of their spikes.
    """
    steps, done = rule[r, N_STEPS], -1
    for j in range(steps - 1, -1, -1):
        if step_unit[r, j] != u:
            continue
        row = run_at[r, j] % KEPT
        if j > 0:
            best = -1
            for m in range(min(run_at[r, j - 1], KEPT)):
                lag = t - runs[r, j - 1, m, j - 1]
                if step_least[r, j] <= lag <= step_most[r, j] and (
                    best < 0 or runs[r, j - 1, m, j - 1] > runs[r, j - 1, best, j - 1]
                ):
                    best = m
            if best < 0:
                continue
            for i in range(j):
                runs[r, j, row, i] = runs[r, j - 1, best, i]
        runs[r, j, row, j] = t
        run_at[r, j] += 1
        if j == steps - 1:
            done = row  # it may begin another one as well, which counts where this one comes too soon
    return done


@njit(nogil=True, cache=True)
def match(
    spikes, begin, newest, lookup, unit_ptr, unit_rule, rule, q_sample, q_index, present,
    step_unit, step_least, step_most, runs, run_at, fired, trig_sample, trig_index,
):  # fmt: skip
    """Take spikes[begin:] (SPIKE) one by one; (how many fired, next spike to take, newest sample).

    `lookup`: unit id -> index or -1; unit_ptr, unit_rule: the rules of every unit. Into fired[k]: rule, sample, number
    of triggers; trig_sample, trig_index (firings, TRIGGERS): their samples and units' indices. Ends early when `fired` is full.
    """
    n_fired = 0
    for i in range(begin, len(spikes)):
        unit = spikes[i].unit
        newest = max(newest, spikes[i].sample)
        u = lookup[unit] if 0 <= unit < len(lookup) else -1
        if u < 0:
            continue
        if n_fired + unit_ptr[u + 1] - unit_ptr[u] > len(fired):
            return n_fired, i, newest
        t, own = newest, spikes[i].sample  # they differ where spikes come before their order is final
        for p in range(unit_ptr[u], unit_ptr[u + 1]):
            r = unit_rule[p]
            row = -1
            if rule[r, KIND] == SEQUENCE:
                row = _advance(rule, r, own, u, step_unit, step_least, step_most, runs, run_at)
                complete = row >= 0
            else:
                _expire(rule, r, t, q_sample, q_index, present)
                if own <= t - rule[r, WINDOW] and rule[r, NEED] > 1:
                    continue
                _enter(rule, r, own, u, q_sample, q_index, present)
                have = rule[r, DISTINCT] if rule[r, KIND] == SHARE else rule[r, FILL]
                complete = have >= rule[r, NEED]
            if not complete or t - rule[r, LAST] < rule[r, REFRACTORY]:
                continue
            rule[r, LAST] = t
            fired[n_fired, 0], fired[n_fired, 1] = r, own
            if rule[r, KIND] == SEQUENCE:
                steps = rule[r, N_STEPS]
                for j in range(steps):
                    trig_sample[n_fired, j] = runs[r, steps - 1, row, j]
                    trig_index[n_fired, j] = step_unit[r, j]
                fired[n_fired, 2] = steps
                run_at[r, :] = 0
            else:
                _tell_window(rule, r, n_fired, q_sample, q_index, present, fired, trig_sample, trig_index)
            n_fired += 1
    return n_fired, len(spikes), newest


@njit(nogil=True, cache=True)
def note_blind(rows, start, stop, at):
    """Keep BLIND rows per channel: start, stop (channels + 1, kept) and their next places `at`; the last channel is all of them."""
    channels, kept = start.shape
    for row in rows:
        c = row.channel if row.channel >= 0 else channels - 1
        if c >= channels:
            continue
        last = (at[c] - 1) % kept
        if row.start <= stop[c, last] and row.stop >= start[c, last]:
            start[c, last], stop[c, last] = min(start[c, last], row.start), max(stop[c, last], row.stop)
            continue
        k = at[c] % kept
        start[c, k], stop[c, k] = row.start, row.stop
        at[c] += 1


@njit(nogil=True, cache=True)
def was_blind(channels, start, stop, since, until):
    """Whether one of these rows of what `note_blind` keeps was blind in [since, until]."""
    for c in channels:
        for k in range(start.shape[1]):
            if start[c, k] <= until and stop[c, k] > since:
                return True
    return False
