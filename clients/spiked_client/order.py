"""Putting messages in order: what is missing, what came back from the replay port, what is gone.

No sockets here: `Order.take` is a generator that yields the replay requests it needs and is sent the answers,
so that the blocking and the asyncio client share every decision.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spiked_client import protocol
from spiked_client.errors import Incompatible
from spiked_client.protocol import ARRAYS, Message, ProtocolError, VersionMismatch


@dataclass(frozen=True)
class Missed:
    """Messages `first` to `last` (inclusive) of a topic that are lost for good.

    `reason`: "gone" (no longer stored), "restarted" (the publisher that had them is gone), "unanswered" (its
    replay port does not answer) or "no replay" (the topic has none).
    """

    topic: str
    first: int
    last: int
    reason: str

    @property
    def count(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Batch:
    """One message as a client gets it, in order.

    `missed` tells of messages lost for good just before this one; `restarted` marks the first message of a
    new publisher (how many the old one still sent cannot be known); `replayed` came from the replay port.
    `received_ns` is this machine's monotonic clock.
    """

    message: Message
    received_ns: int
    missed: Missed | None = None
    restarted: bool = False
    replayed: bool = False
    units: frozenset[int] | None = None

    @property
    def topic(self) -> str:
        return self.message.topic

    @property
    def stream(self) -> str:
        return self.message.stream

    @property
    def seq(self) -> int:
        return self.message.seq

    @property
    def header(self) -> dict[str, Any]:
        return self.message.header

    @property
    def first(self) -> int | None:
        """First sample number covered; None where the topic does not say."""
        return self.header.get("first")

    @property
    def stop(self) -> int | None:
        """One past the last sample number covered."""
        return self.header.get("stop")

    @property
    def stamps(self) -> dict[str, int]:
        """Stage name -> monotonic ns."""
        stamps = self.header.get("stamps")
        return stamps if isinstance(stamps, dict) else {}

    @property
    def spikes(self) -> np.ndarray:
        """Records of dtype SPIKE, only of the units asked for."""
        return self._of_units("spikes")

    @property
    def early(self) -> np.ndarray:
        """Records of dtype EARLY: spikes that are not final yet; only of the units asked for."""
        return self._of_units("early")

    @property
    def resolved(self) -> np.ndarray:
        """Records of dtype RESOLVED: what became of early ones; only of the units asked for."""
        return self._of_units("resolved")

    @property
    def blind(self) -> np.ndarray:
        """Records of dtype BLIND: where spikes could not be seen."""
        return self._array("blind")

    @property
    def gaps(self) -> np.ndarray:
        """Records of dtype GAP."""
        return self._array("gaps")

    @property
    def stims(self) -> np.ndarray:
        """Records of dtype STIM."""
        return self._array("stims")

    @property
    def unit_table(self) -> np.ndarray:
        """Records of dtype UNIT."""
        return self._array("units")

    def _of_units(self, name: str) -> np.ndarray:
        found = self._array(name)
        return found if self.units is None else found[np.isin(found["unit"], list(self.units))]

    def _array(self, name: str) -> np.ndarray:
        found = self.message.arrays.get(name)
        return np.zeros(0, ARRAYS[name]) if found is None else found


@dataclass(frozen=True)
class ReplayRequest:
    """Frames to send to the replay port of `stream`, `wait_s` from now: it asked for patience."""

    stream: str
    request_id: int
    data: bytes
    wait_s: float = 0.0


FOR_EVER = (1 << 63) - 1  # as the last number of a range: up to the newest
MOST_PATIENCE_S = 5.0


def _patience_s(answer: list[bytes] | None) -> float:
    """How long the replay port asks to wait before the same is asked again; 0: it answered."""
    if not answer or len(answer) != 1:
        return 0.0
    try:
        head = protocol.unpack(answer[0])
    except ProtocolError:
        return 0.0
    ms: Any = head.get("retry_ms")
    wanted = head.get("ok") is False and protocol.is_count(ms)
    return min(float(ms) / 1000, MOST_PATIENCE_S) if wanted else 0.0


Steps = Generator[ReplayRequest, list[bytes] | None, list[Batch]]


class Order:
    """Remembers per topic what came last, and fills the holes.

    `from_start` also asks for what was published before this client came. `counters`: received, replayed,
    missed, duplicates, malformed, restarts.
    """

    def __init__(
        self, units: Collection[int] | None = None, *, replay: bool = True, from_start: bool = False
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._units = None if units is None else frozenset(int(u) for u in units)
        self._replay, self._from_start = replay, from_start
        self._last: dict[str, tuple[str, int]] = {}  # topic -> run, seq
        self._ended: set[tuple[str, str]] = set()  # topic, run
        self._ids = itertools.count(1)
        self.unanswered = False  # whether the replay port was silent when the past was last asked for

    def take(self, frames: list[bytes]) -> Steps:
        """Batches that `frames` makes ready, oldest first; malformed ones make none. Raises Incompatible."""
        now = time.monotonic_ns()
        try:
            message = protocol.decode(frames)
        except VersionMismatch as e:
            raise Incompatible(str(e)) from e
        except ProtocolError:
            self.counters["malformed"] += 1
            return []
        topic, run, seq = message.topic, message.header["run"], message.seq
        last = self._last.get(topic)
        if (topic, run) in self._ended or (last is not None and last[0] == run and seq <= last[1]):
            self.counters["duplicates"] += 1
            return []
        restarted = last is not None and last[0] != run
        first = (
            seq if last is None and not self._from_start else 1 if last is None or restarted else last[1] + 1
        )
        messages, missed = yield from self._fill(message, first)
        # Only now: whoever gives up while waiting for the replay port finds the same hole again.
        self._last[topic] = (run, seq)
        if last is not None and restarted:
            self._ended.add((topic, last[0]))
            self.counters["restarts"] += 1
        self.counters["received"] += 1
        self.counters["replayed"] += len(messages)
        self.counters["missed"] += sum(m.count for m in missed.values())
        return [
            Batch(
                m,
                now if m is message else time.monotonic_ns(),
                missed.get(m.seq),
                restarted and i == 0,
                m is not message,
                self._units,
            )
            for i, m in enumerate([*messages, message])
        ]

    @property
    def wants_past(self) -> bool:
        """Whether what was published before is asked for, also on topics that are silent now."""
        return self._from_start and self._replay

    def past(self, topic: str) -> Steps:
        """Batches of everything stored of a topic that was not given out yet: a silent topic has no message that tells of them.

        What cannot be had now, the next live message finds missing; `unanswered` says whether to ask again before that.
        """
        batches: list[Batch] = []
        wait_s = 0.0
        run, at = self._last.get(topic, ("", 0))
        known, restarted, more = run, False, True
        while more:
            request_id = next(self._ids)
            ask = {"topic": topic, "from": at + 1, "to": FOR_EVER, **({"run": run} if run else {})}
            request = protocol.encode_request(request_id, **ask)
            answer = yield ReplayRequest(topic.partition(".")[2], request_id, request, wait_s)
            self.unanswered = answer is None
            if wait_s := _patience_s(answer):
                continue
            told, page, more = self._stored_past(topic, answer)
            if not told or (topic, told) in self._ended:
                break
            if run and told != run:  # the publisher was restarted: from its first message
                run, at, restarted, more = told, 0, True, not restarted
                continue
            run = told
            for m in (m for m in page if m.seq > at):
                missed = Missed(topic, at + 1, m.seq - 1, "gone") if m.seq > at + 1 else None
                first = restarted and not batches
                batches.append(Batch(m, time.monotonic_ns(), missed, first, True, self._units))
                at = m.seq
            more = more and bool(page)
        if batches:
            if restarted:
                self._ended.add((topic, known))
                self.counters["restarts"] += 1
            self._last[topic] = (run, at)
            self.counters["replayed"] += len(batches)
            self.counters["missed"] += sum(b.missed.count for b in batches if b.missed)
        return batches

    def _stored_past(self, topic: str, answer: list[bytes] | None) -> tuple[str, list[Message], bool]:
        """(run, messages, whether there are more) of one answer; run "" for an answer that cannot be used."""
        if answer is None:
            return "", [], False
        try:
            head = protocol.unpack(answer[0])
            protocol.check_version(head.get("v"))
            page = self._stored(head.get("sizes"), b"".join(answer[1:])) if head.get("ok") else []
        except ProtocolError:
            self.counters["malformed"] += 1
            return "", [], False
        run = head.get("run")
        if not isinstance(run, str) or any(m.topic != topic or m.header["run"] != run for m in page):
            return "", [], False
        return run, page, bool(head.get("next"))

    def _fill(
        self, message: Message, at: int
    ) -> Generator[ReplayRequest, list[bytes] | None, tuple[list[Message], dict[int, Missed]]]:
        """Ask for the messages from `at` up to the one before `message`.

        Returns what came back, and what did not, by the number of the message that follows the loss.
        """
        found: list[Message] = []
        missed: dict[int, Missed] = {}
        topic, end = message.topic, message.seq
        wait_s = 0.0
        while at < end:
            page: list[Message] = []
            reason, gone, at_next = "no replay", end - 1, end
            if self._replay and message.stream:
                request_id = next(self._ids)
                ask = {"topic": topic, "run": message.header["run"], "from": at, "to": end - 1}
                request = protocol.encode_request(request_id, **ask)
                answer = yield ReplayRequest(message.stream, request_id, request, wait_s)
                wait_s = _patience_s(answer)
                if wait_s:
                    continue
                reason, gone, page, at_next = self._page(answer, message, at)
            if gone >= at:
                missed[gone + 1] = Missed(topic, at, gone, reason)
            found += page
            at = at_next
        return found, missed

    def _page(
        self, answer: list[bytes] | None, message: Message, at: int
    ) -> tuple[str, int, list[Message], int]:
        """(reason, gone, messages, next) of one answer of the replay port; nonsense counts as no answer."""
        end = message.seq
        nothing: tuple[str, int, list[Message], int] = ("unanswered", end - 1, [], end)
        if answer is None:
            return nothing
        try:
            head = protocol.unpack(answer[0])
            protocol.check_version(head.get("v"))
            if not head.get("ok"):
                return nothing
            if head.get("run") != message.header["run"]:
                return ("restarted", end - 1, [], end)
            gone, page = head.get("gone"), self._stored(head.get("sizes"), b"".join(answer[1:]))
        except ProtocolError:
            self.counters["malformed"] += 1
            return nothing
        numbers = [m.seq for m in page]
        gone = min(gone, end - 1) if protocol.is_count(gone, at) and isinstance(gone, int) else at - 1
        follows = gone + 1
        expected = list(range(follows, follows + len(page)))
        if numbers != expected or follows + len(page) > end or any(m.topic != message.topic for m in page):
            self.counters["malformed"] += 1
            return nothing
        if follows + len(page) == at:  # no progress: the publisher does not know what we know it sent
            return nothing
        return ("gone", gone, page, follows + len(page))

    @staticmethod
    def _stored(sizes: Any, data: bytes) -> list[Message]:
        if not isinstance(sizes, list) or not all(isinstance(m, list) for m in sizes):
            raise ProtocolError("replay answer without sizes")
        if not all(protocol.is_count(n, 0) for m in sizes for n in m) or sum(map(sum, sizes)) != len(data):
            raise ProtocolError("replay answer whose sizes do not add up")
        cuts = itertools.accumulate((n for m in sizes for n in m), initial=0)
        frames = (data[a:b] for a, b in itertools.pairwise(cuts))
        return [protocol.decode(list(itertools.islice(frames, len(m)))) for m in sizes]
