"""The stages of an offline job, one after the other, for one stream of a session.

Stages run in the order of progress.STAGES. Each leaves its files in offline/<sorter>/ and its result in
stages.json, so that a job that was stopped goes on after the last finished stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from spiked.config import Stim
from spiked.errors import OfflineError
from spiked.offline import (
    analyze,
    compare,
    export,
    facts,
    figures,
    labels,
    merges,
    preflight,
    presets,
    report,
    rig_library,
    sort,
)
from spiked.offline.failures import OutOfMemory
from spiked.offline.manifest import Manifest, digest, write_json
from spiked.offline.page import write_page
from spiked.offline.progress import STAGES, Progress
from spiked.offline.session import Session, StreamFiles
from spiked.offline.sort_child import recording_of

DEFAULT_BATCH, MIN_BATCH = 60_000, 7_500  # a quarter of a second at 30 kHz: less is no whitening
BINARY = "recording.dat"


class Job:
    """One stream of one session on its way through the stages. `run` returns the report's mapping."""

    def __init__(
        self, session: Session, stream: StreamFiles, settings: presets.JobSettings, progress: Progress
    ) -> None:
        self.session, self.stream, self.settings = session, stream, settings
        self.progress = progress
        self.folder = session.folder(stream, settings.sorter)
        self.device = presets.resolve_device(settings.device)
        self.preset = presets.choose(
            settings.preset, self.device, stream.fs_hz, stream.n_channels, stream.duration_s
        )
        self.params = {"torch_device": self.device, **self.preset.params, **settings.sorter_params}
        self.threads = settings.threads or presets.default_threads()
        self.stim = Stim() if session.config is None else session.config.stim
        self._analyzer: Any = None

    # the stages ------------------------------------------------------------------------------------------

    def preflight(self) -> tuple[list[str], dict[str, Any]]:
        batch = int(self.params.get("batch_size", DEFAULT_BATCH))
        return [], preflight.check(self.stream, self.folder, batch, self._say("preflight"))

    def export(self) -> tuple[list[str], dict[str, Any]]:
        result = export.write_binary(self.stream, self.folder / BINARY, self._say("export"), self.stim)
        return [], result

    def sort(self) -> tuple[list[str], dict[str, Any]]:
        params = dict(self.params)
        bad = self.result("preflight")["bad_channels"]
        if bad:
            params.setdefault("bad_channels", bad)
        tried = self._sort_smaller(params)
        found = sort.read(self.folder / "sorter")
        keep = (found["samples"] >= 0) & (found["samples"] < self.stream.n_samples)
        samples, units = found["samples"][keep], found["units"][keep]
        np.savez(self.folder / "sorted.npz", samples=samples, units=units)
        whole = labels.without_echoes(samples, units, self.stream.fs_hz)
        np.savez(self.folder / "without_echoes.npz", samples=samples[whole], units=units[whole])
        n = len(np.unique(units))
        if not n:
            raise OfflineError("Kilosort found no units", "biology", "sort")
        self._say("sort")(1.0, f"Kilosort found {n} units, {len(samples)} spikes")
        return ["sorted.npz", "without_echoes.npz", "sorter/sorter_output/ops.npy"], {
            "units": n,
            "spikes": len(samples),
            "echoes": int(np.count_nonzero(~whole)),
            "ks_label": found["ks_label"],
            "contamination": found["contamination"],
            "batch_size": params.get("batch_size", DEFAULT_BATCH),
            "out_of_memory": tried,
        }

    def _sort_smaller(self, params: dict[str, Any]) -> list[str]:
        """Run the sorter, with half the batch_size after every out-of-memory; what it said each time.

        `params` gets the batch_size that fitted. Raises the last OutOfMemory when no retry is left.
        """
        tried: list[str] = []
        while True:
            job = sort.sorter_job(
                self.stream,
                self.folder / BINARY,
                self.result("export")["gain_uv"],
                self.settings.sorter,
                params,
                self.folder / "sorter",
                self.threads,
                self.settings.memory_gb,
            )
            try:
                sort.run(job, self.device, self.settings.timeout_s, self._say("sort"))
                return tried
            except OutOfMemory as e:
                batch = int(params.get("batch_size", DEFAULT_BATCH))
                if len(tried) >= self.settings.retries or batch // 2 < MIN_BATCH:
                    raise
                tried.append(f"batch_size {batch}: {e}")
                params["batch_size"] = batch // 2
                if self.device != "cpu":
                    params["clear_cache"] = True
                self._say("sort")(0.0, f"out of memory; again with batches of {batch // 2} samples")

    def analyze(self) -> tuple[list[str], dict[str, Any]]:
        samples, units = self.cleaned()
        folder = self.folder / "analyzer"
        self._analyzer = analyze.build(self.recording(), samples, units, folder, self._say("analyze"))
        shapes = analyze.shapes(self._analyzer, self.stream.positions_um)
        return ["analyzer"], {"shapes": {str(k): v for k, v in shapes.items()}}

    def labels(self) -> tuple[list[str], dict[str, Any]]:
        samples, units = self.cleaned()
        shapes = {int(k): v for k, v in self.result("analyze")["shapes"].items()}
        rows = self._label(samples, units, shapes)
        counts = {
            name: sum(r["label"] == name for r in rows) for name in ("good", "undetermined", "mua", "noise")
        }
        write_json(self.folder / "labels.json", rows)
        self._say("labels")(1.0, ", ".join(f"{n} {name}" for name, n in counts.items()))
        return ["labels.json"], {"counts": counts, "units": rows}

    def slay(self) -> tuple[list[str], dict[str, Any]]:
        merger = self.settings.merger if self.settings.curate else "none"
        kept = self.kept()
        if not kept:
            result = {"groups": [], "method": "none", "why": "no unit left", "parameters": {}, "pairs": []}
        else:
            subset = self.analyzer().select_units(kept)
            result = merges.propose(subset, merger, self.stream.duration_s, self.folder, self._say("slay"))
        self._say("slay")(1.0, f"{len(result['groups'])} merges ({result['method']}: {result['why']})")
        return [], result

    def merge(self) -> tuple[list[str], dict[str, Any]]:
        kept, groups = self.kept(), self.result("slay")["groups"]
        mapping: dict[int, list[int]] = {}
        rows: list[dict[str, Any]] = []
        samples = units = np.zeros(0, np.int64)
        if kept:
            folder = self.folder / "analyzer_curated"
            curated, mapping = merges.merged_analyzer(self.analyzer().select_units(kept), groups, folder)
            trains = merges.trains(curated)
            samples, units = trains.samples, trains.ids[trains.index]
            rows = self._label(samples, units, analyze.shapes(curated, self.stream.positions_um))
        np.savez(
            self.folder / "units.npz",
            samples=samples + self.stream.first_sample,
            units=units,
            first_sample=self.stream.first_sample,
            fs_hz=self.stream.fs_hz,
        )
        self._say("merge")(1.0, f"{len(rows)} units after {len(groups)} merges")
        return ["units.npz"], {"mapping": {str(k): v for k, v in mapping.items()}, "units": rows}

    def nwb(self) -> tuple[list[str], dict[str, Any]]:
        if not self.session.owns(self.stream):
            return [], {
                "units": 0,
                "table": "",
                "why": "the recording is not a session's; it is left as it is",
            }
        from spiked.offline import nwb_units  # needs h5py

        samples, units = self.curated()
        rows = self.result("merge")["units"]
        result = nwb_units.write_units(self.stream, samples, units, rows, self.settings.sorter)
        self._say("nwb")(1.0, f"{result['units']} units in the session file. {result['why']}".rstrip(" ."))
        return [], result

    def library(self) -> tuple[list[str], dict[str, Any]]:
        if not self.settings.library or not self.session.owns(self.stream):
            why = (
                "switched off" if not self.settings.library else "the recording is not a session of this rig"
            )
            return [], {"file": "", "why": why, "told": [], "units": {}, "known": []}
        result = rig_library.keep_units(self.session, self.stream, self._say("library"))
        self._say("library")(
            1.0, f"{len(result['units'])} units kept for live sorting. {result['why']}".rstrip(" .")
        )
        return [], result

    def compare(self) -> tuple[list[str], dict[str, Any]]:
        self._say("compare")(0.0, "comparing live with offline")
        live = self.stream.live_spikes()
        live_samples = live["sample"].astype(np.int64) - self.stream.first_sample
        result = compare.compare(
            self.curated(),
            (live_samples, live["unit"].astype(np.int64)),
            self.stream.true_spikes(),
            self.sorted(),
            self.stream.n_samples,
            self.stream.fs_hz,
        )
        return [], result

    def report(self) -> tuple[list[str], dict[str, Any]]:
        self._say("report")(0.1, "quality metrics and figures")
        analyzer = analyze.load(self.folder / "analyzer_curated") if self.result("merge")["units"] else None
        told = facts.collect(self.stream, analyzer, self.folder / "sorter" / "sorter_output")
        pairs = figures.pairs_of(self.result("slay")["groups"], self.result("slay")["pairs"])
        live = self.stream.live_spikes()
        self._arrays = figures.collect(
            analyzer,
            self.analyzer() if pairs else None,
            pairs,
            self.result("merge")["units"],
            self.result("compare")["agreement"],
            self.curated(),
            (live["sample"] - self.stream.first_sample, live["unit"]),
            self.stream.n_samples,
        )
        told["drawn_pairs"] = [(c["a"], c["b"]) for c in self._arrays["ccg"]]
        return [], told

    # what stages share -----------------------------------------------------------------------------------

    def result(self, stage: str) -> dict[str, Any]:
        return dict(self.manifest.stages[stage]["result"])

    def recording(self) -> Any:
        return recording_of(
            {
                "binary": str(self.folder / BINARY),
                "fs_hz": self.stream.fs_hz,
                "gain_uv": self.result("export")["gain_uv"],
                "positions_um": self.stream.positions_um.tolist(),
            }
        )

    def analyzer(self) -> Any:
        if self._analyzer is None:
            self._analyzer = analyze.load(self.folder / "analyzer")
        return self._analyzer

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples, units) as the sorter left them, indices into the recording."""
        with np.load(self.folder / "sorted.npz") as z:
            return z["samples"], z["units"]

    def cleaned(self) -> tuple[np.ndarray, np.ndarray]:
        """`sorted` without spikes that a unit was given twice."""
        with np.load(self.folder / "without_echoes.npz") as z:
            return z["samples"], z["units"]

    def curated(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples, units) after labels and merges, indices into the recording."""
        with np.load(self.folder / "units.npz") as z:
            return z["samples"] - self.stream.first_sample, z["units"]

    def kept(self) -> list[int]:
        rows = self.result("labels")["units"]
        return [r["unit"] for r in rows if r["label"] in labels.KEPT or not self.settings.curate]

    def _label(
        self, samples: np.ndarray, units: np.ndarray, shapes: dict[int, dict[str, float]]
    ) -> list[dict[str, Any]]:
        sorter = self.result("sort")
        rows = labels.label_units(
            samples,
            units,
            shapes,
            {int(k): v for k, v in sorter["ks_label"].items()},
            {int(k): v for k, v in sorter["contamination"].items()},
            self.stream.n_samples,
            self.stream.fs_hz,
            self.stream.n_channels,
        )
        return [r.as_dict() for r in rows]

    def _say(self, stage: str) -> Callable[[float, str], None]:
        return lambda fraction, text: self.progress.say(stage, fraction, text)

    # the run ---------------------------------------------------------------------------------------------

    def inputs(self, stage: str) -> str:
        """Fingerprint of what a stage's result depends on: a changed file or parameter runs it again."""
        on = [
            *self.stream.fingerprint(),
            self.settings.sorter,
            self.params,
            report.versions(),
            self.stim.model_dump(),
        ]
        if stage in ("slay", "merge"):
            on += [self.settings.curate, self.settings.merger]
        if stage == "library":
            on += [self.settings.library]
        return digest(*on)

    def run(self) -> dict[str, Any]:
        """Every stage that is not finished, in order. Raises OfflineError with `kind` and `stage`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest = Manifest(self.folder)
        todo = self._todo()
        name = STAGES[0]
        try:
            for name in STAGES:
                if name not in todo:
                    self.progress.say(name, 1.0, f"{name} was finished before")
                    continue
                self.progress.say(name, 0.0, name)
                started = time.time()
                files, result = getattr(self, name)()
                plain = json.loads(json.dumps(result, default=float))
                self.manifest.finish(name, started, files, plain, self.inputs(name))
        except OfflineError as e:
            e.stage = e.stage or name
            raise
        finally:
            (self.folder / BINARY).unlink(missing_ok=True)
        return self._written()

    def _written(self) -> dict[str, Any]:
        """The three reports, from what all stages said."""
        data = self.summary()
        md, js, page = (self.session.report(self.stream, suffix) for suffix in ("md", "json", "html"))
        report.write(data, md, js)
        write_page(data, self._arrays, page)
        self._say("report")(1.0, f"report written: {page}")
        return data

    def _todo(self) -> list[str]:
        """The first unfinished stage and all after it, and the export if any of them reads the binary.

        Comparing and reporting take no time and always run: live spikes or a truth may have come since.
        """
        always = STAGES.index("compare")
        done = [self.manifest.finished(s, self.inputs(s)) for s in STAGES[:always]]
        todo = list(STAGES[done.index(False) if False in done else always :])
        self.manifest.forget(tuple(todo))
        if {"sort", "analyze", "slay", "merge"} & set(todo) and "export" not in todo:
            todo.append("export")
        return todo

    def summary(self) -> dict[str, Any]:
        """The mapping that becomes report.json; also what `run_offline` returns."""
        s, result = self.stream, self.result
        compared = result("compare")
        truth = compared["truth"]
        merge = {**result("slay"), **result("merge")}
        md, js, page = (self.session.report(s, suffix) for suffix in ("md", "json", "html"))
        return {
            **result("report"),
            "session": self.session.path.resolve().name,
            "stream": s.name,
            "sorter": self.settings.sorter,
            "offline_units": result("sort")["units"],
            "echoes": result("sort")["echoes"],
            "merged_units": len(merge["units"]),
            "live_units": compared["live_units"],
            "accuracy_offline": _accuracies(truth, "offline"),
            "accuracy_live": _accuracies(truth, "live"),
            "agreement": compared["agreement"],
            "report": str(md),
            "report_json": str(js),
            "report_html": str(page),
            "seconds": self.manifest.seconds(),
            "recording": {
                "file": s.nwb.name,
                "channels": s.n_channels,
                "fs_hz": s.fs_hz,
                "samples": s.n_samples,
                "first_sample": s.first_sample,
                "duration_s": s.duration_s,
                "gaps": len(s.gaps),
                "partial_gaps": len(s.partial),
                "blind_s": s.blind_s,
                "stimuli": self.result("export").get("stimuli", 0),
            },
            "preflight": result("preflight"),
            "device": self.device,
            "threads": self.threads,
            "preset": {"name": self.preset.name, "why": self.preset.why},
            "sorter_params": self.params,
            "labels": result("labels"),
            "merge": merge,
            "nwb": result("nwb"),
            "library": result("library"),
            "compare": compared,
            "versions": report.versions(),
            "files": {
                "phy": str(self.folder / "sorter" / "sorter_output"),
                "units": str(self.folder / "units.npz"),
                "analyzer": str(self.folder / "analyzer_curated"),
            },
        }


def _accuracies(truth: dict[str, Any] | None, which: str) -> dict[int, float] | None:
    if truth is None:
        return None
    return {int(unit): row["accuracy"] for unit, row in truth[which]["units"].items()}
