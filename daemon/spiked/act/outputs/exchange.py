"""One command at a time to a peer that answers every request, whatever the connection and the words."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from spiked.act.outputs.base import Ack, Command
from spiked.act.outputs.transports import Transport

WAITING = 8  # commands behind one that was not answered yet; further ones are refused
AGAIN_NS = 500_000_000  # until a line that could not be lowered is tried again
MOST_REPLY = 1 << 16  # bytes
PAUSE_NS, MOST_PAUSE_NS = (
    500_000_000,
    5_000_000_000,
)  # without commands for a peer that did not answer, doubling
CLOSE_S = 0.3  # what closing may take to lower lines that are up


@dataclass(frozen=True, slots=True)
class Words:
    """What a peer understands, and how it answers.

    `raise_(pattern)`: the request of a pattern, or None for a pattern that it does not know; `lower(pattern)`
    ends it `pulse_ns` later, where it has an end; `patterns`: those that have. `judge(reply)`: (accepted, text), or None while the reply is
    incomplete. `alive`: a request that keeps the connection open, sent after `alive_s` of silence.
    """

    raise_: Callable[[str], bytes | None]
    judge: Callable[[bytes], tuple[bool, str] | None]
    lower: Callable[[str], bytes] | None = None
    pulse_ns: int = 0
    patterns: tuple[str, ...] = ()
    alive: bytes = b""
    alive_s: float = 0.0


@dataclass(slots=True)
class _Request:
    """What was or will be asked. `number` 0: nobody is told about it."""

    number: int
    data: bytes
    lowers: bool = False
    due_ns: int = 0
    sent_ns: int = 0
    told: bool = False


class Exchange:
    """An Output over one connection. Requests go out one after the other; each has `timeout_ms` for its answer.

    A command that cannot leave at once because there is no connection is refused rather than kept: a
    stimulus must not come late. One that waits for the answer to an earlier one is given up after `timeout_ms`. A peer that
    does not answer gets no further commands for a while: a program that hangs would find all of them when it goes on.
    """

    def __init__(self, name: str, peer: str, transport: Transport, words: Words, timeout_ms: float) -> None:
        self.name, self._peer = name, peer
        self._transport, self._words = transport, words
        self._patience_ns, self._timeout_ms = round(timeout_ms * 1e6), timeout_ms
        self._acks: list[Ack] = []
        self._waiting: deque[tuple[Command, int]] = deque()
        self._ends: list[_Request] = []  # lines that are up
        self._open: _Request | None = None
        self._reply = b""
        self._heard_ns = time.monotonic_ns()
        self._raised_ns = 0  # when the last command left
        self._pause_ns = self._paused_until = 0

    def send(self, command: Command) -> None:
        if self._open is None and not self._waiting and self._apart(command, time.monotonic_ns()):
            self._ask(command)
        elif len(self._waiting) < WAITING:
            self._waiting.append((command, time.monotonic_ns()))
        else:
            self._refuse(command, f"{len(self._waiting)} commands wait for {self._peer} already; not sent")

    def poll(self) -> list[Ack]:
        now = time.monotonic_ns()  # before the look, not after it: what comes while we are held up is in time
        self._take_reply()
        if self._open is not None and now - self._open.sent_ns > self._patience_ns:
            self._transport.renew()
            self._pause_ns = min(max(2 * self._pause_ns, PAUSE_NS), MOST_PAUSE_NS)
            self._paused_until = now + self._pause_ns
            self._failed(
                f"{self._peer} did not answer within {self._timeout_ms:g} ms; it may have acted nevertheless"
            )
            while self._waiting:
                self._refuse_late(self._waiting.popleft()[0])
        self._next(now)
        acks, self._acks = self._acks, []
        return acks

    def waiting(self) -> tuple[int, ...]:
        return tuple(command.number for command, _ in self._waiting) if self._waiting else ()

    def withdraw(self, number: int) -> bool:
        kept = [w for w in self._waiting if w[0].number != number]
        found = len(kept) < len(self._waiting)
        self._waiting = deque(kept)
        return found

    def halt(self) -> None:
        for end in self._ends:
            end.due_ns = 0

    def take_over(self) -> None:
        if self._words.lower is not None:
            lowers = dict.fromkeys(self._words.lower(p) for p in self._words.patterns)
            self._ends = [_Request(0, data, True) for data in lowers]

    def close(self) -> None:
        until = time.monotonic() + CLOSE_S
        self._waiting.clear()
        self.halt()
        while (self._ends or self._open) and time.monotonic() < until:
            self.poll()
            time.sleep(0.001)
        self._transport.close()

    # ---- asking ------------------------------------------------------------------------------------------------

    def _ask(self, command: Command) -> None:
        if (left := self._paused_until - time.monotonic_ns()) > 0:
            text = f"{self._peer} did not answer lately, it is tried again in {left / 1e9:.1f} s; not sent"
            self._refuse(command, text)
            return
        data = self._words.raise_(command.pattern)
        if data is None:
            self._refuse(command, f"output {self.name} knows no pattern {command.pattern!r}; not sent")
            return
        end = self._words.lower(command.pattern) if self._words.lower is not None else b""
        if any(e.data == end for e in self._ends):
            self._refuse(command, f"the line of {command.pattern!r} is still up; not sent")
            return
        if not self._go(request := _Request(command.number, data)):
            self._refuse(command, f"no connection to {self._peer}; not sent")
            return
        self._raised_ns = request.sent_ns
        if end:
            due = time.monotonic_ns() + self._words.pulse_ns
            self._ends.append(_Request(command.number, end, True, due))

    def _apart(self, command: Command, now: int) -> bool:
        """Whether it is far enough from the one before, which may have left later than it was to."""
        return now - self._raised_ns >= command.apart_ns

    def _go(self, request: _Request) -> bool:
        request.sent_ns = time.monotonic_ns()
        if not self._transport.send(request.data):
            return False
        self._open, self._reply = request, b""
        return True

    def _next(self, now: int) -> None:
        """The next request, when the last one was answered: lines come down before others go up."""
        if self._open is not None:
            return
        for end in self._ends:
            if end.due_ns <= now:
                if not self._go(end):
                    self._lowering_failed(end, f"no connection to {self._peer}")
                return
        while self._waiting and self._open is None:
            command, since = self._waiting[0]
            if now - since > self._patience_ns:
                self._refuse_late(self._waiting.popleft()[0])
            elif self._apart(command, now):
                self._ask(self._waiting.popleft()[0])
            else:
                break
        idle = now - self._heard_ns
        if self._open is None and self._words.alive and idle > self._words.alive_s * 1e9:
            self._heard_ns = now
            self._go(_Request(0, self._words.alive))

    def _refuse_late(self, command: Command) -> None:
        self._refuse(command, f"{self._peer} answered an earlier command too late; this one was not sent")

    # ---- answers -----------------------------------------------------------------------------------------------

    def _take_reply(self) -> None:
        data = self._transport.receive()
        if data is None:
            return
        now = time.monotonic_ns()
        self._heard_ns = now
        if self._open is None:
            return
        if data == b"":
            self._failed(f"{self._peer} closed the connection; it may have acted nevertheless")
            return
        self._reply += data
        if len(self._reply) > MOST_REPLY:
            self._transport.renew()
            self._failed(f"{self._peer} sent a reply without end; it may have acted nevertheless")
            return
        verdict = self._words.judge(self._reply)
        if verdict is None:
            return
        request, self._open = self._open, None
        self._pause_ns = self._paused_until = 0
        ok, text = verdict
        if not request.lowers:
            self._tell(request, ok, text if ok else f"{self._peer} refused: {text}")
            if not ok and request.number:  # what was refused did not go up
                self._ends = [e for e in self._ends if e.number != request.number]
        elif ok:
            self._ends = [e for e in self._ends if e is not request]
        else:
            self._lowering_failed(request, text)

    def _failed(self, text: str) -> None:
        request, self._open = self._open, None
        if request is not None and request.lowers:
            self._lowering_failed(request, text)
        elif request is not None:
            self._tell(request, False, text)

    def _lowering_failed(self, end: _Request, text: str) -> None:
        end.due_ns = time.monotonic_ns() + AGAIN_NS
        if not end.told:
            end.told = True
            self._tell(end, False, f"the line could not be lowered, trying on: {text}")

    def _tell(self, request: _Request, ok: bool, text: str) -> None:
        if request.number:
            self._acks.append(Ack(request.number, request.sent_ns, time.monotonic_ns(), ok, text))

    def _refuse(self, command: Command, text: str) -> None:
        self._acks.append(Ack(command.number, 0, time.monotonic_ns(), False, text))
