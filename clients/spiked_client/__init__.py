"""Client of spiked: message contract, subscriber, control, closed loop. Imports numpy, pyzmq and msgpack only.

Names load when they are first used, so that importing the contract alone stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spiked_client.control import Control, SyncControl
    from spiked_client.errors import (
        AccessError,
        ClientError,
        DaemonAbsent,
        DeadlineMissed,
        Incompatible,
        Refused,
        Silence,
        UnknownStream,
    )
    from spiked_client.loop import Loop, Tick
    from spiked_client.order import Batch, Missed
    from spiked_client.stimulator import Stimulator, Wanted
    from spiked_client.subscribe import Client, SyncClient

__all__ = [
    "AccessError",
    "Batch",
    "Client",
    "ClientError",
    "Control",
    "DaemonAbsent",
    "DeadlineMissed",
    "Incompatible",
    "Loop",
    "Missed",
    "Refused",
    "Silence",
    "Stimulator",
    "SyncClient",
    "SyncControl",
    "Tick",
    "UnknownStream",
    "Wanted",
]

_ROOM = {
    "Batch": "order",
    "Missed": "order",
    "Client": "subscribe",
    "SyncClient": "subscribe",
    "Loop": "loop",
    "Tick": "loop",
    "Stimulator": "stimulator",
    "Wanted": "stimulator",
} | dict.fromkeys(("Control", "SyncControl"), "control")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOM.get(name, 'errors')}"), name)
