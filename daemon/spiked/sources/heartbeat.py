"""The small request by which the Open Ephys ZMQ Interface knows its clients."""

from __future__ import annotations

import json
import time

import zmq

from spiked.errors import ConfigError


class Heartbeat:
    """Shows this program in the plugin's list of clients: one small request every two seconds.

    Data flow without it. A GUI without windows dies of it, hence it is off unless asked for.
    """

    EVERY_NS = 2_000_000_000
    PATIENCE_NS = 10_000_000_000

    def __init__(self, address: str, counters: dict[str, int]) -> None:
        head, _, port = address.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"heartbeat needs an address with a port, not {address}; set heartbeat = false")
        self._address, self._counters = f"{head}:{int(port) + 1}", counters
        self._request = json.dumps(
            {"application": "spiked", "uuid": f"spiked-{time.time_ns():x}", "type": "heartbeat"}
        )
        self._context = zmq.Context()
        self._socket: zmq.Socket | None = None
        self._sent_ns, self._waiting = 0, False

    def tick(self, now_ns: int) -> None:
        """Send or collect, whichever is due; never waits."""
        if self._socket is None:
            self._socket = self._context.socket(zmq.REQ)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(self._address)
        try:
            if self._waiting and self._socket.poll(0):
                self._socket.recv(zmq.NOBLOCK)
                self._waiting = False
            elif not self._waiting and now_ns - self._sent_ns >= self.EVERY_NS:
                self._socket.send_string(self._request, zmq.NOBLOCK)
                self._waiting, self._sent_ns = True, now_ns
                self._counters["heartbeats"] += 1
        except zmq.ZMQError:
            self._drop()
        if self._waiting and now_ns - self._sent_ns > self.PATIENCE_NS:
            self._counters["heartbeats_unanswered"] += 1
            self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close(0)
        self._socket, self._waiting = None, False

    def close(self) -> None:
        self._drop()
        self._context.term()
