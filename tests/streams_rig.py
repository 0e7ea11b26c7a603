"""Several simulators and one daemon, all of them real programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from spiked.rehearsal import Rehearsal, free_ports

GRID = 16  # electrodes of every array here


class Devices:
    """`with`: simulators by stream name, then the daemon (`rig`), which records them all in one session."""

    def __init__(
        self,
        folder: Path,
        wires: dict[str, tuple[str, list[str]]],
        seconds: float,
        silence_s: dict[str, float] | None = None,
        sync_line: int | None = None,
        **sections: Any,
    ) -> None:
        """`wires`: stream name -> (wire, more arguments of `spiked simulate`); two of SpikeGLX share one server.

        `silence_s`: of a stream, where it is not 30.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seconds = folder, seconds
        ports = free_ports(4 + len(wires))
        self.arguments: dict[str, list[str]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        streams: list[dict[str, Any]] = []
        for k, (name, (wire, more)) in enumerate(wires.items()):
            port = ports[4 + k]
            stream: dict[str, Any] = {
                "name": name,
                "source": wire,
                "wait_s": 120.0,
                "silence_s": (silence_s or {}).get(name, 30.0),
            }
            electrodes = "4x4" if wire == "maxwell" else "16"
            arguments = [
                "--wire",
                wire,
                "--electrodes",
                electrodes,
                "--duration-s",
                str(seconds),
                "--wait-s",
                "120",
            ]
            if sync_line is not None:
                stream["sync_line"] = sync_line
            if wire == "maxwell":
                stream["electrode_map"] = str(folder / "map.cfg")
                arguments += ["--columns", "1024"]
                rows = [f"{i}({1000 + i}){17.5 * (i % 4)}/{17.5 * (i // 4)};" for i in range(GRID)]
                (folder / "map.cfg").write_text("\n".join(rows))
            first = next((s for s in streams if s["source"] == wire == "spikeglx"), None)
            if first is not None:
                streams.append({**stream, "address": first["address"], "probe_index": 1})
                continue
            stream["address"] = f"tcp://127.0.0.1:{port}"
            streams.append(stream)
            self.arguments[name] = [*arguments, "--address", stream["address"], "--sent", str(folder / f"{name}.raw"), *more]  # fmt: skip
        names = ("live_port", "replay_port", "control_port", "health_port")
        config: dict[str, Any] = {
            "rig": {"name": "test", "priority": "normal", "sessions": str(folder / "sessions")},
            "stream": streams,
            "live": {"enabled": False, "sorter": "rt_sort", "skip_behind_ms": 12_000.0},
            "publish": {**dict(zip(names, ports[:4], strict=True)), "live_port": 0, "replay_port": 0},
            "offline": {"enabled": False},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        self.rig = Rehearsal(folder, None, config)

    def start(self, name: str) -> None:
        """The simulator of a stream; also a second time, after it was killed."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "spiked.cli", "simulate", *self.arguments[name], "--json", str(self.folder / f"{name}.json")],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait(60)

    def end(self, name: str) -> dict[str, Any]:
        """End a simulator's serving now; what it says it sent."""
        self.processes[name].send_signal(signal.SIGTERM)
        return self.sent(name)

    def sent(self, name: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """What a simulator says it sent, once it has sent everything."""
        code = self.processes[name].wait(timeout_s)
        assert code == 0, (self.folder / f"{name}.log").read_text()
        return dict(json.loads((self.folder / f"{name}.json").read_text()))

    def codes(self, name: str, dtype: str) -> np.ndarray:
        """(samples, channels) as the simulator sent them."""
        return np.fromfile(self.folder / f"{name}.raw", dtype).reshape(-1, GRID)

    def wait(self, what: Callable[[dict[str, Any]], Any], timeout_s: float = 120.0) -> dict[str, Any]:
        """The status once `what(status)` is true."""
        until = time.monotonic() + timeout_s
        status: dict[str, Any] = {}
        while time.monotonic() < until:
            status = self.rig.status()
            if what(status):
                return status
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s} s: {json.dumps(status)[:2000]}")

    def __enter__(self) -> Self:
        for name in self.arguments:
            self.start(name)
        self.rig.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for p in self.processes.values():
            if p.poll() is None:
                p.send_signal(signal.SIGTERM)
        self.rig.__exit__(kind, value, trace)
        for p in self.processes.values():
            if p.poll() is None:
                p.kill()
            p.wait()


def log_of(session: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (session / "log.jsonl").read_text().splitlines()]
