"""When the live process calibrates, and what it tells of it. Sorting goes on meanwhile with the units there are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from spiked import config as configuration
from spiked.detect.detector import Detected
from spiked.errors import SpikedError
from spiked.live.calibration import Calibration
from spiked.live.pipeline import LivePipeline, Units
from spiked.processes.link import Link


class Recalibration:
    """At most one calibration at a time, fed by the pipeline's tap.

    `name` is the ring's, so that what a crash leaves behind is cleared with the ring. The first calibration waits
    until sample `not_before`; without `asked` none is made until `ask`.
    """

    def __init__(
        self, pipeline: LivePipeline, cfg: configuration.Live, link: Link, runtime: Path, name: str, units_path: Path,
        asked: bool, not_before: int,
    ) -> None:  # fmt: skip
        self.pipeline, self.cfg, self.link = pipeline, cfg, link
        self.runtime, self.name, self.path = runtime, name, units_path
        self._asked, self._not_before = asked, not_before
        self._running: Calibration | None = None
        self._begun = 0
        for folder in (runtime, units_path.parent):
            for left in folder.glob(f"{name}-*.calibration"):  # by a life of this process that died
                shutil.rmtree(left, ignore_errors=True)
        pipeline.tap = self._tap

    def _tap(self, found: Detected) -> None:
        if self._running is not None:
            self._running.add(found)
        elif self._asked and found.first_sample >= self._not_before and self.pipeline.scaling is not None:
            self._begin()

    def _begin(self) -> None:
        p, info = self.pipeline, self.pipeline.info
        n = info.samples(self.cfg.calibrate_s * 1000)
        meta = {
            "stringent": p.stringent, "loose": p.loose, "scaling": p.scaling, "input_scale": p.detector.scale if self.cfg.gate else None,
            "network": {"name": p.network.name, "sha256": p.network.sha256}, "network_from": self.cfg.network,
            "sorter": self.cfg.sorter, "templates_from": self.cfg.templates_from, "early": self.cfg.early,
            "previous": str(self.path) if self.path.exists() else None,
        }  # fmt: skip
        room = shutil.disk_usage(self.runtime).free > 16 * info.n_channels * n
        self._begun += 1
        folder = (self.runtime if room else self.path.parent) / f"{self.name}-{self._begun}.calibration"
        result = self.path.with_name(self.path.name + ".found")
        self._running, self._asked = Calibration(folder, info, n, meta, result), False
        self.pipeline.gate(False)  # units are looked for, and the sentinel learns, where nothing was left out
        self._note("info", f"calibration began: {self.cfg.calibrate_s:g} s are collected first")

    def _note(self, level: str, text: str) -> None:
        self.link.tell("log", level=level, text=text)

    def _units_stay(self) -> str:
        n = len(self.pipeline.units or ())
        return f"the {n} units in use stay" if n else "there are no units"

    def ask(self, position: int) -> None:
        """Calibrate with the samples from `position` on."""
        if self.cfg.sorter == "none":
            self._note("warning", "no calibration: live.sorter is none")
        elif self._running is not None:
            self._note("warning", "a calibration is under way; cancel it before asking for another")
        else:
            self._asked, self._not_before = True, position

    def cancel(self) -> None:
        """Give up the one that runs, or was asked for."""
        if self._running is None and not self._asked:
            self._note("info", "no calibration is under way")
            return
        state, fraction = "waiting", 0.0
        if self._running is not None:
            state, fraction, _ = self._running.progress()
            self._running.cancel()
        self._running, self._asked = None, False
        self.pipeline.gate(True)
        self._note("warning", f"calibration cancelled while {state}; {self._units_stay()}")
        self._tell("cancelled", fraction, "cancelled")

    def _tell(self, state: str, fraction: float, stage: str) -> None:
        self.link.tell("calibration", state=state, stage=stage, fraction=round(fraction, 3))

    def advance(self, use: Callable[[Units], None]) -> None:
        """Tell how far it is; hand what was found to `use`. Between chunks; never waits."""
        running = self._running
        if running is None:
            return
        found = running.outcome
        if found is None:
            state, fraction, stage = running.progress()
            if state != "collecting":
                self.pipeline.gate(True)
            self._tell(state, fraction, stage)
            return
        self._running = None
        self.pipeline.gate(True)
        if not isinstance(found, SpikedError) and (len(found) or not self.pipeline.units):
            self._keep(running.result)
            use(found)
            self._tell("done", 1.0, f"{len(found)} units")
            return
        why = str(found) if isinstance(found, SpikedError) else "calibration found no units"
        self._note("error", f"{why}; {self._units_stay()}")
        self._tell("failed", 1.0, why)

    def _keep(self, result: Path) -> None:
        try:
            result.replace(self.path)
        except OSError as e:
            self._note(
                "error",
                f"{self.path} cannot be written ({e.strerror}); the new units are in use, but not kept",
            )

    def close(self) -> None:
        """Give up what runs and wait until it is gone."""
        if self._running is not None:
            self._running.cancel()
            self._running.join(5.0)
