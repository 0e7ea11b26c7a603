"""The early step of template matching: the same units, by the first part of their waveforms alone.

A second matcher, with filters that end soon after the trough (Templates.early) and next to no time for rivals, works beside the one that
decides. It reads the samples that this one has whitened, subtracts what it found itself and changes nothing in the other, so final spikes
are the same with it and without, bit for bit. Its decisions belong to sample numbers too: any cut of the stream gives the same ones.

So little is seen of a spike that a small unit's filter answers to the rise of a large one's. Therefore what was seen must be explained by the spike
and those found before it; what is not is left to the final decision.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.templates import kernels
from spiked.templates.kernels import KNOWN, N_OUT
from spiked.templates.sorter import TemplateSorter

# mypy: disable-error-code="no-untyped-def"

EDGE_MS = 0.1  # within which candidates compete: enough to tell a peak from its flank
NOISE, SHAPE = (
    1.3,
    0.2,
)  # what may be left unexplained: times the noise's energy, plus this part of the spike's own
EARLIER = 256  # spikes found lately, whose waveforms are taken out too


@njit(nogil=True, cache=True)
def explained(
    y, first, out, n_out, earlier, n, before, span, ptr, channel, wave_ptr, wave_channel, waveform, precision, noise, shape, left
):  # fmt: skip
    """Keep of out[:n_out] (unit, sample, amplitude, gain) what explains the samples; (how many are kept, how many are in `earlier`).

    y (channels, m) begins at sample number `first`. Compared are `span` samples from `before` the trough on, on the electrodes of the unit's
    filter. earlier (EARLIER, 3): unit, sample, amplitude of the spikes before.
    """
    kept, length = 0, waveform.shape[1]
    for k in range(n_out):
        u, t, a = int(out[k, 0]), int(out[k, 1]), np.float32(out[k, 2])
        misfit, energy, terms = 0.0, 0.0, 0
        for e in range(ptr[u], ptr[u + 1]):
            c = channel[e]
            at = entry_of(u, c, wave_ptr, wave_channel)
            if at < 0:
                continue
            start = t - before - first
            for i in range(span):
                w = a * waveform[at, i]
                left[i] = y[c, start + i] - w
                energy += precision[c] * w * w
            for q in range(n):
                lag = t - int(earlier[q, 1])
                if lag >= length or lag <= -span:
                    continue
                of = entry_of(int(earlier[q, 0]), c, wave_ptr, wave_channel)
                if of >= 0:
                    b = np.float32(earlier[q, 2])
                    for i in range(max(0, -lag), min(span, length - lag)):
                        left[i] -= b * waveform[of, i + lag]
            for i in range(span):
                misfit += precision[c] * left[i] * left[i]
            terms += span
        n = remember(earlier, n, out[k], t - length - span)
        if misfit <= noise * terms + shape * energy:
            out[kept] = out[k]
            kept += 1
    return kept, n


@njit(nogil=True, cache=True)
def entry_of(u, c, wave_ptr, wave_channel):
    """Where unit u's waveform on channel c is; -1: it has none."""
    for e in range(wave_ptr[u], wave_ptr[u + 1]):
        if wave_channel[e] == c:
            return e
    return -1


@njit(nogil=True, cache=True)
def remember(earlier, n, spike, since):
    """Append a spike to earlier[:n], and forget those before sample `since`; how many there are."""
    kept = 0
    for q in range(n):
        if earlier[q, 1] >= since and (kept > 0 or q > 0 or n < len(earlier)):
            earlier[kept] = earlier[q]
            kept += 1
    if kept < len(earlier):
        earlier[kept, 0], earlier[kept, 1], earlier[kept, 2] = spike[0], spike[1], spike[2]
        kept += 1
    return kept


class EarlySorter(TemplateSorter):
    """Early decisions beside `final`, which stages every piece of its stream here.

    It works when it is asked for its spikes, so that the final decisions of a chunk are out by then.
    """

    def __init__(self, final: TemplateSorter, device: str = "cpu") -> None:
        t = final.templates.early
        edge = max(1, round(EDGE_MS * t.fs_hz / 1000))
        # Of what surrounds the trough, a decision sees the same however the stream was cut.
        self._span = t.length + edge
        super().__init__(
            t, reuse=True, window_ms=EDGE_MS, track=False, device=device, past=self._span + 3 * edge
        )
        self._final = final
        self._waveform, self._precision = t.waveform.copy(), np.diag(t.precision).copy()
        self._earlier, self._n_earlier = np.zeros((EARLIER, 3)), 0
        self._left = np.zeros(self._span, np.float32)
        self._staged, self._told, self._changed = 0, 0, -1
        self._after = min(self._guard, self._span - t.before - 1)
        self._explain(0)

    def stage(self, filtered: np.ndarray, first_sample: int) -> None:
        """Take the next samples (channels, n), whitened in time; what was staged before is worked on at once."""
        self.work()
        if self._next != first_sample:
            self.reset(first_sample)
        n = filtered.shape[1]
        self._filtered[1, :, self._tail : self._tail + n] = filtered
        self._staged, self._next = n, first_sample + n

    def work(self) -> None:
        """Decide on what was staged."""
        if n := self._staged:
            self._staged = 0
            self._advance(n)
            if self.counts[N_OUT]:
                self._explain(n)
            kernels.slide(self._filtered, n, self._tail)
            if self.counts[N_OUT]:
                self._told += self._tell(self._spikes[self._told :])
        if self._changed >= 0:
            u, self._changed = self._changed, -1
            self._follow(u)

    def _explain(self, n: int) -> None:
        """Drop what does not explain the samples; the newest n follow the tail."""
        t = self.templates
        first = (self._next or 0) - n - self._tail
        self.counts[N_OUT], self._n_earlier = explained(
            self._filtered[1], first, self._out, self.counts[N_OUT], self._earlier, self._n_earlier, t.before, self._span,
            t.ptr, t.channel, t.wave_ptr, t.wave_channel, self._waveform, self._precision, NOISE, SHAPE, self._left,
        )  # fmt: skip

    def _tell(self, spikes: np.ndarray) -> int:
        t, f = self.templates, self._final
        dirty = int(self.counts[KNOWN]) <= f._dirty_until
        n = kernels.tell(
            self._out, self.counts, t.unit_ids, t.roots, t.root_amplitude_uv, t.threshold, f._start, f._bad, dirty,
            self._guard, self._after, spikes,
        )  # fmt: skip
        return int(n)

    def found(self) -> np.ndarray:
        """Early decisions since the last call: SPIKE records, overwritten by the next piece."""
        self.work()
        n, self._told = self._told, 0
        return self._spikes[:n]

    def renew(self, u: int) -> None:
        """Unit u has another filter and waveform in `final` from the next piece on."""
        self.work()
        self._changed = u

    def _follow(self, u: int) -> None:
        t, f = self.templates, self._final
        assert f.tracker is not None
        mine, seen = slice(t.ptr[u], t.ptr[u + 1]), slice(t.wave_ptr[u], t.wave_ptr[u + 1])
        self._weight[mine], self._waveform[seen] = f._weight[mine], f.tracker.waveform[seen]
        self.gram.renew(u, self._waveform, self._weight)
        if self._dense is not None:
            self._dense.renew(u, self._weight)

    def reset(self, first_sample: int) -> None:
        super().reset(first_sample)
        self._staged = self._told = self._n_earlier = 0
