"""Hostile messages to everything that reads messages: mutations of real ones, and random bytes.

A decoder may take a message, or refuse it with the error it documents; everything else is a finding, and so is a
message that takes longer than SLOW_S. Each decoder runs as it does in the daemon, behind its socket or file.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgpack

from spiked.errors import ConfigError

SLOW_S = 2.0
HANG_S = 60.0
PORTION = 20_000  # messages of one decoder in a row
SHOWN = 2000  # bytes of a finding's message that are kept

Message = list[bytes]
WEIRD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 65536, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 53) + 1, (1 << 63) - 1, -(1 << 63), 1 << 62,
    0.0, -0.5, 1e-300, 1e9, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "spikes", "\x00", "a" * 300, "é\u2028", "-1", "NaN",
    [], {}, [[]], [{}], [None] * 3, [1, 2, 3], {"": 0}, {"a": {"b": [0]}}, [[[[[[[[1]]]]]]]],
)  # fmt: skip
WEIRD_MSGPACK: tuple[Any, ...] = (
    *WEIRD,
    b"",
    b"\xff" * 9,
    {1: 2},
    {None: 1},
    (1 << 64) - 1,
    msgpack.Timestamp(1, 2),
    msgpack.ExtType(5, b"x"),
)
WEIRD_JSON: tuple[Any, ...] = (*WEIRD, 1 << 64, 10**400, -(10**30))
NUMBERS = (
    b"0",
    b"-1",
    b"65536",
    b"9223372036854775807",
    b"-9223372036854775809",
    b"1" * 400,
    b"1e999",
    b"nan",
    b"NaN",
    b"Infinity",
    b"0.5",
    b"",
)


@dataclass(frozen=True)
class Decoder:
    """`feed` reads one message; `errors` are what it may raise. `weight`: its share of the messages. `close` frees its sockets."""

    name: str
    seeds: Sequence[Message]
    feed: Callable[[Message], Any]
    errors: tuple[type[BaseException], ...] = ()
    weight: float = 1.0
    close: Callable[[], Any] = lambda: None


@dataclass
class Told:
    """What a portion of messages did."""

    decoder: str
    messages: int = 0
    refused: int = 0
    slowest_ms: float = 0.0
    seconds: float = 0.0
    peak_mb: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)


class Mutations:
    """Messages that look like the seeds, but are not. The same seed number gives the same messages."""

    def __init__(self, seeds: Sequence[Message], number: int) -> None:
        self._rng = random.Random(number)
        self._seeds = [list(map(bytes, m)) for m in seeds]
        self._parsed = [[_parsed(f) for f in m] for m in self._seeds]

    def next(self) -> Message:
        """One more."""
        rng = self._rng
        dice = rng.random()
        if dice < 0.04:
            return [rng.randbytes(rng.randrange(300)) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
        at = rng.randrange(len(self._seeds))
        frames = list(self._seeds[at])
        if dice < 0.08:
            return self._other_frames(frames)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            k = rng.randrange(len(frames)) if frames else -1
            if k < 0:
                break
            parsed = self._parsed[at][k] if frames[k] is self._seeds[at][k] else None
            if parsed is not None and rng.random() < 0.6:
                frames[k] = self._restructured(*parsed)
            else:
                frames[k] = self._bytes(frames[k])
        if dice > 0.9998:
            frames[-1:] = [frames[-1] + bytes(1 << 21)] if frames else []
        return frames

    def _other_frames(self, frames: Message) -> Message:
        rng, k = self._rng, self._rng.randrange(len(frames) or 1)
        what = rng.randrange(5)
        if what == 0:
            return frames[:k] + frames[k + 1 :]
        if what == 1:
            return frames[:k] + frames[k : k + 1] * rng.choice((2, 3, 40)) + frames[k + 1 :]
        if what == 2:
            return frames[::-1]
        if what == 3:
            return [*frames[:k], rng.choice(rng.choice(self._seeds) or [b""]), *frames[k + 1 :]]
        return [*frames, rng.randbytes(rng.randrange(50))]

    def _bytes(self, data: bytes) -> bytes:
        rng, n = self._rng, len(data)
        what, a = rng.randrange(8), rng.randrange(n + 1)
        b = min(a + rng.choice((1, 1, 2, 4, 8, 30, 200)), n)
        if what == 0:
            return data[:a]
        if what == 1:
            return data[:a] + data[b:]
        if what == 2:
            return data[:a] + rng.randbytes(rng.choice((1, 2, 4, 8, 60))) + data[a:]
        if what == 3:
            return data[:a] + rng.randbytes(b - a) + data[b:]
        if what == 4:
            return data[:b] + data[a:b] * rng.choice((1, 2, 20)) + data[b:]
        if what == 5 and n:
            i = min(a, n - 1)
            return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        if what == 6:
            return data[:a] + rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * (b - a) + data[b:]
        return self._number(data)

    def _number(self, data: bytes) -> bytes:
        """Another number in the place of one that is written in digits."""
        rng, n = self._rng, len(data)
        start = rng.randrange(n + 1)
        while start < n and not 48 <= data[start] <= 57:
            start += 1
        stop = start
        while stop < n and 48 <= data[stop] <= 57:
            stop += 1
        return data[:start] + rng.choice(NUMBERS) + data[stop:]

    def _restructured(self, kind: str, value: Any) -> bytes:
        changed = self._edited(value, WEIRD_MSGPACK if kind == "msgpack" else WEIRD_JSON)
        try:
            return bytes(msgpack.packb(changed)) if kind == "msgpack" else json.dumps(changed).encode()
        except (TypeError, ValueError, OverflowError):
            return b""

    def _edited(self, value: Any, weird: tuple[Any, ...]) -> Any:
        """A copy with one thing in it changed."""
        rng = self._rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            key = rng.choice(list(value))
            out = dict(value)
            dice = rng.random()
            if dice < 0.1:
                del out[key]
            elif dice < 0.15:
                out[rng.choice(("", "x", "stream", "v", "id"))] = rng.choice(weird)
            else:
                out[key] = self._edited(value[key], weird)
            return out
        if isinstance(value, list) and value and rng.random() < 0.7:
            k = rng.randrange(len(value))
            return [*value[:k], self._edited(value[k], weird), *value[k + 1 :]]
        return rng.choice(weird)


def _parsed(frame: bytes) -> tuple[str, Any] | None:
    """What a frame of a seed means, where it is MessagePack or JSON."""
    with suppress(Exception):
        if isinstance(value := json.loads(frame), dict | list):
            return "json", value
    with suppress(Exception):
        if isinstance(value := msgpack.unpackb(frame, strict_map_key=False), dict | list):
            return "msgpack", value
    return None


class Hang(BaseException):
    """A message took so long that it was given up."""


def feed(decoder: Decoder, messages: int, number: int) -> Told:
    """Feed so many mutations of the decoder's seeds."""
    told = Told(decoder.name)
    source, start = Mutations(decoder.seeds, number), time.perf_counter()
    known: set[tuple[str, ...]] = set()
    for k in range(messages):
        message = source.next()
        if k % 256 == 0:
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
        before = time.perf_counter()
        try:
            decoder.feed(message)
        except decoder.errors:
            told.refused += 1
        except (Exception, Hang) as e:  # noqa: BLE001 - that is what is looked for
            _note(told, known, message, e)
        took = time.perf_counter() - before
        if took * 1000 > told.slowest_ms:
            told.slowest_ms = took * 1000
            if took > SLOW_S:
                _note(told, known, message, TimeoutError(f"{took:.1f} s"))
        told.messages += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    told.seconds = time.perf_counter() - start
    told.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return told


