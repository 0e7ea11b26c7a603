"""`spiked jobs run --wait`: a queue's own service. It sorts whatever the daemon beside it has recorded.

It lives apart from the daemon, so that a stopped daemon leaves nothing unsorted and a sorter that takes the
machine's memory takes no recording with it. Between jobs it looks, every `LOOK_S`, for sessions that have ended.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

from spiked import config as configuration
from spiked.errors import OfflineError
from spiked.notify import notify
from spiked.offline.collect import collect
from spiked.offline.owner import Owner
from spiked.offline.queue import NAME, Queue
from spiked.offline.runner import Runner

log = logging.getLogger("spiked")
LOOK_S = 2.0
RETRY_S = 30.0  # after a queue that could not be used


class Standby:
    """`run` until `stop`. What happens to jobs goes to the log, how far one is to systemd's status line."""

    def __init__(self, root: Path, nice: int, runtime: Path) -> None:
        self.root = root
        self._stopped = threading.Event()
        self._stage = ("", "")
        self._runner = Runner(root, self._tell, nice, runtime)

    def stop(self) -> None:
        """From a signal handler too: the job at hand goes back into the queue."""
        self._stopped.set()
        self._runner.stop()

    def run(self) -> None:
        notify("READY=1")
        idle = f"STATUS=waiting for sessions to end in {self.root}"
        notify(idle)
        while not self._stopped.is_set():
            wait_s = LOOK_S
            try:
                if self._anything():
                    self._runner.drain()
                    notify(idle)
            except OfflineError as e:
                self._tell({"event": "fatal", "error": str(e)})
                notify(f"STATUS={e}")
                wait_s = RETRY_S
            self._stopped.wait(wait_s)
        notify("STOPPING=1")

    def _anything(self) -> bool:
        collect(self.root)
        if not (self.root / NAME).is_file():
            return False
        with Queue(self.root) as jobs:
            waiting = jobs.jobs("queued", "running")
        me = (
            Owner.me()
        )  # nothing is run now: what is noted as run by this process ended while that could not be noted
        return any(r.state == "queued" or r.stale or r.owner == me for r in waiting)

    def _tell(self, event: dict[str, Any]) -> None:
        session, text = str(event.get("session", "")), str(event.get("text") or event.get("error") or "")
        about = {k: event[k] for k in ("event", "session", "job", "state", "stage") if k in event}
        if event["event"] == "progress":
            stage = str(event["stage"])
            notify(f"STATUS={session}: {event['overall']:.0%} {stage}: {text}")
            if self._stage != (session, stage):
                self._stage = (session, stage)
                log.info("%s: %s", session, stage, extra={"about": about})
        elif event["event"] == "job":
            level = logging.ERROR if event["state"] == "failed" else logging.INFO
            log.log(level, "%s: %s: %s", session, event["state"], text, extra={"about": about})
        elif event["event"] in ("waits", "fatal"):
            level = logging.ERROR if event["event"] == "fatal" else logging.INFO
            log.log(level, "%s", text, extra={"about": about})


def stand_by(path: Path) -> None:
    """Until SIGTERM or SIGINT. `path` is a rig's TOML file, or a sessions folder."""
    rig, offline = configuration.Rig(), configuration.Offline()
    if path.is_file():
        config = configuration.load(path)
        rig, offline = config.rig, config.offline
        path = rig.sessions.expanduser()
    standby = Standby(path, offline.nice, rig.runtime)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: standby.stop())
    standby.run()
