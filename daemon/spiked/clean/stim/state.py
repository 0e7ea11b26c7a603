"""What the streaming removal of artifacts remembers: flat arrays, channels innermost, that the kernels work on."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from spiked.clean.stim import relaxation
from spiked.config import Stim
from spiked.stream import StreamInfo

HISTORY_MS = 10.0  # before a pulse: baseline and noise come from here
PIECE = 128  # samples given to the kernel at once
LOOK_MS = 0.2  # a channel whose samples leave their place within this after the onset carries the artifact
ONSET_MS = 1.0  # how far a mark may be from the true onset
HOLD_MS = 0.2  # blank after the last clipped or steep sample
ADVANCE_MS = 0.25  # a start that is refused moves on by this
CALM_MS = 5.0  # the artifact is over when it has stayed below the noise this long
FADE_MS = 2.0
FAR_MS = 0.8  # what stays away for longer than a spike is no spike
SHORTEST_MS = 1.0  # a stretch between two pulses that is shorter is blank
TAUGHT_MS = 15.0
TAUGHT_FROM_MS = 5.0  # a pulse whose clipping lasts longer teaches nothing
MAX_FOUND = 256
LONG_AGO = -(1 << 60)
NEVER = 1 << 60

RAW, DEAD, WAIT, CLEAN = 0, 1, 2, 3  # phase of a channel

# Places in `ints`.
(
    NEXT, ARMED, MARKED, ONSET, LOOK_UNTIL, SLOT, BUSY, FOUND, OPEN_UNTIL, PATTERN, UNSEEN, READY, LEARN_AT, LAST,
) = range(14)  # fmt: skip

FOUND_DTYPE = np.dtype(
    [("sample", "<i8"), ("pattern", "<i8"), ("channels", "<i4"), ("peak_uv", "<f4"), ("clipped_until", "<i8")]
)


class Fixed(NamedTuple):
    """What does not change: lengths in samples, thresholds, tables."""

    half: int
    look: int
    reach: int
    hold: int
    advance: int
    calm: int
    fade: int
    far: int
    shortest: int
    timeout: int
    longest: int
    detect: int  # channels that must jump at once for a stimulus nobody marked; 0: not looked for
    marked: int  # channels that must jump at once near a mark
    low: float  # rails, less the code of zero
    high: float
    quantum: float  # remainders are whole numbers of this many codes
    limit: float
    learn: bool
    a: float
    b: float
    rho: np.ndarray  # (K,)
    curve: np.ndarray  # (K, 2 half + 1)
    edge: np.ndarray  # (2,)
    lengths: np.ndarray  # of stretches for which there are gains, ascending
    gain: np.ndarray  # (lengths, widths, K, 2 half + 1)
    widths: np.ndarray
    poly: np.ndarray  # (2 half + 2, 4, 2 half + 1): orthonormal polynomials over n samples, for every n
    taught: int  # samples after an onset that a template is learned from, once they are clean
    teach_at: np.ndarray  # samples after the end of clipping
    teach: np.ndarray  # (n, K)
    taught_tail: np.ndarray  # (n, K) what is left there of components that were 1 where the stretch began
    scale: np.ndarray  # (C,) microvolt per code
    history: int


class State(NamedTuple):
    """What changes. Rings have one row per sample number modulo their length."""

    ints: np.ndarray
    raw: np.ndarray  # (R, C) float32: code less the code of zero
    peg: np.ndarray  # (R, C) bool: clipped or never arrived
    rem: np.ndarray  # (R, C) int32: sample less baseline less template, in quanta
    near: np.ndarray  # (R, C) int32: the same, but no further from its surroundings than noise is
    out: np.ndarray  # (R, C) float32
    bad: np.ndarray  # (R, C) bool
    w0: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    u0: np.ndarray  # moments of the remainders as they are
    u1: np.ndarray
    z: np.ndarray  # (K, C) float32: the components that are still decaying
    tail: np.ndarray  # (K, C) what they were where the present stretch began, of earlier pulses alone
    base: np.ndarray
    sigma: np.ndarray
    weight: np.ndarray  # 1: cleaned, 0: untouched, between while one fades into the other
    live: np.ndarray  # 1: samples are decided `half` samples later
    phase: np.ndarray
    start: np.ndarray  # of the stretch that waits, or is cleaned
    last_bad: np.ndarray
    onset: np.ndarray
    peak: np.ndarray
    calm: np.ndarray
    flat: np.ndarray
    far: np.ndarray  # samples in a row further from their surroundings than noise is
    template: np.ndarray  # (slots, K, C)
    seen: np.ndarray  # (slots, C) how many responses the template is made of
    spread: np.ndarray  # (slots, C) how much responses differ from it, in noise SDs
    slot: np.ndarray  # (C,) whose template the channel's pulse goes with
    found: np.ndarray


def fixed(info: StreamInfo, settings: Stim) -> Fixed:
    """Tables and lengths for a stream."""
    half = max(8, info.samples(settings.half_window_ms))
    length = 2 * half + 1
    low = -math.inf if info.code_min is None else info.code_min - info.zero_code
    high = math.inf if info.code_max is None else info.code_max - info.zero_code
    extent = high - low if math.isfinite(high - low) else 65536.0
    if info.dtype == "float32":  # microvolt, or what the recording calls so
        extent = 20000.0 / float(np.median(info.gains))
    squares = half * (half + 1) * (2 * half + 1) / 3
    quantum = 2.0 ** math.ceil(math.log2(1.5 * extent * squares / 2.0**31))
    quantum = max(quantum, 1 / 16) if info.dtype != "float32" else quantum
    poly = np.zeros((length + 1, 4, length), np.float32)
    for n in range(8, length + 1):
        poly[n, :, :n] = relaxation.projections(n)
    lengths = np.unique(np.linspace(info.samples(SHORTEST_MS), length, 6).astype(np.int64))
    gain = np.zeros((len(lengths), len(relaxation.WIDTHS), len(relaxation.TAUS_MS), length), np.float32)
    for i, n in enumerate(lengths):
        gain[i, :, :, :n] = relaxation.gains(info.fs_hz, n)
    taught, hold = info.samples(TAUGHT_MS), info.samples(HOLD_MS)
    at, teach = relaxation.teaching(info.fs_hz, hold, taught - info.samples(TAUGHT_FROM_MS))
    a, b = relaxation.cubic(half)
    return Fixed(
        half, max(2, info.samples(LOOK_MS)), info.samples(ONSET_MS), info.samples(HOLD_MS), info.samples(ADVANCE_MS),
        info.samples(CALM_MS), info.samples(FADE_MS), info.samples(FAR_MS), info.samples(SHORTEST_MS), info.samples(settings.timeout_ms),
        info.samples(settings.longest_ms), max(4, info.n_channels // 4) if settings.detect else 0, max(2, info.n_channels // 50),
        low, high, quantum, 2.0**31 / squares, settings.template, a * quantum, b * quantum, relaxation.decays(info.fs_hz),
        relaxation.curves(info.fs_hz, length), relaxation.edge(half), lengths, gain, np.array(relaxation.WIDTHS, np.float32), poly,
        taught, at, teach, relaxation.decays(info.fs_hz)[None] ** np.float32(at[:, None] - hold), info.gains, info.samples(HISTORY_MS),
    )  # fmt: skip


def fresh(info: StreamInfo, f: Fixed) -> State:
    """A state that knows nothing."""
    c, k = info.n_channels, len(f.rho)
    rows = 1 << math.ceil(math.log2(info.samples(HISTORY_MS) + 2 * f.half + f.reach + 2 * PIECE))

    def ring(dtype: type) -> np.ndarray:
        return np.zeros((rows, c), dtype)

    def each(dtype: type) -> np.ndarray:
        return np.zeros(c, dtype)

    f32, i32, i64 = np.float32, np.int32, np.int64
    ints = np.zeros(LAST, i64)
    ints[[ONSET, LOOK_UNTIL]] = LONG_AGO
    ints[LEARN_AT] = NEVER
    return State(
        ints, ring(f32), ring(np.bool_), ring(i32), ring(i32), ring(f32), ring(np.bool_), each(i32), each(i32), each(i32),
        each(i32), each(i32), np.zeros((k, c), f32), np.zeros((k, c), f32), each(f32), np.ones(c, f32), each(f32), np.ones(c, i32), np.zeros(c, np.int8), each(i64),
        each(i64), each(i64), each(f32), each(i32), each(i32), each(i32), np.zeros((1, k, c), f32), np.zeros((1, c), i32),
        np.zeros((1, c), f32), each(i32), np.zeros(MAX_FOUND, FOUND_DTYPE),
    )  # fmt: skip
