"""A session sorted offline in seconds: what the sorter would have found is told to it, everything after is real."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from offline_rig import FIRST, FS, codes, live, neurons, session, stream

from spiked.offline import labels, presets
from spiked.offline.pipeline import Job
from spiked.offline.progress import Progress
from spiked.offline.session import open_session
from spiked.record import nwbfile
from spiked_client.protocol import BLIND, BLIND_REASONS, LEDGER, OUTCOMES, REASONS

UNITS, SECONDS, SPLIT, NOISE = 5, 40.0, 900, 901
GAP = (300_000, 306_000)
MARKS_S = (5.0, 20.5, 21.5)  # an edge and two stimulation marks
UNKNOWN_LIVE = 77  # a live unit that is nobody's


class Known(Job):
    """Kilosort's place is taken by the truth, but unit 0 is in two pieces, unit 1 has two spikes too many, and there is noise."""

    def sort(self) -> tuple[list[str], dict[str, Any]]:
        found = self.stream.true_spikes()
        assert found is not None
        samples, units = found[0], found[1].copy()
        units[(units == 0) & (np.arange(len(units)) % 5 < 2)] = SPLIT
        rng = np.random.default_rng(5)
        noise = rng.integers(1000, self.stream.n_samples - 1000, 60)
        foreign = samples[units == 1][100:300:100] + 20  # two intervals of a millisecond
        samples = np.concatenate([samples, noise, foreign])
        units = np.concatenate([units, np.full(60, NOISE), np.full(2, 1)])
        order = np.argsort(samples, kind="stable")
        samples, units = samples[order], units[order]
        np.savez(self.folder / "sorted.npz", samples=samples, units=units)
        whole = labels.without_echoes(samples, units, self.stream.fs_hz)
        np.savez(self.folder / "without_echoes.npz", samples=samples[whole], units=units[whole])
        ids = np.unique(units).tolist()
        told = {"ks_label": dict.fromkeys(ids, "good"), "contamination": dict.fromkeys(ids, 0.01)}
        return ["sorted.npz"], {
            "units": len(ids),
            "spikes": len(samples),
            "echoes": int((~whole).sum()),
            "batch_size": 60_000,
            "out_of_memory": [],
            "guards": {"warnings": [], "peaks": {}},
            **told,
        }

    def slay(self) -> tuple[list[str], dict[str, Any]]:
        pair = {"a": 0, "b": SPLIT, "similarity": 0.95, "ccg_metric": 0.5, "refractory_penalty": 0.0, "final_metric": 1.1}  # fmt: skip
        return [], {
            "groups": [[0, SPLIT]],
            "method": "test",
            "why": "told so",
            "parameters": {},
            "pairs": [pair],
        }


def recorded(folder: Path, seconds: float = SECONDS, another_day: bool = False) -> Path:
    """A session folder with a gap, live spikes, blind time and a stimulus ledger.

    On another day the same cells are seen in more noise, and the sorter counts them the other way round.
    """
    info = stream()
    data, samples, units = neurons(info, seconds, UNITS)
    if another_day:
        data += np.random.default_rng(9).normal(0, 3.0, data.shape).astype(np.float32)
        units = UNITS - 1 - units
    folder = session(folder, info, codes(info, data), ((*GAP, ()),))
    alive = (samples < GAP[0]) | (samples >= GAP[1])
    samples, units = samples[alive], units[alive]
    np.savez(folder / "mea.truth.npz", samples=samples, units=units)
    heard = samples > 200_000
    missed = units == UNITS - 1
    false = np.random.default_rng(1).integers(250_000, int(seconds * FS) - 10, 150)
    live(
        folder, info, np.concatenate([samples + 4, false]),
        np.concatenate([np.where(heard & ~missed, units + 50, -1), np.full(len(false), UNKNOWN_LIVE)]),
    )  # fmt: skip
    blind = np.zeros(4, BLIND)
    blind["start"] = FIRST + np.array([0, *GAP[:1], 400_000, 400_500])
    blind["stop"] = FIRST + np.array([200_000, GAP[1], 401_000, 400_700])
    blind["channel"] = [-1, -1, 3, 4]
    blind["reason"] = [BLIND_REASONS.index(r) for r in ("uncalibrated", "gap", "clipped", "clipped")]
    blind.tofile(folder / "mea.blind.bin")
    ledger = np.zeros(7, LEDGER)
    ledger["number"] = np.arange(1, 8)
    ledger["rule"] = b"burst"
    ledger["outcome"] = [
        OUTCOMES.index(x) for x in ("sent", "sent", "sent", "sham", "refused", "refused", "sent")
    ]
    ledger["reason"][4:6] = REASONS.index("lockout")
    ledger["sample"] = FIRST + 20_000 * np.arange(10, 17)
    ledger["n_triggers"] = 1
    sent = ledger["outcome"] == OUTCOMES.index("sent")
    ledger["sent_sample"] = np.where(sent, ledger["sample"] + 40, -1)
    ledger["artifact_sample"] = np.where(sent, ledger["sample"] + 60, -1)
    ledger["trigger_ns"], ledger["decided_ns"] = 10**9, 10**9 + 2_000_000
    ledger["sent_ns"] = np.where(sent, 10**9 + 3_000_000, 0)
    ledger.tofile(folder / "mea.ledger.bin")
    with h5py.File(folder / "mea.nwb", "r+") as f:
        table = f[nwbfile.EVENTS]
        for name, values in {
            "timestamp": MARKS_S,
            "sample": FIRST + np.array(MARKS_S) * FS,
            "kind": (b"ttl", b"stim", b"stim"),
        }.items():
            table[name].resize(len(MARKS_S), 0)
            table[name][:] = values
        for column in table.values():
            column.resize(len(MARKS_S), 0)
        table["id"][:] = range(len(MARKS_S))
    late = {"latency_ms": {"n": 9, "mean": 1.5, "p50": 1.4, "p99": 2.5, "max": 3.0}}
    (folder / "mea.latency.json").write_text(json.dumps(late))
    return folder


def sort_offline(folder: Path, **settings: Any) -> dict[str, Any]:
    """Every stage, in this process; what libraries say about their own future is let pass."""
    opened = open_session(folder)
    wanted = presets.JobSettings(device="cpu", threads=1, **settings)
    with warnings.catch_warnings(), Progress() as progress:
        warnings.simplefilter("ignore")
        return Known(opened, opened.stream(None), wanted, progress).run()
