"""One page that is open somewhere: what waits for it, and the task that writes it."""

from __future__ import annotations

import asyncio
from typing import Any

from spiked_client.web.frames import Outbox

OUTBOX_BYTES = 2 << 20
STUCK_S = 20.0  # a page that takes nothing for so long is sent away


class Viewer:
    """`socket` is its WebSocket; `who` and `role` say whose it is."""

    def __init__(self, socket: Any, who: str, role: str) -> None:
        self.socket, self.who, self.role = socket, who, role
        self.outbox = Outbox(OUTBOX_BYTES)
        self.stream = ""

    async def write(self) -> str:
        """Send what comes, until the page is gone or does not read; why it ended."""
        while not self.outbox.overrun:
            message = await self.outbox.take()
            try:
                async with asyncio.timeout(STUCK_S):
                    if isinstance(message, str):
                        await self.socket.send_str(message)
                    else:
                        await self.socket.send_bytes(message)
            except TimeoutError:
                return f"the page took nothing for {STUCK_S:g} s"
            except (ConnectionError, RuntimeError):
                return "the page is gone"
        return "the page is too slow"
