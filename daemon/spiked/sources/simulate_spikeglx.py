"""SpikeGLX's command server as a peer: several probes, each with its own clock, history and mishaps.

Answers as the real one does, byte for byte, as far as a reader of samples asks: the same words, the same errors, FETCH
with its short wait, a history of `history_s`, five errors in a row and long silence closing the connection.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import SourceError
from spiked.sources.simulate import Signal
from spiked.sources.simulate_sync import SyncPulses, Untold, lost_before
from spiked.sources.wire_spikeglx import (
    JS,
    MISS_BIT,
    NOT_RUNNING,
    PROBE_TYPES,
    TOO_LATE,
    geometry_lines,
)

PACKET = 12  # samples of a probe come in packets
AHEAD_S = 0.05
STEP_S = 0.02
MOST_ERRORS = 5
VERSION = "20260101-phase30 (spiked simulate)"


@dataclass(frozen=True)
class SimProbe:
    """One stream of the server. `signal` has its analog channels, int16."""

    signal: Signal
    device: str = "imec"
    type: int = 21
    serial: str = "19011110001"
    part: str = "NP2000"
    ppm: float = 0.0
    pulses: SyncPulses | None = None
    missed: tuple[tuple[int, int], ...] = ()  # samples that the probe lost, which come as zeros with MISS set
    untold: Untold = ()
    sent: Path | None = None  # gets every analog code, as served

    @property
    def counts(self) -> tuple[int, ...]:
        """Channels of each kind, as GETSTREAMACQCHANS tells them."""
        n = self.signal.info.n_channels
        if self.device == "imec":
            return n, n if PROBE_TYPES[self.type].lf_gain else 0, 1
        return (0, 0, n, 1) if self.device == "nidq" else (n, 1, 1)

    @property
    def v_max(self) -> float:
        return PROBE_TYPES[self.type].v_max if self.device == "imec" else 5.0

    @property
    def i_max(self) -> int:
        return PROBE_TYPES[self.type].i_max if self.device == "imec" else 32768

    def gain(self, channel: int) -> float:
        if self.device != "imec":
            return 1.0
        t = PROBE_TYPES[self.type]
        return t.ap_gain if channel < self.counts[0] else t.lf_gain


@dataclass
class _Stream:
    """A probe while a run goes on: what it has produced, and the last `history` samples of it."""

    probe: SimProbe
    history: np.ndarray  # (samples, analog + digital word) int16, circular
    begun_s: float = 0.0
    produced: int = 0
    blocks: Iterator[np.ndarray] | None = None
    edges: Iterator[tuple[int, int, int]] = field(default_factory=lambda: iter(()))
    edge: tuple[int, int, int] | None = None
    word: int = 0
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fs_hz(self) -> float:
        """True rate of this device; it tells its nominal one."""
        return self.probe.signal.info.fs_hz * (1 + self.probe.ppm * 1e-6)

    def begin(self, now_s: float) -> None:
        info = self.probe.signal.info
        self.begun_s, self.produced, self.word, self.ended = now_s, 0, 0, False
        self.blocks = self.probe.signal.blocks(PACKET * max(1, round(0.01 * info.fs_hz / PACKET)))
        pulses = self.probe.pulses
        self.edges = pulses.edges(now_s, self.fs_hz, self.probe.untold) if pulses else iter(())
        self.edge = next(self.edges, None)

    def end(self) -> int:
        """The count of samples that exist by now."""
        taken = (time.monotonic() - self.begun_s) * self.fs_hz
        count = math.floor(taken)
        for sample, n in self.probe.untold:
            count = count - n if count >= sample + n else min(count, sample)
        return max(0, min(count // PACKET * PACKET, self.produced))

    def oldest(self) -> int:
        return max(0, self.end() - len(self.history) + round((AHEAD_S + STEP_S) * self.fs_hz) + PACKET)

    def produce(self, sink: Any = None) -> None:
        """Up to a little ahead of now."""
        until = (time.monotonic() + AHEAD_S - self.begun_s) * self.fs_hz
        while (
            self.blocks is not None
            and not self.ended
            and self.produced < until - lost_before(self.produced, self.probe.untold)
        ):
            codes = next(self.blocks, None)
            if codes is None:
                self.ended = True
                break
            with self.lock:
                self._store(codes)
            if sink is not None:
                rows = np.arange(self.produced - len(codes), self.produced) % len(self.history)
                sink.write(np.ascontiguousarray(self.history[rows, :-1]).tobytes())

    def _store(self, codes: np.ndarray) -> None:
        first, n = self.produced, len(codes)
        rows = np.arange(first, first + n) % len(self.history)
        words = np.full(n, self.word, np.int64)
        while self.edge is not None and self.edge[0] < first + n:
            sample, line, state = self.edge
            at = max(sample - first, 0)
            self.word = self.word | 1 << line if state else self.word & ~(1 << line)
            words[at:] = self.word
            self.edge = next(self.edges, None)
        self.history[rows, :-1] = codes
        for a, b in self.probe.missed:
            a, b = max(a - first, 0), min(b - first, n)
            if a < b:
                self.history[rows[a:b], :-1] = 0
                words[a:b] |= MISS_BIT
        self.history[rows, -1] = words.astype(np.uint16).view(np.int16)
        self.produced += n

    def columns(self, start: int, n: int) -> np.ndarray:
        """(n, all acquired channels) int16, as a FETCH of all channels has them."""
        with self.lock:
            rows = self.history[np.arange(start, start + n) % len(self.history)]
        analog, word = rows[:, :-1], rows[:, -1:]
        if self.probe.device == "nidq":
            return np.hstack([analog, word & ~np.int16(MISS_BIT)])
        if self.probe.device == "onebox":
            return np.hstack([analog, np.zeros_like(word), word])
        lf = analog >> 3 if self.probe.counts[1] else analog[:, :0]
        return np.hstack([analog, lf, word])


class SpikeGlxServer:
    """`with` serves; `address` is where. A run goes on from the start unless `running` is False."""

    def __init__(
        self,
        probes: list[SimProbe],
        host: str = "127.0.0.1",
        port: int = 0,
        history_s: float = 8.0,
        silence_s: float = 10.0,
        running: bool = True,
    ) -> None:
        self.probes, self.running, self._silence_s = probes, False, silence_s
        self._streams: dict[tuple[int, int], _Stream] = {}
        numbers = dict.fromkeys(JS.values(), 0)
        for p in probes:
            info, js = p.signal.info, JS[p.device]
            rows = int((history_s + AHEAD_S + 2 * STEP_S) * info.fs_hz * (1 + abs(p.ppm) * 1e-6)) + 4 * PACKET
            self._streams[js, numbers[js]] = _Stream(p, np.zeros((rows, info.n_channels + 1), np.int16))
            numbers[js] += 1
        self._numbers, self._validated = numbers, True
        self._first_run = running
        self._stop, self._stall = threading.Event(), threading.Event()
        self._connections: set[socket.socket] = set()
        self._refusals: list[str] = []
        self._garble = False
        self.requests = 0
        self.awaited = False  # somebody asked whether it runs, which who only looks around does not
        self.errors: list[str] = []
        try:
            self._listener = socket.create_server((host, port))
        except OSError as e:
            raise SourceError(f"cannot serve on {host}:{port} ({e.strerror}); choose another port") from e
        self._listener.settimeout(0.1)  # closing it does not wake who waits in accept
        self.address = "tcp://{}:{}".format(*self._listener.getsockname()[:2])
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> SpikeGlxServer:
        if self._first_run:
            self.start_run()
        for target in (self._produce, self._accept):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._listener.close()
        self.drop_connections()
        for t in self._threads:
            t.join(5)

    # ---- what may happen on a rig

    def start_run(self) -> None:
        now = time.monotonic()
        for s in self._streams.values():
            s.begin(now)
        self.running = True

    def stop_run(self) -> None:
        self.running = False

    def drop_connections(self) -> None:
        for c in list(self._connections):
            with contextlib.suppress(OSError):
                c.shutdown(socket.SHUT_RDWR)

    def refuse_next(self, text: str) -> None:
        """The next FETCH is answered with this error."""
        self._refusals.append(text)

    def garble_next(self) -> None:
        """The next FETCH is answered with nonsense."""
        self._garble = True

    def never_set_up(self) -> None:
        """As after a start of SpikeGLX in which no run was ever configured."""
        self._validated = False
        self.stop_run()

    def produced(self) -> int:
        """Samples of the first stream that exist by now."""
        return next(iter(self._streams.values())).end()

    def begun_s(self) -> float:
        return next(iter(self._streams.values())).begun_s

    @property
    def ended(self) -> bool:
        """True once every signal has ended and all of it exists."""
        return all(s.ended and s.end() >= s.produced // PACKET * PACKET for s in self._streams.values())

    # ---- threads

    def _produce(self) -> None:
        with contextlib.ExitStack() as stack:
            sinks = {
                k: stack.enter_context(s.probe.sent.open("wb"))
                for k, s in self._streams.items()
                if s.probe.sent
            }
            while not self._stop.wait(STEP_S):
                if self.running:
                    for key, s in self._streams.items():
                        s.produce(sinks.get(key))

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        self._connections.add(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self._silence_s)
        errors = 0
        try:
            with connection, connection.makefile("rb") as lines:
                while errors < MOST_ERRORS and (line := lines.readline(65_537)):
                    words = line.decode("ascii", "replace").split()
                    if not line.strip(b"\r\n"):
                        continue
                    self.requests += 1
                    if words and words[0].upper() in ("BYE", "QUIT", "EXIT", "CLOSE"):
                        return
                    reply, error = self._reply(words)
                    errors = errors + 1 if error else 0
                    if error:
                        self.errors.append(error)
                    connection.sendall(f"ERROR {error}\n".encode() if error else reply + b"OK\n")
        except (OSError, ValueError):
            return  # closed, silent for too long, or cut off by drop_connections
        finally:
            self._connections.discard(connection)

    # ---- replies

    def _reply(self, words: list[str]) -> tuple[bytes, str]:
        """(the lines before OK, "") or (b"", error)."""
        if not words:
            return b"", "CmdWorker: Missing command token."
        command, args = words[0].upper(), words[1:]
        self.awaited = self.awaited or command in ("ISRUNNING", "FETCH")
        if command == "FETCH":
            return self._fetch(args)
        plain = {
            "NOOP": "", "GETVERSION": f"{VERSION}\n", "ISRUNNING": f"{int(self.running)}\n", "ISINITIALIZED": "1\n", "ISSAVING": "0\n",
            "GETTIME": f"{time.monotonic():.3f}\n", "TRIGGERGT": "", "NIDOSET": "",
        }  # fmt: skip
        if command in plain:
            return plain[command].encode(), ""
        if command == "GETSTREAMNP":
            return self._stream_np(args)
        if command == "GETGEOMMAP":
            return self._geometry(args)
        if command == "GETRUNNAME":
            return (b"sim\n", "") if self._validated else (b"", self._invalid(command))
        if command == "GETPROBELIST":
            probes = [s.probe.part for (js, _), s in self._streams.items() if js == 2]
            return ("".join(f"({i},1,{p})" for i, p in enumerate(probes)) or "()").encode() + b"\n", ""
        if command in STREAM_QUERIES:
            stream, error = self._stream(command, args)
            return (b"", error) if stream is None else self._query(command, stream, args)
        return b"", f"CmdWorker: Unknown command [{command}]."

    @staticmethod
    def _invalid(command: str) -> str:
        return f"{command}: Run parameters never validated."

    def _stream(self, command: str, args: list[str]) -> tuple[_Stream | None, str]:
        if len(args) < 2:
            return None, f"{command}: Requires at least 2 params."
        if not self._validated:
            return None, self._invalid(command)
        js, ip = abs(_int(args[0])), _int(args[1])
        if js not in (0, 1, 2) or args[0] == "-1":
            return None, f"{command}: stream-js must be in set {{-2,0,1,2}}."
        name, n = ("nidq", "obx", "imec")[js], self._numbers[js]
        if not n:
            return None, f"{command}: {name} stream not enabled."
        if js == 0:
            ip = 0
        if not 0 <= ip < n:
            return None, f"{command}: {name} stream-ip must be in range[0..{n - 1}]."
        return self._streams[js, ip], ""

    def _stream_np(self, args: list[str]) -> tuple[bytes, str]:
        if not args:
            return b"", "GETSTREAMNP: Requires parameter js."
        if not self._validated:
            return b"", self._invalid("GETSTREAMNP")
        js = abs(_int(args[0]))
        if js not in self._numbers:
            return b"", "GETSTREAMNP: js must be in set {-2,0,1,2}."
        return f"{self._numbers[js]}\n".encode(), ""

    def _geometry(self, args: list[str]) -> tuple[bytes, str]:
        if not args:
            return b"", "GETGEOMMAP: Requires parameter ip."
        stream, error = self._stream("GETGEOMMAP", ["2", args[0]])
        if stream is None:
            return b"", error
        p = stream.probe
        return geometry_lines(p.part, p.signal.info.positions_um).encode(), ""

    def _query(self, command: str, s: _Stream, args: list[str]) -> tuple[bytes, str]:
        p = s.probe
        if command == "GETSTREAMI16TOVOLTS":
            # the real server indexes without looking whether the channel was given
            text = f"{p.v_max / p.i_max / p.gain(_int(args[2])):g}"
        elif command == "GETSTREAMSN" and p.device == "nidq":
            return b"", "GETSTREAMSN: Only valid for js = {-2,1,2}."
        else:
            text = {
                "GETSTREAMACQCHANS": " ".join(map(str, p.counts)),
                "GETSTREAMSAMPLERATE": f"{p.signal.info.fs_hz:.6f}",
                "GETSTREAMSAMPLECOUNT": str(s.end() if self.running else 0),
                "GETSTREAMMAXINT": str(p.i_max),
                "GETSTREAMVOLTAGERANGE": f"{-p.v_max:g} {p.v_max:g}",
                "GETSTREAMSN": f"{p.serial} {p.type}",
                "GETSTREAMFILESTART": "0",
            }[command]
        return f"{text}\n".encode(), ""

    def _fetch(self, args: list[str]) -> tuple[bytes, str]:
        if len(args) < 4:
            return b"", "FETCH: Requires at least 4 params."
        stream, error = self._stream("FETCH", args)
        if stream is None:
            return b"", error
        if not self.running:
            return b"", NOT_RUNNING
        n_all = sum(stream.probe.counts)
        channels, error = _channels(args[4] if len(args) > 4 else "-1#", n_all)
        if error:
            return b"", error
        if self._refusals:
            return b"", self._refusals.pop(0)
        if self._garble:
            self._garble = False
            return b"BINARY_DATA 3 -1 \xff\xfe\n", ""
        start, most = _int(args[2]), _int(args[3])
        n = self._wait_for_some(stream, start, most)
        if n < 0:
            return b"", TOO_LATE
        data = stream.columns(start, n)[:, channels]
        down = _int(args[5]) if len(args) > 5 else 1
        if down > 1 and n:
            data = np.stack([data[i : i + down].mean(0) for i in range(0, n, down)]).astype("<i2")
        head = f"BINARY_DATA {len(channels)} {len(data)} uint64({start})\n".encode()
        return head + np.ascontiguousarray(data, "<i2").tobytes(), ""

    def _wait_for_some(self, s: _Stream, start: int, most: int) -> int:
        """How many samples there are from `start`, waiting a little for the first; -1 when it is too late."""
        for _ in range(3):
            end = s.end()
            if start < s.oldest():
                return -1
            if end > start:
                return min(most, end - start)
            if start + 24 > end:
                time.sleep(min(max(250e-6, (start + 24 - end) / s.fs_hz), 2e-3))
        return 0


STREAM_QUERIES = frozenset(
    f"GETSTREAM{what}"
    for what in (
        "ACQCHANS",
        "SAMPLERATE",
        "SAMPLECOUNT",
        "MAXINT",
        "VOLTAGERANGE",
        "SN",
        "FILESTART",
        "I16TOVOLTS",
    )
)


def _int(text: str) -> int:
    """As the server reads numbers: nonsense is 0."""
    try:
        return int(text)
    except ValueError:
        return 0


def _channels(text: str, n_all: int) -> tuple[list[int], str]:
    if text in ("-1#", "-2#"):
        return list(range(n_all)), ""
    wanted = [c for c in text.split("#") if c]
    if not wanted:
        return [], "Bad channel string format."
    for c in wanted:
        if not 0 <= _int(c) < n_all:
            return [], f"Channel {_int(c)} out of range [0..{n_all - 1}]."
    return sorted({_int(c) for c in wanted}), ""
