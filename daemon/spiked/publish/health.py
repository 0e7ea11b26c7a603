"""The supervisor's own topics: health once a second, session events when they happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spiked.publish.zmq_pub import PEERS, Publisher


class HealthPublisher(Publisher):
    """PUB for the topics `health`, `session` and `clock`, numbered like all others, without replay.

    Safe to call from the event loop: nothing here waits.
    """

    def __init__(
        self, host: str, port: int, run: str, hwm: int = 1000, *, keys: Path | None = None, peers: int = PEERS
    ) -> None:
        super().__init__(host, port, None, run, hwm=hwm, keys=keys, peers=peers)
        self.endpoint = self.endpoints["pub"]

    def health(self, **figures: Any) -> int:
        """Publish the figures of this second; returns the message's number."""
        return self.send("health", figures)

    def clock(self, **figures: Any) -> int:
        """Publish what the clocks of this second say; returns the message's number."""
        return self.send("clock", figures)

    def session(self, event: str, **about: Any) -> int:
        """Publish a session event such as "started"; returns the message's number."""
        return self.send("session", {**about, "event": event})
