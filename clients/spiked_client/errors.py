"""What a client can run into, sorted by what to do.

ClientError
 ├─ DaemonAbsent    nobody answers on the control port: start the daemon, or give its port
 ├─ AccessError     a key file or access list is wrong or unsafe, or the daemon does not take the key
 ├─ Refused         the daemon answered no; `op` was asked, the message is the daemon's own line
 ├─ Incompatible    client and daemon speak different protocol versions: update one of them
 ├─ UnknownStream   the daemon publishes no such stream or topic
 ├─ Silence         connected, but nothing arrived within the timeout
 └─ DeadlineMissed  a closed loop got a tick too late to act on, or lost one; `tick` is what came
"""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """Base of all errors a client raises; the message is one line that ends with what to do."""


class DaemonAbsent(ClientError):
    """Nobody answered on the control port."""


class AccessError(ClientError):
    """A key file or access list cannot be used, or the daemon does not take the key that was shown."""


class Refused(ClientError):
    """The daemon refused `op`."""

    def __init__(self, op: str, line: str) -> None:
        super().__init__(line)
        self.op = op


class Incompatible(ClientError):
    """The protocol's major versions differ."""


class UnknownStream(ClientError):
    """No such stream or topic."""


class Silence(ClientError):
    """Nothing arrived in time."""


class DeadlineMissed(ClientError):
    """A tick of a closed loop came too late, or after a loss."""

    def __init__(self, line: str, tick: Any) -> None:
        super().__init__(line)
        self.tick = tick