def _note(told: Told, known: set[tuple[str, ...]], message: Message, e: BaseException) -> None:
    where = tuple(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)[-2:])
    what = (type(e).__name__, *where)
    if what in known or len(known) > 50:
        return
    known.add(what)
    frames = [f[:SHOWN].hex() + ("..." if len(f) > SHOWN else "") for f in message[:10]]
    told.findings.append(
        {
            "decoder": told.decoder,
            "error": f"{type(e).__name__}: {str(e)[:200]}",
            "where": where,
            "message": frames,
        }
    )


# ---- several processes -----------------------------------------------------------------------------------------

_decoders: dict[str, Decoder] = {}


def _begin() -> None:
    """Once in every worker: its own decoders, with their sockets and files."""
    import logging

    from spiked.bench.fuzz_decoders import all_decoders

    logging.disable(logging.CRITICAL)  # what they log of a hostile message is counted in the daemon, too

    def given_up(_signal: int, _frame: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, given_up)
    folder = Path(tempfile.mkdtemp(dir=os.environ["SPIKED_FUZZ"]))
    _decoders.update({d.name: d for d in all_decoders(folder)})


def _portion(name: str, messages: int, number: int) -> Told:
    return feed(_decoders[name], messages, number)


def bench(
    messages: int,
    processes: int,
    seed: int,
    say: Callable[[str], None],
    only: str = "",
    findings: Path | None = None,
) -> dict[str, Any]:
    """Feed `messages` in all, shared among the decoders by their weight. The figures, and what was found."""
    from spiked.bench.fuzz_decoders import NAMES
    from spiked.bench.fuzz_seeds import WEIGHTS

    names = [n for n in NAMES if only in n]
    if not names:
        raise ConfigError(f"no decoder has {only!r} in its name; there are {', '.join(NAMES)}")
    total = sum(WEIGHTS.get(n, 1.0) for n in names)
    wanted = {n: max(round(messages * WEIGHTS.get(n, 1.0) / total), 1) for n in names}
    tasks = [
        (n, min(PORTION, wanted[n] - done), seed + 1000 * i + done // PORTION)
        for i, n in enumerate(names)
        for done in range(0, wanted[n], PORTION)
    ]
    start = time.monotonic()
    sums = {n: Told(n) for n in names}
    memory = Path("/dev/shm")  # files are written for every message
    with tempfile.TemporaryDirectory(
        prefix="spiked-fuzz-", dir=memory if memory.is_dir() else None
    ) as folder:
        os.environ["SPIKED_FUZZ"] = folder
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin) as pool:
            futures = [(t, pool.submit(_portion, *t)) for t in tasks]
            for (name, _, number), future in futures:
                try:
                    _add(sums[name], future.result())
                except BrokenProcessPool:
                    text = f"the process died in or beside {name}, seed {number}"
                    sums[name].findings.append({"decoder": name, "error": text, "where": (), "message": []})
                    break
                if number % 10 == 0:
                    say(
                        f"{sum(s.messages for s in sums.values())} messages, {sum(len(s.findings) for s in sums.values())} findings"
                    )
    return _figures(sums, time.monotonic() - start, seed, processes, findings)


