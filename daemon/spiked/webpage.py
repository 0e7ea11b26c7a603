"""The web page's server as the supervisor's child: niced, without a real-time priority, started again when it dies.

It reads the public protocol as any client does. Whatever becomes of it, sessions go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from spiked.config import Config
from spiked.journal import Journal
from spiked.processes.child import Child
from spiked_client.access import local_key

NICE = 10
RETRY_S, RETRY_MAX_S = 1.0, 30.0


class WebPage:
    """`start` and `close`; `told` is for the status."""

    def __init__(self, config: Config, control_port: Callable[[], int], journal: Journal) -> None:
        self.config, self._control_port, self.journal = config, control_port, journal
        self.url, self.lives, self._problem = "", 0, ""
        self._child: Child | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve from now on, where [web] says so; does not wait."""
        if self.config.web.enabled:
            self._keeping = asyncio.create_task(self._keep(), name="web page")

    async def close(self) -> None:
        """End it; takes some seconds at most."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        if self._child is not None and self._child.running:
            await self._child.stop(3.0)

    def told(self) -> dict[str, Any] | None:
        """Where the page is and how often it was begun again; None where there is none."""
        if not self.config.web.enabled:
            return None
        pid = self._child.pid if self._child is not None and self._child.running else None
        return {"url": self.url, "pid": pid, "lives": self.lives, "problem": self._problem}

    def _arguments(self) -> list[str]:
        w, p = self.config.web, self.config.publish
        connect = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(p.host, p.host)
        args = ["--supervised", "--connect", connect, "--control-port", str(self._control_port())]
        args += ["--host", w.host, "--port", str(w.port)]
        access = w.access or (p.keys if w.host not in ("127.0.0.1", "::1", "localhost") else None)
        files = {
            "--tls-cert": w.cert_file,
            "--tls-key": w.key_file,
            "--access": access,
            "--keys": w.client_key or local_key(p.keys),
        }
        return [*args, *(x for option, path in files.items() if path for x in (option, str(path)))]

    async def _keep(self) -> None:
        wait_s = RETRY_S
        root = self.config.rig.sessions.expanduser()
        while True:
            began = time.monotonic()
            self._child = Child("web", "spiked_client.web", self._arguments(), self._heard)
            try:
                await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
                await self._child.start(root / "web.stderr", nice=NICE)
                code: Any = await self._child.wait()
                why = f"exit {code}"
            except OSError as e:
                why = str(e)
            if time.monotonic() - began > RETRY_MAX_S:
                wait_s = RETRY_S
            problem = str(self._child.last.get("fatal", {}).get("error", why))
            if problem != self._problem:
                self.journal.note(
                    "web",
                    f"the page's server ended: {problem}; again and again until it stays",
                    level="warning",
                )
            self._problem, self.url = problem, ""
            self.lives += 1
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)

    def _heard(self, _child: Child, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self.url, self._problem = str(event.get("url")), ""
            self.journal.note("web", f"the page is at {self.url}")
