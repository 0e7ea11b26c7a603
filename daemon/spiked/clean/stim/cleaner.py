"""StimCleaner: stimulation artifacts taken out of a stream as it comes, before anything else looks at it.

Outside the time after a stimulus the samples pass as they are, at once. After one, on the channels that carry an artifact,
what cannot be seen is blank (clipped, the pulse itself, and just after) and what can is freed of the artifact in two steps:
the decay that the channel shows after this kind of stimulus (`relaxation`, a template with the pulse's own deviation from it),
then SALPA (Wagenaar and Potter 2002, J Neurosci Methods 120:113): from every sample the centre value of the least-squares
cubic over a symmetric window, from recursive whole-number moments; the first and last half window of a stretch from one cubic
over the whole of it, the first only where the cubic follows the samples. The channel's baseline from before the stimulus is
put back. Samples leave `lookahead` samples later then, and at once again when every channel's artifact is over.
"""

from __future__ import annotations

import numpy as np

from spiked.clean.stim import kernels
from spiked.clean.stim.state import (
    BUSY,
    FOUND,
    FOUND_DTYPE,
    MAX_FOUND,
    NEXT,
    OPEN_UNTIL,
    PIECE,
    READY,
    fixed,
    fresh,
)
from spiked.config import Stim
from spiked.stream import StreamInfo

MAX_PATTERNS = 32
MAX_MARKS = 4096
NONE_DEAD = np.zeros((0, 0), bool)


