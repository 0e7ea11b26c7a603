"""The replay port: hands out again what was published a moment ago."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import zmq

from spiked.gate import Allowance, Gate
from spiked.publish.sockets import bind
from spiked_client import protocol
from spiked_client.protocol import ProtocolError

PAGE_MESSAGES = 256  # per reply, so that one reply never holds the interpreter for long
PAGE_BYTES = 1 << 20
PAUSES = 4.0  # a rest of this many times the work after each reply ...
MOST_REST_S = 0.25  # ... but no more: what the computer did meanwhile is not work, and a client waits 5 s
UNSENT_REPLIES = 32  # per client; beyond it replies to that client are dropped
UNREAD_REQUESTS = 16  # per client; beyond it the network keeps them
REQUEST_BYTES = 4096
CUT_BYTES = 1 << 16  # a message longer than this costs the connection
REQUESTS_PER_S, REQUESTS_AT_ONCE = 200.0, 400.0  # per client
BYTES_PER_S, BYTES_AT_ONCE = (
    float(32 << 20),
    float(128 << 20),
)  # per client; everything stored of two topics at once


class History:
    """The last `messages` messages of one topic and at most `max_bytes` of them, found by their number.

    One thread puts, any thread gets; neither waits for the other. The oldest is dropped first.
    """

    def __init__(self, messages: int, max_bytes: int) -> None:
        self.newest = 0
        self._slots: list[tuple[int, list[bytes]] | None] = [None] * messages
        self._sizes = [0] * messages
        self._max_bytes = max_bytes
        self._bytes = 0
        self._oldest = 1

    def put(self, seq: int, frames: list[bytes]) -> None:
        """Store message `seq`; numbers rise by one."""
        n = len(self._slots)
        i = seq % n
        size = 0
        for f in frames:
            size += len(f)
        self._bytes += size - self._sizes[i]
        self._sizes[i] = size
        self._slots[i] = (seq, frames)
        self.newest = seq
        if self._oldest <= seq - n:
            self._oldest = seq - n + 1
        while self._bytes > self._max_bytes and self._oldest < seq:
            j = self._oldest % n
            self._bytes -= self._sizes[j]
            self._sizes[j] = 0
            self._slots[j] = None
            self._oldest += 1

    def get(self, first: int, last: int) -> tuple[int, list[tuple[int, list[bytes]]], int]:
        """A page of the messages first..last (inclusive).

        Returns (gone, [(seq, frames), ...], next): all up to `gone` is no longer stored (0: none is), and
        the rest of the range starts at `next` (0: this was all).
        """
        last = min(last, self.newest)
        gone = min(last, max(self._oldest, self.newest - len(self._slots) + 1) - 1)
        gone = gone if gone >= first else 0
        found: list[tuple[int, list[bytes]]] = []
        size = 0
        for seq in range(max(first, gone + 1), last + 1):
            if found and (len(found) == PAGE_MESSAGES or size > PAGE_BYTES):
                return gone, found, seq
            slot = self._slots[seq % len(self._slots)]
            if slot is None or slot[0] != seq:  # overwritten while we read
                if found:
                    return gone, found, seq
                gone = seq
                continue
            found.append(slot)
            size += sum(map(len, slot[1]))
        return gone, found, 0


class ReplayServer:
    """A thread that answers replay requests from `histories` (topic -> History), which others fill.

    Counts `replay_requests`, `replayed`, `gone` (messages), `malformed` and `unsent` in `counters`, and what it refused:
    `refused_keys` (no longer in the access list), `refused_size`, `refused_requests` and `refused_replay` (too many
    requests, too many bytes: the reply says in `retry_ms` when to ask again).
    """

    def __init__(
        self,
        context: Any,
        host: str,
        port: int,
        run: str,
        histories: dict[str, History],
        counters: Counter[str],
        gate: Gate,
    ) -> None:
        self._run, self._histories, self._counters, self._gate = run, histories, counters, gate
        self._requests = Allowance(REQUESTS_PER_S, REQUESTS_AT_ONCE)
        self._bytes = Allowance(BYTES_PER_S, BYTES_AT_ONCE)
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.MAXMSGSIZE, CUT_BYTES)
        self._router.setsockopt(zmq.SNDHWM, UNSENT_REPLIES)
        self._router.setsockopt(zmq.RCVHWM, UNREAD_REQUESTS)
        gate.guard(
            self._router,
            "replay",
            per_s=REQUESTS_PER_S * REQUEST_BYTES,
            burst=REQUESTS_AT_ONCE * REQUEST_BYTES,
        )
        self.endpoint = bind(self._router, host, port, "the replay port")
        name = f"inproc://replay-{id(self)}"
        self._stop = context.socket(zmq.PAIR)
        self._stopped = context.socket(zmq.PAIR)
        self._stop.linger = self._stopped.linger = 0
        self._stopped.bind(name)
        self._stop.connect(name)
        self._thread = threading.Thread(target=self._serve, name="replay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and free the port."""
        if not self._stop.closed:
            self._stop.send(b"")
            self._thread.join(5.0)
            self._stop.close(0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        try:
            while self._stopped not in dict(poller.poll()):
                start = time.monotonic()
                self._one()
                # The live thread shares the interpreter: a greedy client gets a fifth of this thread's time.
                time.sleep(min(PAUSES * (time.monotonic() - start), MOST_REST_S))
        finally:
            self._router.close(0)
            self._stopped.close(0)

    def _one(self) -> None:
        try:
            parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            frames = [part.bytes for part in parts]
            envelope = frames[:2] if len(frames) == 3 and not frames[1] else frames[:1]
            if self._gate.who(parts[-1]) is None:  # its key was removed after it came
                self._counters["refused_keys"] += 1
                return
            answer = self._answer(frames[len(envelope) :], frames[0])
            self._router.send_multipart([*envelope, *answer], zmq.NOBLOCK)
        except zmq.ZMQError:  # the client went away, or does not read
            self._counters["unsent"] += 1

    def _answer(self, body: list[bytes], peer: bytes) -> list[bytes]:
        request: dict[str, Any] = {}
        try:
            if len(body) != 1:
                raise ProtocolError(f"{len(body)} frames, a request has one")
            if len(body[0]) > REQUEST_BYTES:
                self._counters["refused_size"] += 1
                raise ProtocolError(f"a request of {len(body[0])} bytes; at most {REQUEST_BYTES} are read")
            request = protocol.unpack(body[0])
            protocol.check_version(request.get("v"))
            if wait := self._requests.take(peer):
                self._counters["refused_requests"] += 1
                return [_later(request, wait, f"over {REQUESTS_PER_S:g} requests a second")]
            return self._page(request, peer)
        except ProtocolError as e:
            self._counters["malformed"] += 1
            return [protocol.encode_reply(_id(request), False, error=str(e))]

    def _page(self, request: dict[str, Any], peer: bytes) -> list[bytes]:
        topic, request_id = request.get("topic"), request.get("id")
        first: Any = request.get("from")
        last: Any = request.get("to")
        if not isinstance(topic, str) or not protocol.is_count(request_id, 0):
            raise ProtocolError("a replay request needs id and topic")
        if not protocol.is_count(first) or not protocol.is_count(last) or first > last:
            raise ProtocolError("a replay request needs from and to, whole numbers from 1")
        self._counters["replay_requests"] += 1
        head = {"run": self._run, "topic": topic, "newest": 0, "gone": 0, "next": 0, "sizes": []}
        history = self._histories.get(topic)
        if request.get("run", self._run) != self._run:
            return [protocol.encode_reply(request_id, True, **{**head, "gone": last})]
        if history is None:
            return [protocol.encode_reply(request_id, True, **head)]
        gone, found, rest = history.get(first, last)
        if wait := self._bytes.take(peer, sum(len(part) for _, f in found for part in f)):
            self._counters["refused_replay"] += 1
            return [_later(request, wait, f"over {BYTES_PER_S / 2**20:g} MiB a second")]
        self._counters["gone"] += max(gone - first + 1, 0)
        self._counters["replayed"] += len(found)
        head |= {"newest": history.newest, "gone": gone, "next": rest}
        head["sizes"] = [[len(part) for part in f] for _, f in found]
        return [
            protocol.encode_reply(request_id, True, **head),
            b"".join(part for _, f in found for part in f),
        ]


def _id(request: dict[str, Any]) -> int | None:
    known = request.get("id")
    return known if protocol.is_count(known, 0) else None


def _later(request: dict[str, Any], wait_s: float, what: str) -> bytes:
    text = f"{what}; ask again in {wait_s:.2g} s"
    return protocol.encode_reply(_id(request), False, error=text, retry_ms=int(1000 * wait_s) + 1)
