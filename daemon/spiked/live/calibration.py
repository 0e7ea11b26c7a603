"""Calibration around the running pipeline: collect its own output, find units in another process, hand back.

The network is not run again: the collector keeps the cleaned samples and the logits of the live pass
(float16, channels x samples, memory-mapped). `python -m spiked.live.calibration FOLDER` is the other process. Whatever
happens to it, the live process goes on sorting with the units it has.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # noqa: F401 - loaded with this module, not when units are waited for
import numpy as np
import torch

from spiked.detect.detector import Detected
from spiked.errors import SpikedError
from spiked.live.taken import UNSEEN
from spiked.priority import lower_priority
from spiked.sort.sequences import Sequences
from spiked.stream import StreamInfo
from spiked.templates.library import Templates

NICE = 5
POLL_S = 0.1
TELL_S = 0.2
LEAST_MEMORY = 1 << 30  # bytes the other process may always have


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
        self._x, self._logits = (self._room(folder / f"{k}.npy") for k in ("x", "logits"))
        self._meta = meta
        self.filled = 0
        self.first_sample: int | None = None

    def _room(self, path: Path) -> np.ndarray:
        """An array in a file whose every byte is there: a full disk is an error now, not a signal later."""
        shape = (self.info.n_channels, self.n_samples)
        array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        with open(path, "rb+") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
        return array

    @property
    def full(self) -> bool:
        return self.filled >= self.n_samples

    def add(self, found: Detected) -> None:
        """Append one stretch; invalid samples, and those missing before it, are kept as unseen."""
        if self.first_sample is None:
            self.first_sample = found.first_sample
        missing = found.first_sample - self.first_sample - self.filled
        if missing > 0:
            self._logits[:, self.filled : self.filled + missing] = UNSEEN
            self.filled = min(self.filled + missing, self.n_samples)
        n = min(found.x.shape[1], self.n_samples - self.filled)
        if n <= 0:
            return
        at = slice(self.filled, self.filled + n)
        logits = found.logits[:, :n]
        if not found.all_valid:
            logits = np.where(found.valid[:, :n], logits, np.float32(UNSEEN))
        for room, values in ((self._x, found.x[:, :n]), (self._logits, logits)):
            torch.from_numpy(room)[:, at].copy_(torch.from_numpy(values))
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


class Calibration:
    """One calibration as the live process sees it: a thread does everything that takes time, no method here waits.

    Fed by `add` until it has its samples, it then runs the other process, which leaves the sequences at `result`.
    In the end `outcome` is the sequences or templates, or the SpikedError that says why there are none.
    """

    def __init__(
        self, folder: Path, info: StreamInfo, n_samples: int, meta: dict[str, Any], result: Path
    ) -> None:
        self.folder, self.result = folder, result
        self._matching, self._early = meta.get("sorter") == "templates", bool(meta.get("early"))
        self.outcome: Sequences | Templates | SpikedError | None = None
        self._collector: Collector | None = None
        self._collected, self._cancelled = threading.Event(), threading.Event()
        what = info, n_samples, {**meta, "result": str(result)}
        self._thread = threading.Thread(target=self._run, args=what, name="calibration", daemon=True)
        self._thread.start()

    def add(self, found: Detected) -> None:
        """Take one stretch, as long as samples are wanted; what comes before the room is ready is left out."""
        collector = self._collector
        if collector is None or self._collected.is_set():
            return
        collector.add(found)
        if collector.full:
            self._collected.set()

    def cancel(self) -> None:
        """Give it up; the thread sees to the rest."""
        self._cancelled.set()
        self._collected.set()

    def join(self, timeout_s: float) -> None:
        """Wait until everything it used is gone."""
        self._thread.join(timeout_s)

    def progress(self) -> tuple[str, float, str]:
        """("collecting" or "calculating", fraction of that, what is being done)."""
        if not self._collected.is_set():
            c = self._collector
            return "collecting", 0.0 if c is None else c.filled / c.n_samples, "collecting"
        try:
            d = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
            return "calculating", float(d["fraction"]), str(d["text"])
        except (OSError, ValueError, KeyError):
            return "calculating", 0.0, "starting"

    def _run(self, info: StreamInfo, n_samples: int, meta: dict[str, Any]) -> None:
        lower_priority(NICE)
        outcome: Sequences | Templates | SpikedError = SpikedError("calibration was cancelled")
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._collector = Collector(self.folder, info, n_samples, meta)
            self._collected.wait()
            collector, self._collector = self._collector, None
            collector.close()
            if not self._cancelled.is_set():
                outcome = self._calculate()
        except Exception as e:  # noqa: BLE001 - whatever it is, it is told, and the samples go on
            if not self._cancelled.is_set():
                outcome = e if isinstance(e, SpikedError) else SpikedError(f"calibration failed: {e}")
        finally:
            self._collector = None
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(outcome, SpikedError):
                self.result.unlink(missing_ok=True)
            self.outcome = outcome

    def _calculate(self) -> Sequences | Templates:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "spiked.live.calibration", str(self.folder)]
        log = self.folder / "calibration.log"
        with (
            open(log, "wb") as f,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=f, stderr=f, env=env) as process,
        ):
            while process.poll() is None:
                if self._cancelled.wait(POLL_S):
                    process.kill()
        if process.returncode == 0:
            found = (Templates if self._matching else Sequences).load(self.result)
            if isinstance(found, Templates):
                _ = found.gram  # made here, where no sample waits for it
                if self._early:
                    _ = found.early.gram
            return found
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise SpikedError(
            f"calibration failed (exit {process.returncode}): {said[-1] if said else 'no output'}"
        )


def run(folder: Path) -> Sequences | Templates:
    """Calibrate what a Collector left in `folder`; writes `result` of its description, or sequences.h5 there."""
    from spiked.sort.calibrate import calibrate  # heavy, and only this process needs it

    meta = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    info = StreamInfo.from_json(meta["info"])
    n = int(meta["n_samples"])
    x = np.load(folder / "x.npy", mmap_mode="r")[:, :n]
    logits = np.load(folder / "logits.npy", mmap_mode="r")[:, :n]
    tell = _teller(folder)
    matching = meta.get("sorter") == "templates"
    share = 0.3 if matching else 1.0  # of the time
    sequences = calibrate(
        x, logits, None, info.fs_hz, info.positions, None, meta["stringent"], meta["loose"],
        first_sample=int(meta["first_sample"]), progress=lambda f, text: tell(share * f, text), channel_ids=info.channel_ids,
        network=meta["network"], inference_scaling=meta["scaling"], input_scale=None if matching else meta["input_scale"],
    )  # fmt: skip
    result = Path(meta.get("result") or folder / "sequences.h5")
    previous = meta.get("previous")
    if matching:
        from spiked.live.choosing import find_templates

        templates = find_templates(
            x, logits, sequences, info, meta, folder, lambda f, text: tell(share + (1 - share) * f, text)
        )
        if previous:
            from spiked.templates.identity import match_ids as match_templates

            templates = match_templates(Templates.load(previous), templates).templates
        templates.save(result)
        return templates
    if previous:
        from spiked.sort.match import match_ids

        sequences = match_ids(Sequences.load(previous), sequences).sequences
    sequences.save(result)
    return sequences


def _teller(folder: Path) -> Callable[[float, str], None]:
    """Writes how far it is for `Calibration.progress` to read, a few times a second."""
    beside, told_s = folder / "progress.json.new", 0.0

    def tell(fraction: float, text: str) -> None:
        nonlocal told_s
        if time.monotonic() - told_s < TELL_S:
            return
        told_s = time.monotonic()
        beside.write_text(json.dumps({"fraction": fraction, "text": text}), encoding="utf-8")
        beside.replace(folder / "progress.json")

    return tell


def _end_with_parent() -> None:
    """The live process holds our stdin open; when it is gone nobody wants the result."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _bounded() -> None:
    """At most half of the memory that is free now, and the first to go should the machine run out of it."""
    import psutil

    limit = max(LEAST_MEMORY, psutil.virtual_memory().available // 2)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")


if __name__ == "__main__":
    _end_with_parent()
    _bounded()
    try:
        run(Path(sys.argv[1]))
    except MemoryError:
        sys.stderr.write("not enough memory for so many spikes; lower live.calibrate_s\n")
        sys.exit(1)
    except SpikedError as e:
        sys.stderr.write(f"{e}\n")
        sys.exit(e.exit_code)