class StimCleaner:
    """Streaming removal for one stream. `mark` says where stimuli are; with `settings.detect` they are also looked for."""

    def __init__(self, info: StreamInfo, settings: Stim) -> None:
        self.info, self.settings = info, settings
        self._fixed = fixed(info, settings)
        self.lookahead = 2 * self._fixed.half  # at most, and only after a stimulus
        self._zero = np.float32(info.zero_code)
        self._past = np.zeros((self._fixed.history, info.n_channels), info.dtype)
        self._patterns: dict[int, int] = {0: 0}
        self._state = fresh(info, self._fixed)
        self._buffer = np.zeros((0, info.n_channels), np.float32), np.zeros((0, info.n_channels), bool)
        self._read = 0
        self.cleaned: list[tuple[int, int]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the past and what is marked: the next samples are a new stream. Templates stay."""
        s = self._state
        self._state = fresh(self.info, self._fixed)._replace(
            template=s.template, seen=s.seen, spread=s.spread, found=s.found
        )
        self._state.ints[FOUND] = s.ints[FOUND]
        self._marks: list[tuple[int, int]] = []
        self._open = False
        self._next: int | None = None
        self._emitted = self._known_from = 0

    def mark(self, sample: int, pattern: int = 0) -> None:
        """A stimulus happens, or happened, at this sample. `pattern` tells kinds of stimuli with artifacts of their own."""
        if len(self._marks) < MAX_MARKS:
            self._marks.append((int(sample), int(pattern)))
            self._marks.sort()

    @property
    def open(self) -> bool:
        """Whether samples are being cleaned or held back."""
        return self._open

    def process(
        self, first_sample: int, codes: np.ndarray, dead: np.ndarray | None = None
    ) -> tuple[int, np.ndarray, np.ndarray | None]:
        """Device codes (n, C), and which never arrived -> first sample, codes (m, C) and what is blank (m, C) bool or None.

        The very arrays given where nothing is to be done; else float32 codes, overwritten by the next call. m may be 0, or
        more than n. `cleaned` then has the stretches [start, stop) of them that lie in the time after a stimulus.
        """
        self.cleaned.clear()
        if self._next is not None and first_sample != self._next:
            self.reset()
        if self._next is None:
            self._emitted = self._known_from = first_sample
        self._next = first_sample + len(codes)
        if not self._open:
            at = self._quiet(first_sample, codes, dead)
            if at == len(codes):
                self._emitted = self._next
                return first_sample, codes, dead
            return self._through(first_sample, codes, dead, at)
        return self._through(first_sample, codes, dead, 0)

    def flush(self) -> tuple[int, np.ndarray, np.ndarray | None]:
        """What is held back, at the end of the stream: what was not decided is blank."""
        assert self._next is not None or not self._open
        self.cleaned.clear()
        first, held = self._emitted, (self._next or 0) - self._emitted
        if held <= 0:
            return first, np.zeros((0, self.info.n_channels), np.float32), None
        x, bad = self._room(held)
        f, s = self._fixed, self._state
        kernels.flush(s, f, first, self._next)
        kernels.read(s, first, self._zero, x, bad)
        self.cleaned.append((first, first + held))
        self._emitted, self._open = first + held, False
        return first, x, bad

    def found(self) -> np.ndarray:
        """Stimuli whose onset was settled since the last call: FOUND_DTYPE records.

        `sample` is the true onset where one was seen within 1 ms of the mark (channels > 0), else the mark; `channels` how
        many carried an artifact, `peak_uv` its largest deflection, `clipped_until` the end of clipping on all channels.
        """
        s = self._state
        stop = int(s.ints[FOUND])
        if self._open and s.ints[BUSY] and stop:
            stop -= 1
        rows = [k % MAX_FOUND for k in range(max(self._read, stop - MAX_FOUND), stop)]
        self._read = max(self._read, stop)
        return s.found[rows].copy() if rows else np.zeros(0, FOUND_DTYPE)

    def _quiet(self, first: int, codes: np.ndarray, dead: np.ndarray | None) -> int:
        """How many of these samples come before the next stimulus; they are remembered."""
        n = len(codes)
        if self._marks:
            n = min(n, max(0, self._marks[0][0] - first))
        if self._fixed.detect and n:
            if self._known_from == first:
                self._state.ints[READY] = 0
            n = kernels.watch(
                self._state, self._fixed, first, codes[:n], NONE_DEAD if dead is None else dead[:n], self._zero,
                self._known_from, round(self.info.fs_hz / 4),
            )  # fmt: skip
        self._remember(first, codes[:n], None if dead is None else dead[:n])
        return n

    def _remember(self, first: int, codes: np.ndarray, dead: np.ndarray | None) -> None:
        size = len(self._past)
        a = max(0, len(codes) - size)
        for i, part in _ring_parts(first + a, codes[a:], size):
            self._past[i : i + len(part)] = part
        if dead is not None and dead.any():
            self._known_from = first + int(np.flatnonzero(dead.any(1))[-1]) + 1

    def _through(
        self, first: int, codes: np.ndarray, dead: np.ndarray | None, at: int
    ) -> tuple[int, np.ndarray, np.ndarray | None]:
        """A chunk in which a window is open, or opens after `at` samples."""
        start, n = min(self._emitted, first), len(codes)
        x, bad = self._room(first + n - start)
        if not self._open:
            self._hand_through(x, bad, start, first, codes[:at], None if dead is None else dead[:at])
            self._begin(first + at)
        while at < n:
            t = first + at
            if not self._open:
                k = self._quiet(t, codes[at:], None if dead is None else dead[at:])
                self._hand_through(
                    x, bad, start, t, codes[at : at + k], None if dead is None else dead[at : at + k]
                )
                at += k
                if at < n:
                    self._begin(first + at)
                continue
            at += self._advance(t, codes[at:], None if dead is None else dead[at:])
            until = kernels.decided(self._state, self._fixed) if self._open else int(self._state.ints[NEXT])
            if until > self._emitted:
                a, b = self._emitted - start, until - start
                kernels.read(self._state, self._emitted, self._zero, x[a:b], bad[a:b])
                self.cleaned.append((self._emitted, until))
                self._emitted = until
        m = self._emitted - start
        return start, x[:m], bad[:m] if bad[:m].any() else None

    def _hand_through(
        self,
        x: np.ndarray,
        bad: np.ndarray,
        start: int,
        first: int,
        codes: np.ndarray,
        dead: np.ndarray | None,
    ) -> None:
        a, b = first - start, first - start + len(codes)
        x[a:b] = codes
        bad[a:b] = False if dead is None else dead
        self._emitted = first + len(codes)

    def _begin(self, t: int) -> None:
        """Open a window whose first sample is t."""
        s, f = self._state, self._fixed
        size = f.history
        known = max(self._known_from, t - size)
        rows = len(s.raw)
        for k in range(t - size, t):
            s.raw[k % rows] = self._past[max(k, known) % size] if known < t else self._zero
        s.raw[np.arange(t - size, t) % rows] -= self._zero
        s.peg[:] = False
        if t - known >= 40:
            kernels.measure(s, known, t)
            s.raw[np.arange(t - size, known) % rows] = s.base
        s.live[:], s.weight[:], s.phase[:], s.z[:], s.calm[:] = True, 0.0, 0, 0.0, 0
        s.w0[:], s.w1[:], s.w2[:] = 0, 0, 0
        s.rem[:] = 0
        s.ints[NEXT], s.ints[BUSY] = t, 0
        s.ints[OPEN_UNTIL] = t + f.longest
        self._open = True

    def _advance(self, t: int, codes: np.ndarray, dead: np.ndarray | None) -> int:
        """Give the kernel samples up to the next mark; how many it took."""
        s, f = self._state, self._fixed
        while self._marks and self._marks[0][0] <= t:
            sample, pattern = self._marks.pop(0)
            slot = self._slot(pattern)
            s = self._state
            kernels.arm(s, f, t, sample, pattern, slot)
        n = min(len(codes), PIECE)
        if self._marks:
            n = min(n, self._marks[0][0] - t)
        part = None if dead is None or not dead[:n].any() else dead[:n]
        taken, closed = kernels.advance(s, f, t, codes[:n], NONE_DEAD if part is None else part, self._zero)
        self._remember(t, codes[:taken], None if part is None else part[:taken])
        self._open = not closed
        return int(taken)

    def _slot(self, pattern: int) -> int:
        """Where this pattern's templates are; the last place is shared by those for which there is none."""
        if pattern not in self._patterns and len(self._patterns) < MAX_PATTERNS:
            self._patterns[pattern] = len(self._patterns)
            s = self._state
            more = {
                k: np.concatenate([v, np.zeros_like(v[:1])])
                for k, v in (("template", s.template), ("seen", s.seen), ("spread", s.spread))
            }
            self._state = s._replace(**more)
        return self._patterns.get(pattern, MAX_PATTERNS - 1)

    def _room(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self._buffer[0]) < n:
            shape = 2 * n, self.info.n_channels
            self._buffer = np.zeros(shape, np.float32), np.zeros(shape, bool)
        return self._buffer[0][:n], self._buffer[1][:n]


def _ring_parts(first: int, rows: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Where rows from sample `first` on lie in a ring of `size`: one or two (index, rows)."""
    i = first % size
    k = min(len(rows), size - i)
    return [(i, rows[:k]), (0, rows[k:])] if k < len(rows) else [(i, rows)]
