"""A simulator and a daemon for the tests of whole sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spiked.rehearsal import Rehearsal, free_ports


def rehearsal(folder: Path, wire: str = "maxwell", electrodes: str = "4x4", seconds: float = 12.0, simulate: tuple[str, ...] = (), **sections: Any) -> Rehearsal:  # fmt: skip
    """Not yet started: `with` starts both programs. `sections` override parts of the configuration."""
    ports = free_ports(5)
    address = f"tcp://127.0.0.1:{ports[0]}"
    arguments = ["--wire", wire, "--address", address, "--electrodes", electrodes, "--duration-s", str(seconds), "--sent", str(folder / "sent.raw"), "--wait-s", "120"]  # fmt: skip
    stream: dict[str, Any] = {
        "name": "sim",
        "source": wire,
        "address": address,
        "wait_s": 120.0,
        "silence_s": 30.0,  # from the end of the simulation to what a test does next, on a busy machine
    }
    if wire == "maxwell":
        arguments += ["--map", str(folder / "map.cfg"), "--columns", "1024"]
        stream["electrode_map"] = str(folder / "map.cfg")
        folder.mkdir(parents=True, exist_ok=True)
        n = int(np.prod([int(x) for x in electrodes.split("x")]))
        rows = [f"{i}({1000 + i}){17.5 * (i % 4)}/{17.5 * (i // 4)};" for i in range(n)]
        (folder / "map.cfg").write_text("\n".join(rows))
    config: dict[str, Any] = {
        "rig": {"name": "test", "priority": "normal", "sessions": str(folder / "sessions")},
        "stream": [stream],
        # a busy machine may delay the live path by seconds; that is not what is tested with this
        "live": {"enabled": False, "sorter": "rt_sort", "skip_behind_ms": 12_000.0},
        "publish": dict(
            zip(("live_port", "replay_port", "control_port", "health_port"), ports[1:], strict=True)
        ),
        "offline": {"enabled": False},
    }
    for name, section in sections.items():
        config[name] = section if isinstance(section, list) else {**config.get(name, {}), **section}
    return Rehearsal(folder, [*arguments, *simulate], config)


def recorded(session: Path, stream: str = "sim") -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Codes (samples, channels) of the session's file, and its gaps as row intervals."""
    with h5py.File(session / f"{stream}.nwb", "r") as f:
        series = f["acquisition/ElectricalSeries"]
        fs = float(series["starting_time"].attrs["rate"])
        gaps: list[tuple[int, int]] = []
        if "intervals/invalid_times" in f:
            table = f["intervals/invalid_times"]
            spans = zip(table["start_time"][:], table["stop_time"][:], strict=True)
            gaps = [(round(float(a) * fs), round(float(b) * fs)) for a, b in spans]
        return series["data"][:], gaps
