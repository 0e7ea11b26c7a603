"""The published package as other programs: calibrating, sorting, and a block of chunks whenever it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError, SpikedError

Say = Callable[[str], None]
SCRIPT = Path(__file__).with_name("peer_run.py")
TIGHT = {
    "max_latency_diff_spikes": 2.5, "max_latency_diff_sequences": 2.5, "max_amp_median_diff_spikes": 0.45,
    "max_amp_median_diff_sequences": 0.45, "max_root_amp_median_std_sequences": 2.5,
}  # fmt: skip
LIMITS: dict[str, dict[str, float]] = {"default": {}, "tight": TIGHT}
# what is found before the limits matter
SHARED = ("scaled_traces.npy", "model_traces.npy", "model_outputs.npy", "formed.pickle", "set_up.pickle")
SHARED_STAGES = ("save_traces", "run_detection_model", "form_all_clusters", "setup_coc_clusters_parallel")


class Peer:
    """The package with one set of limits, in its folder; what an earlier run finished is kept."""

    def __init__(self, python: Path, folder: Path, job: dict[str, Any], say: Say) -> None:
        self.python, self.folder, self.say = python, folder, say
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != job:
            raise ConfigError(f"{folder} holds another run; remove it, or give another --folder")
        path.write_text(json.dumps(job, indent=1), encoding="utf-8")
        self.env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}

    def borrow(self, other: Path) -> None:
        """Take over what another set of limits found before limits matter, and the time that it took."""
        if (self.folder / "stages.json").exists() or not (other / "inter" / SHARED[-1]).exists():
            return
        (self.folder / "inter").mkdir(exist_ok=True)
        for name in SHARED:
            target = self.folder / "inter" / name
            target.unlink(missing_ok=True)
            os.link(other / "inter" / name, target)
        stages = json.loads((other / "stages.json").read_text(encoding="utf-8"))
        kept = {name: stages[name] for name in SHARED_STAGES}
        (self.folder / "stages.json").write_text(json.dumps(kept), encoding="utf-8")

    def run(self, task: str, result: str) -> dict[str, Any]:
        """One task of the script, if its result is not there yet; the result."""
        path = self.folder / result
        if not path.exists():
            log = self.folder / f"{task}.log"
            with open(log, "ab") as f:
                process = subprocess.Popen(
                    [str(self.python), str(SCRIPT), task, str(self.folder)], stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=self.env
                )  # fmt: skip
                try:
                    self._follow(process, log)
                finally:
                    if process.poll() is None:
                        process.terminate()
                        process.wait()
            if process.returncode != 0 or not path.exists():
                raise SpikedError(
                    f"the peer's {task} ended with exit {process.returncode}: {_last(log)}; see {log}"
                )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _follow(self, process: subprocess.Popen[bytes], log: Path) -> None:
        told, line = time.monotonic(), ""
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - told > 30:
                told, now = time.monotonic(), _last(log)
                if now != line:
                    self.say(f"  peer: {now}")
                line = now


def _last(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


class Blocks:
    """The peer's online sorter in its process, a number of chunks at a time."""

    def __init__(self, peer: Peer) -> None:
        self._log = open(peer.folder / "blocks.log", "ab")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(peer.python), str(SCRIPT), "blocks", str(peer.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=peer.env,
        )  # fmt: skip
        self._where = peer.folder / "blocks.log"

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SpikedError(f"the peer ended: {_last(self._where)}; see {self._where}")
        return dict(json.loads(line))

    def __enter__(self) -> Blocks:
        self._answer()
        return self

    def __call__(self, chunks: int, threads: int, grad: bool) -> tuple[list[float], float]:
        """(ms of every chunk, CPU seconds of them all)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"chunks": chunks, "threads": threads, "grad": grad}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["ms"], answer["cpu_s"]

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
