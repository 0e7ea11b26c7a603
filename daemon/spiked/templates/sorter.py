"""Live template matching: a streaming object from cleaned samples to sorted spikes.

The idea is Kilosort4's (whiten, project on a few temporal components, match, subtract, repeat; Pachitariu et al. 2024), made
causal: a spike is decided `lookahead_samples` after its trough, or some window later where a larger rival had to be
subtracted first. Unlike it, the noise is whitened in time as well, a unit's amplitude has a prior with the unit's own
spread, and every unit its own threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spiked.detect.detector import GUARD_MS
from spiked.templates import kernels
from spiked.templates.gram import SHARED
from spiked.templates.kernels import DROPPED, KNOWN, LANE, N_OUT, N_PAST, SETTLED
from spiked.templates.library import Templates
from spiked.templates.torch_scores import TorchScores
from spiked.templates.tracking import Tracker, follow
from spiked_client.protocol import SPIKE

if TYPE_CHECKING:
    from spiked.templates.early import EarlySorter

WINDOW_MS = 0.35  # within which candidates compete
REFRACTORY_MS = 0.3  # of one unit, between two spikes
LEVEL_RATE = 1 / 200  # how fast a unit's amplitude is followed, per spike
LEAST_ENERGY = 1.0  # of a template, in units of the noise's variance
PIECE = 1024  # samples that are worked on at a time
MAX_OUT, MAX_PAST = 65536, 16384
NO_SPIKES = np.zeros(0, SPIKE)


class TemplateSorter:
    """Streaming template matching with known templates.

    `process(x, valid, first_sample)` takes consecutive cleaned samples, any number of them, and returns the spikes (SPIKE
    records, by sample, then unit) that became final; all before `decided_until` are. The concatenated result
    does not depend on how the stream was cut. `score` of a spike is its gain over the unit's threshold. With `reuse` the records
    are overwritten by the next call. `early` gets every piece too, where there is one.
    """

    early: EarlySorter | None = None

    def __init__(
        self, templates: Templates, reuse: bool = False, window_ms: float = WINDOW_MS, track: bool = True, device: str = "cpu",
        past: int = 0,
    ) -> None:  # fmt: skip
        t = self.templates = templates
        self.gram, self._reuse = t.gram.own(), reuse
        c, (k, length) = t.n_channels, t.basis.shape
        per_ms = t.fs_hz / 1000
        self.window, self._refractory = max(1, round(window_ms * per_ms)), round(REFRACTORY_MS * per_ms)
        self._guard, self._second = round(GUARD_MS * per_ms), round(1000 * per_ms)
        self._taps = kernels.whole_vectors(t.taps[None, ::-1], front=True)[0]
        self._basis = kernels.whole_vectors(t.basis)
        self._dense = None if device == "cpu" else TorchScores(t, device, PIECE)
        self._weight, self.tracker = t.weight.copy(), Tracker(t) if track else None
        # filtered samples of the past that are still needed: for a score, or until all is known near a spike
        self._tail = max(length - 1, len(self._taps) - 1, past)
        if track:
            self._tail = 2 * t.waveform.shape[1] + length + 6 * self.window
        self._filtered = np.zeros((2, c, self._tail + PIECE + LANE), np.float32)
        self._state = np.zeros((c, len(t.sos), 2))
        self._projected = np.zeros((c, k, PIECE), np.float32)
        self._total = np.zeros(PIECE, np.float32)
        columns = PIECE + 2 * (length + t.waveform.shape[1]) + 8 * self.window
        self._scores = np.zeros((len(t), columns), np.float32)
        self._bad = np.zeros(
            (c, columns), bool
        )  # a ring by sample number, current only while something is invalid
        self._dirty_until, self._start = 0, 0
        self.level = np.ones(len(t), np.float64)
        self._prior = (1 / np.maximum(t.amplitude_sd, 0.02) ** 2).astype(np.float32)
        # A filter that does not find its own waveform finds nothing.
        self._threshold = np.where(self.gram.energy > LEAST_ENERGY, t.threshold, np.inf).astype(np.float32)
        self._limits = np.stack([t.low, t.high], 1)
        self._latest = np.zeros(len(t), np.int64)
        self._past, self._out = np.zeros((MAX_PAST, 3)), np.zeros((MAX_OUT, 4))
        self._spikes = np.zeros(MAX_OUT, SPIKE)
        self.counts = np.zeros(5, np.int64)
        self._next: int | None = None
        self._late: list[np.ndarray] = []
        self._advance(0)  # compiled here, not when the first samples wait for it
        kernels.whiten(
            np.zeros((c, 0), np.float32), t.sos, self._state, self._taps, self._filtered, self._tail
        )

    @property
    def lookahead_samples(self) -> int:
        """Samples from a trough on, its own included, with which its spike is final if no larger rival is near."""
        return self.templates.length - self.templates.before + self.window

    @property
    def decided_until(self) -> int:
        """Everything before this sample number is final."""
        return int(self.counts[SETTLED]) - 2 * self.window - 1

    @property
    def dropped(self) -> int:
        """Spikes lost because more were found at once than there is room for."""
        return int(self.counts[DROPPED])

    def reset(self, first_sample: int) -> None:
        """Forget the past: the next sample is `first_sample`. The units' amplitudes stay as they were last."""
        self._filtered[:] = 0
        self._state[:] = 0
        self._latest[:] = first_sample - (1 << 40)
        # A score needs samples before and after its own; the first whole one lies `before` after the start.
        self.counts[KNOWN] = first_sample - 1 - (self.templates.length - 1 - self.templates.before)
        self._scores[:] = 0
        self.counts[SETTLED] = self.counts[KNOWN]
        self.counts[N_PAST] = self.counts[N_OUT] = 0
        self._bad[:] = False
        self._dirty_until, self._next, self._start = first_sample, first_sample, first_sample
        if self.tracker is not None:
            self.tracker.n_recent = 0
        if self.early is not None:
            self.early.reset(first_sample)

    def process(self, x: np.ndarray, valid: np.ndarray | None, first_sample: int) -> np.ndarray:
        """x (channels, n) cleaned microvolts float32, valid (channels, n) bool or None; SPIKE records."""
        if self._next != first_sample:
            self.reset(first_sample)
        n = x.shape[1]
        a = 0
        while a < n:  # in pieces that end where a second does
            m = min(n - a, PIECE, self._second - (first_sample + a) % self._second)
            part = x[:, a : a + m]
            if self.early is not None:
                self.early.work()
            self._mark(None if valid is None else valid[:, a : a + m], first_sample + a, m)
            self._take(part, first_sample + a)
            a += m
            if (first_sample + a) % self._second == 0:
                self._follow_drift((first_sample + a) // self._second)
            # What was invalid is remembered for little more than a piece.
            if self.counts[N_OUT] > MAX_OUT // 2 or (a < n and self._dirty):
                self._late.append(self._records().copy())
        self._next = first_sample + n
        found = self._records()
        if self._late:
            found = np.concatenate([*self._late, found])
            found = found[np.lexsort((found["unit"], found["sample"]))]
            self._late = []
        return found

    @property
    def _dirty(self) -> bool:
        """Whether something was invalid so lately that it may lie near a spike."""
        return int(self.counts[KNOWN]) <= self._dirty_until

    def _take(self, x: np.ndarray, first: int) -> None:
        t, n, before = self.templates, x.shape[1], self.counts[N_OUT]
        kernels.whiten(x, t.sos, self._state, self._taps, self._filtered, self._tail)
        self._advance(n)
        if self.tracker is not None:
            self._track(self._out[before : self.counts[N_OUT]], n)
        if self.early is not None:
            self.early.stage(self._filtered[1, :, self._tail : self._tail + n], first)
        kernels.slide(self._filtered, n, self._tail)

    def _track(self, spikes: np.ndarray, n: int) -> None:
        """Average the waveforms of new isolated spikes; n samples follow the tail."""
        t, k = self.templates, self.tracker
        assert k is not None
        if len(spikes):
            k.add(spikes)
        if k.n_recent:
            newest = int(self.counts[KNOWN]) + t.length - 1 - t.before
            k.n_recent = follow(
                self._filtered[1, :, : self._tail + n], newest, self.decided_until, k.recent, k.n_recent, t.before,
                t.waveform.shape[1], t.wave_ptr, t.wave_channel, k.mean, k.counts, self.gram.overlap, SHARED, t.threshold,
            )  # fmt: skip

    def _follow_drift(self, second: int) -> None:
        """One unit's turn: if its waveform has changed, its filter and what it adds to the scores follow."""
        t, k = self.templates, self.tracker
        if k is None or not len(t):
            return
        u = second % len(t)
        if not k.renew(u):
            return
        mine, seen = slice(t.ptr[u], t.ptr[u + 1]), slice(t.wave_ptr[u], t.wave_ptr[u + 1])
        precision = t.precision[np.ix_(t.channel[mine], t.wave_channel[seen])]
        self._weight[mine] = precision @ k.waveform[seen, : t.length] @ t.basis.T
        self.gram.renew(u, k.waveform, self._weight)
        if self._dense is not None:
            self._dense.renew(u, self._weight)
        if self.early is not None:
            self.early.renew(u)

    @property
    def doubtful(self) -> np.ndarray:
        """Ids of the units whose waveform or amplitude is no longer what was calibrated."""
        k = self.tracker
        return self.templates.unit_ids[k.doubtful(self.level)] if k is not None else np.zeros(0, np.int32)

    def match_filtered(self, y: np.ndarray, first_sample: int) -> np.ndarray:
        """As `process`, with samples (channels, n) that passed the filters already; (spikes, 4) float64: unit's index, sample, amplitude, gain."""
        if self._next != first_sample:
            self.reset(first_sample)
        found = []
        for a in range(0, y.shape[1], PIECE):
            part = y[:, a : a + PIECE]
            n = part.shape[1]
            self._filtered[1, :, self._tail : self._tail + n] = part
            self._advance(n)
            kernels.slide(self._filtered, n, self._tail)
            found.append(self._out[: self.counts[N_OUT]].copy())
            self.counts[N_OUT] = 0
        self._next = first_sample + y.shape[1]
        return np.concatenate([np.zeros((0, 4)), *found])

    def _advance(self, n: int) -> None:
        """n new filtered samples follow the tail: as many new scores, and the decisions that they allow."""
        t, g = self.templates, self.gram
        behind = self._tail - (t.length - 1)
        first = int(self.counts[KNOWN]) + 1
        if self._dense is not None and n:
            found = self._dense.scores(self._filtered[1, :, behind : behind + t.length - 1 + n])
            kernels.put(found, n, self._scores, first)
        else:
            kernels.project(self._filtered[1, :, behind:], self._basis, self._projected, n)
            kernels.score(
                self._projected, n, t.ptr, t.channel, self._weight, self._total, self._scores, first
            )
        kernels.take_out_past(n, self.counts, self._past, self._scores, g.ptr, g.unit, g.lags, g.back)
        kernels.match(
            self.counts, self._scores, g.energy, self._prior, self.level, LEVEL_RATE, self._limits, self._threshold,
            self._refractory, self._latest, g.rival_ptr, g.rival, g.ptr, g.unit, g.lags, g.back, self.window,
            self._past, self._out,
        )  # fmt: skip

    def _mark(self, valid: np.ndarray | None, first: int, n: int) -> None:
        """Remember which samples of which electrodes said nothing."""
        columns = self._bad.shape[1]
        if valid is None or valid.all():
            if first > self._dirty_until:
                return
            bad: np.ndarray | bool = False
        else:
            bad, self._dirty_until = ~valid, first + n + columns
        self._bad[:, np.arange(first, first + n) % columns] = bad

    def _records(self) -> np.ndarray:
        """What was found since the last call, as SPIKE records."""
        if not self.counts[N_OUT]:
            return NO_SPIKES
        t = self.templates
        n = kernels.tell(
            self._out, self.counts, t.unit_ids, t.roots, t.root_amplitude_uv, t.threshold, self._start, self._bad, self._dirty,
            self._guard, self._guard, self._spikes,
        )  # fmt: skip
        return self._spikes[:n] if self._reuse else self._spikes[:n].copy()

    def flush(self) -> np.ndarray:
        """Decide all there is, as if nothing but silence followed; SPIKE records. Then a new stream begins."""
        if self._next is None:
            return NO_SPIKES
        end = self._next
        n = self.templates.length + 6 * self.window
        found = self.process(np.zeros((self.templates.n_channels, n), np.float32), None, end)
        found = found[found["sample"] < end]
        self.reset(end)
        return found


def warm_up() -> None:
    """Compile template matching (seconds, once per machine) so that a later swap of templates does not wait for it."""
    from spiked.templates.noise import measure_noise

    rng, n, fs_hz = np.random.default_rng(0), 4000, 20_000.0
    noise = measure_noise(
        rng.normal(0, 5, (2, n)).astype(np.float32), np.array([[0.0, 0.0], [20.0, 0.0]]), fs_hz
    )
    wave = np.hanning(54).astype(np.float32)[None] * -50
    one = np.ones(1, np.float32)
    templates = Templates(
        fs_hz=fs_hz, channel_ids=("0", "1"), positions_um=np.zeros((2, 2)), sos=noise.sos, taps=noise.taps, precision=noise.precision,
        before=10, basis=np.eye(6, 31, dtype=np.float32), unit_ids=np.zeros(1, np.int32), roots=np.zeros(1, np.int32),
        root_amplitude_uv=-50 * one, n_spikes=np.ones(1), rate_hz=one, amplitude_sd=0.1 * one, threshold=100 * one, low=0.5 * one, high=2 * one,
        ptr=np.arange(2), channel=np.zeros(1, np.int32), weight=wave[:, :6] / 100, wave_ptr=np.arange(2),
        wave_channel=np.zeros(1, np.int32), waveform=wave,
    )  # fmt: skip
    sorter = TemplateSorter(templates)
    x = rng.normal(0, 5, (2, 2 * sorter._second)).astype(np.float32)
    valid = np.ones(x.shape, bool)
    valid[0, 100:200] = False
    sorter.process(x, valid, 0)
    sorter.flush()