def _add(whole: Told, part: Told) -> None:
    whole.messages += part.messages
    whole.refused += part.refused
    whole.seconds += part.seconds
    whole.slowest_ms = max(whole.slowest_ms, part.slowest_ms)
    whole.peak_mb = max(whole.peak_mb, part.peak_mb)
    seen = {(f["error"].partition(":")[0], tuple(f["where"])) for f in whole.findings}
    whole.findings += [
        f for f in part.findings if (f["error"].partition(":")[0], tuple(f["where"])) not in seen
    ]


def _figures(
    sums: dict[str, Told], wall_s: float, seed: int, processes: int, findings: Path | None
) -> dict[str, Any]:
    found = [f for s in sums.values() for f in s.findings]
    if findings is not None:
        findings.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    decoders = {
        n: {"messages": s.messages, "refused": s.refused, "us_each": round(1e6 * s.seconds / max(s.messages, 1), 1),
            "slowest_ms": round(s.slowest_ms, 1), "findings": len(s.findings)}
        for n, s in sums.items()
    }  # fmt: skip
    return {
        "bench": "fuzz", "messages": sum(s.messages for s in sums.values()), "refused": sum(s.refused for s in sums.values()),
        "findings": len(found), "found": [f"{f['decoder']}: {f['error']} at {' '.join(f['where'])}" for f in found][:40],
        "wall_s": round(wall_s, 1), "processes": processes, "seed": seed, "peak_mb": round(max((s.peak_mb for s in sums.values()), default=0.0)),
        "decoders": decoders, "missing": bool(found),
    }  # fmt: skip
