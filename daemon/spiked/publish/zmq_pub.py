"""The publisher inside the live process: numbered messages out, never a wait."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import zmq

from spiked.gate import Gate
from spiked.publish.replay import History, ReplayServer
from spiked.publish.sockets import bind
from spiked_client import protocol

HISTORY_BYTES = 64 << 20  # per topic
# Subscriptions are small and rare. libzmq keeps them as a tree with a node for every byte, walks it on the live thread,
# and one of 1 MB ends the process; a handshake needs about 300 bytes.
SUBSCRIPTION_BYTES = 512
SUBSCRIPTIONS_AT_ONCE = 16  # of one client, in one turn
BYTES_PER_S, BYTES_AT_ONCE = 1024.0, 65536.0  # from one client
PEERS = 128
LAST_WORDS_S = 5.0  # at most, for subscribers to be sent the last messages of a session
KERNEL_BYTES = (
    1 << 17
)  # that the kernel keeps for one subscriber, or twice that; on its own it would take some MB


class Publisher:
    """A PUB socket whose messages are numbered per topic from 1 and can be asked for again.

    `hwm` messages wait per subscriber, then ZeroMQ drops for that subscriber and tells nobody: the subscriber
    sees the hole in the numbers and asks the replay port, which remembers `replay_messages` per topic (and at
    most 64 MiB). Port 0 takes any free port; `replay_port` None means no replay. `endpoints` holds the
    addresses (`pub`, `replay`), `run` names this publisher's life. With `keys` (a folder of `spiked keys`) everything
    is encrypted and goes to clients of the access list only. Raises ConfigError when a port is taken, or the keys
    cannot be used.

    `counters`: sent, dropped (the socket refused), replay_requests, replayed, gone, malformed, unsent, and those of
    Gate and ReplayServer that begin with refused_.
    """

    def __init__(
        self,
        host: str,
        pub_port: int,
        replay_port: int | None,
        run: str,
        replay_messages: int = 4096,
        hwm: int = 10_000,
        *,
        keys: Path | None = None,
        peers: int = PEERS,
    ) -> None:
        self.run = run
        self.counters: Counter[str] = Counter()
        self._replay_messages = replay_messages
        self._histories: dict[str, History] = {}
        self._seq: dict[str, int] = {}
        self._sending = threading.Lock()
        self._context = zmq.Context()
        self._replay: ReplayServer | None = None
        self._gate: Gate | None = None
        try:
            self._gate = Gate(self._context, keys, peers, self.counters)
            self._pub = self._context.socket(zmq.PUB)
            self._pub.setsockopt(zmq.SNDHWM, hwm)
            self._pub.setsockopt(zmq.SNDBUF, KERNEL_BYTES)
            self._pub.setsockopt(zmq.MAXMSGSIZE, SUBSCRIPTION_BYTES)
            self._pub.setsockopt(zmq.RCVHWM, SUBSCRIPTIONS_AT_ONCE)
            self._gate.guard(self._pub, "pub", per_s=BYTES_PER_S, burst=BYTES_AT_ONCE, clears=True)
            self.endpoints = {"pub": bind(self._pub, host, pub_port, "the publisher")}
            if replay_port is not None:
                self._replay = ReplayServer(
                    self._context, host, replay_port, run, self._histories, self.counters, self._gate
                )
                self.endpoints["replay"] = self._replay.endpoint
        except BaseException:
            if self._gate is not None:
                self._gate.close()
            self._context.destroy(0)
            raise

    def send(self, topic: str, header: dict[str, Any] | None = None, **arrays: np.ndarray) -> int:
        """Publish one message and return its number. Never waits and never raises on network trouble.

        `header["stamps"]["published"]` is set to now when stamps are given without it. Raises ProtocolError
        when an array does not have the contract's dtype.
        """
        stamps = header.get("stamps") if header else None
        if stamps is not None and "published" not in stamps:
            header = {**(header or {}), "stamps": {**stamps, "published": time.monotonic_ns()}}
        with self._sending:
            seq = self._seq.get(topic, 0) + 1
            frames = protocol.encode(topic, seq, self.run, header, **arrays)
            self._seq[topic] = seq
            if self._replay is not None:
                history = self._histories.get(topic)
                if history is None:
                    history = self._histories[topic] = History(self._replay_messages, HISTORY_BYTES)
                history.put(seq, frames)
            try:
                self._pub.send_multipart(frames, zmq.NOBLOCK)
                self.counters["sent"] += 1
            except zmq.ZMQError:
                self.counters["dropped"] += 1
        return seq

    def close(self, linger_s: float = 0.0) -> None:
        """Free the ports; what is not sent within `linger_s` is dropped. Later sends only count as dropped."""
        if self._replay is not None:
            self._replay.close()
        with self._sending:
            self._pub.close(round(1000 * linger_s))
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
