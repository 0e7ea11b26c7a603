"""A simulator and a daemon as the two programs they are, for the demo, the benchmarks and the tests.

with Rehearsal(folder, simulate=[...], config={...}) as r:
    r.wait_simulator()      # everything was sent
    summary = r.stop()      # the daemon's own summary of the session
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from spiked import config as configuration
from spiked.errors import SpikedError
from spiked_client.control import SyncControl
from spiked_client.errors import ClientError

LEAST_PORT = 20_000
_given = itertools.count()


def free_ports(n: int) -> list[int]:
    """Ports that were free a moment ago, and that neither a connection that goes out nor another process that asks here takes soon.

    The system gives those of its own range to every connection and to whoever lets it choose. Below it each process begins
    somewhere else and goes on from there, so that none is given twice.
    """
    span = _system_ports() - LEAST_PORT
    found: list[int] = []
    with contextlib.ExitStack() as kept:
        for _ in range(2 * max(span, 0)):
            if len(found) == n:
                return found
            port = LEAST_PORT + (os.getpid() * 1009 + next(_given)) % span
            with contextlib.suppress(OSError):
                kept.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
        while len(found) < n:
            s = kept.enter_context(socket.socket())
            s.bind(("127.0.0.1", 0))
            found.append(int(s.getsockname()[1]))
    return found


def _system_ports() -> int:
    """The first port that the system gives away by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return LEAST_PORT


class Rehearsal:
    """`simulate`: arguments of `spiked simulate`; `config`: the rig's configuration as a dictionary."""

    def __init__(
        self,
        folder: Path,
        simulate: list[str] | None,
        config: dict[str, Any],
        run_args: tuple[str, ...] = (),
        needs: Path | None = None,
    ) -> None:
        self.needs = (
            needs  # a file the simulator writes before the daemon can start, such as its electrode map
        )
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = configuration.parse(config)
        self.simulate, self.run_args = simulate, run_args
        self.simulator: subprocess.Popen[bytes] | None = None
        self.daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        (self.folder / "rig.toml").write_text(configuration.dump(self.config), encoding="utf-8")
        if self.simulate is not None:
            self.simulator = self._start(
                "simulate", *self.simulate, "--json", str(self.folder / "simulator.json")
            )
            self._wait_for_needs()
        self.daemon = self._start(
            "run", str(self.folder / "rig.toml"), "--json", str(self.folder / "run.json"), *self.run_args
        )
        return self

    def _wait_for_needs(self, timeout_s: float = 120.0) -> None:
        until = time.monotonic() + timeout_s
        while self.needs is not None and not self.needs.exists():
            if not self.simulator_running() or time.monotonic() > until:
                raise SpikedError(f"the simulator did not write {self.needs}: {self._log('simulate')}")
            time.sleep(0.05)

    def _start(self, *args: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{args[0]}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "spiked.cli", *args], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )  # fmt: skip

    def _log(self, name: str) -> str:
        lines = (
            (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        )
        return lines[-1] if lines else "no output"

    def control(self, op: str, timeout: float = 30.0, **fields: Any) -> dict[str, Any]:
        """One request to the daemon; SpikedError when it is not there."""
        try:
            with SyncControl("127.0.0.1", self.config.publish.control_port, timeout=timeout) as c:
                return dict(c.request(op, **fields))
        except ClientError as e:
            raise SpikedError(str(e)) from e

    def status(self) -> dict[str, Any]:
        """The daemon's status; SpikedError with its last words when it has ended."""
        if self.daemon is not None and self.daemon.poll() is not None:
            raise SpikedError(f"the daemon ended with exit {self.daemon.returncode}: {self._log('run')}")
        return self.control("status")

    def wait_state(self, states: tuple[str, ...], timeout_s: float) -> dict[str, Any]:
        """Until the session is in one of `states`."""
        until = time.monotonic() + timeout_s
        status: dict[str, Any] = {}
        while time.monotonic() < until:
            try:
                status = self.status()
            except SpikedError as e:
                if self.daemon is None or self.daemon.poll() is not None:
                    raise SpikedError(f"the daemon ended: {self._log('run')}") from e
            if status.get("state") in states:
                return status
            time.sleep(0.1)
        raise SpikedError(
            f"session is {status.get('state')} after {timeout_s:g} s, expected {' or '.join(states)}: {self._log('run')}"
        )

    def simulator_running(self) -> bool:
        return self.simulator is not None and self.simulator.poll() is None

    def wait_simulator(self, timeout_s: float | None = None) -> dict[str, Any]:
        """What the simulator says it sent, once it has sent everything."""
        if self.simulator is None:
            raise SpikedError("no simulator was started")
        code = self.simulator.wait(timeout_s)
        if code != 0:
            raise SpikedError(f"the simulator ended with exit {code}: {self._log('simulate')}")
        return dict(json.loads((self.folder / "simulator.json").read_text(encoding="utf-8")))

    def stop_simulator(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """End the serving now; what the simulator says it sent."""
        if self.simulator_running() and self.simulator is not None:
            self.simulator.send_signal(signal.SIGTERM)
        return self.wait_simulator(timeout_s)

    def wait_received(self, samples: int, timeout_s: float = 60.0) -> bool:
        """Whether every stream has taken in `samples` within the time."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            streams = self.status()["streams"].values()
            if streams and all(s["samples"] >= samples for s in streams):
                return True
            time.sleep(0.1)
        return False

    def stop(self, timeout_s: float = 900.0) -> dict[str, Any]:
        """End the session, wait for the daemon; its summary, with `exit_code`."""
        if self.daemon is None:
            raise SpikedError("no daemon was started")
        if self.daemon.poll() is None:
            self.control("stop_session")
        return self.wait_daemon(timeout_s)

    def wait_daemon(self, timeout_s: float) -> dict[str, Any]:
        """The daemon's summary once it has ended by itself."""
        assert self.daemon is not None
        code = self.daemon.wait(timeout_s)
        try:
            summary = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise SpikedError(f"the daemon ended with exit {code}: {self._log('run')}") from e
        return {**summary, "exit_code": code}

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self.simulator, self.daemon):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(90)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
