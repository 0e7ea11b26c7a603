"""Calibration around the running pipeline: collect its own output, find sequences in another process, hand back.

The network is not run again: the collector keeps the cleaned samples and the logits of the live pass
(float16, channels x samples, memory-mapped). `python -m spiked.live.calibration FOLDER` is the other process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from spiked.detect.detector import Detected
from spiked.errors import SpikedError
from spiked.priority import lower_priority
from spiked.sort.sequences import Sequences
from spiked.stream import StreamInfo

UNSEEN = -60000.0  # logit where nothing could be seen


class Collector:
    """Keeps `n_samples` of final pipeline output on disk or tmpfs."""

    def __init__(self, folder: Path, info: StreamInfo, n_samples: int, meta: dict[str, Any]) -> None:
        need = 2 * 2 * info.n_channels * n_samples
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < need * 1.2:
            raise SpikedError(
                f"calibration needs {need / 1e9:.1f} GB in {folder}; free space or lower calibrate_s"
            )
        self.folder, self.info, self.n_samples = folder, info, n_samples
        shape = (info.n_channels, n_samples)
        self._x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, shape)
        self._logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, shape)
        self._meta = meta
        self.filled = 0
        self.first_sample: int | None = None

    @property
    def full(self) -> bool:
        return self.filled >= self.n_samples

    def add(self, found: Detected) -> None:
        """Append one stretch; invalid samples are kept as unseen."""
        n = min(found.x.shape[1], self.n_samples - self.filled)
        if n <= 0:
            return
        if self.first_sample is None:
            self.first_sample = found.first_sample
        at = slice(self.filled, self.filled + n)
        self._x[:, at] = found.x[:, :n]
        logits = found.logits[:, :n]
        self._logits[:, at] = logits if found.all_valid else np.where(found.valid[:, :n], logits, UNSEEN)
        self.filled += n

    def close(self) -> None:
        """Write the description; the folder can now be handed to the calibrating process."""
        meta = {
            **self._meta,
            "n_samples": self.filled,
            "first_sample": self.first_sample or 0,
            "info": self.info.to_json(),
        }
        (self.folder / "calibration.json").write_text(json.dumps(meta), encoding="utf-8")
        del self._x, self._logits


class Calibrator:
    """The other process, seen from the live one. `poll` never blocks."""

    def __init__(self, folder: Path, nice: int = 5) -> None:
        self.folder = folder
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        self._log = open(folder / "calibration.log", "wb")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spiked.live.calibration", str(folder)],
            stdout=self._log, stderr=self._log, stdin=subprocess.PIPE, env=env,
            preexec_fn=lambda: lower_priority(nice),
        )  # fmt: skip

    def progress(self) -> tuple[float, str]:
        """(fraction, what it does now)."""
        try:
            d = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            return float(d["fraction"]), str(d["text"])
        except (OSError, ValueError, KeyError):
            return 0.0, "starting"

    def poll(self) -> Sequences | None:
        """The sequences once they are there; SpikedError when the process failed."""
        code = self._process.poll()
        if code is None:
            return None
        self._log.close()
        if code != 0:
            tail = (
                (self.folder / "calibration.log")
                .read_text(encoding="utf-8", errors="replace")
                .strip()
                .splitlines()
            )
            raise SpikedError(f"calibration failed (exit {code}): {tail[-1] if tail else 'no output'}")
        return Sequences.load(self.folder / "sequences.h5")

    def cancel(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(5)
        self._log.close()


def run(folder: Path) -> Sequences:
    """Calibrate what a Collector left in `folder`; writes sequences.h5 there."""
    from spiked.sort.calibrate import calibrate  # heavy, and only this process needs it

    meta = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    info = StreamInfo.from_json(meta["info"])
    n = int(meta["n_samples"])
    x = np.load(folder / "x.npy", mmap_mode="r")[:, :n]
    logits = np.load(folder / "logits.npy", mmap_mode="r")[:, :n]
    beside = folder / "progress.json.new"

    def progress(fraction: float, text: str) -> None:
        beside.write_text(json.dumps({"fraction": fraction, "text": text}), encoding="utf-8")
        beside.replace(folder / "progress.json")

    sequences = calibrate(
        x, logits, None, info.fs_hz, info.positions, None, meta["stringent"], meta["loose"],
        first_sample=int(meta["first_sample"]), progress=progress, channel_ids=info.channel_ids,
        network=meta["network"], inference_scaling=meta["scaling"], input_scale=meta["input_scale"],
    )  # fmt: skip
    if meta.get("previous"):
        from spiked.sort.match import match_ids

        sequences = match_ids(Sequences.load(meta["previous"]), sequences).sequences
    sequences.save(folder / "sequences.h5")
    return sequences


def _end_with_parent() -> None:
    """The live process holds our stdin open; when it is gone nobody wants the result."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    try:
        run(Path(sys.argv[1]))
    except SpikedError as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(e.exit_code)
