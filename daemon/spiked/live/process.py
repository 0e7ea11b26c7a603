"""live: ring -> clean -> detect -> sort -> publish, on one thread; calibration beside it in its own process."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiked import config as configuration
from spiked.errors import ConfigError, Overrun, SpikedError
from spiked.lease import hold_for_live
from spiked.live.acting import Acting
from spiked.live.choosing import expectation_lines
from spiked.live.compile import load_kernels
from spiked.live.early import END, NO_EARLY, TwoSteps
from spiked.live.latency import BlindTally, Latency, Stages
from spiked.live.pipeline import LivePipeline, LiveResult, Units
from spiked.live.recalibration import Recalibration
from spiked.live.spool import Spool
from spiked.priority import raise_priority
from spiked.processes.link import Link, wait_for_ring
from spiked.publish.zmq_pub import LAST_WORDS_S, Publisher
from spiked.ring import GAP_REASONS, Ring, RingReader, gap_mask
from spiked.sort.sequences import Sequences
from spiked.stream import Chunk, StreamInfo
from spiked.templates.library import Templates, library_path
from spiked.templates.sorter import REFRACTORY_MS, TemplateSorter
from spiked_client.protocol import BLIND, BLIND_REASONS, GAP, SPIKE, STIM, UNIT
from spiked_models import networks

HEARTBEAT_MS = 100.0
MUA_MS = 20.0
TELL_S = 0.5
REWIND_MS = 500.0  # a restarted pipeline warms up on samples the ring still holds
POLL_S = 0.00003  # between looks at the ring, of which a core has time for nothing else
SPARING_POLL_S = 0.0005  # where `rig.priority` says that it has


def pick_device(name: str) -> str:
    """'auto' -> cuda where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_network(
    name: str, fs_hz: float, device: str, n_channels: int = 0, threads: int = 1
) -> networks.DetectionNetwork:
    """The network a configuration names; its errors as ours.

    "auto" is the best network that the threads carry with `n_channels` in real time; a GPU carries any.
    """
    load = n_channels / threads if device == "cpu" else 0.0
    try:
        auto = name == "auto"
        network = networks.load(networks.default_for(fs_hz, channels_per_core=load) if auto else name, device)
        network.check_rate(fs_hz)
    except networks.NetworkError as e:
        raise SpikedError(str(e)) from e
    return network


class Live:
    """The process's state. `step` handles one chunk."""

    def __init__(
        self, config: configuration.Config, ring: Ring, session: Path, link: Link, life: int
    ) -> None:
        self.config, self.cfg, self.ring, self.session, self.link = config, config.live, ring, session, link
        self.info: StreamInfo = ring.info
        torch.set_num_threads(self.cfg.threads)
        device = pick_device(self.cfg.device)
        # offline jobs keep off the GPU while this process lives
        self.lease = hold_for_live(config.rig.runtime) if device.startswith("cuda") else None
        self.network = load_network(
            self.cfg.network, self.info.fs_hz, device, self.info.n_channels, self.cfg.threads
        )
        self.state_path = session / f"{self.info.name}.live.json"
        kind = "templates" if self.cfg.sorter == "templates" else "sequences"
        self.units_path = session / f"{self.info.name}.{kind}.h5"
        self.pipeline = LivePipeline(
            self.info,
            self.network,
            self.cfg,
            self._known_units(),
            device,
            self._known_scaling(),
            reuse=True,
            stim=config.stim,
        )
        self.spool = Spool(session, self.info.name)
        index = [s.name for s in config.stream].index(self.info.name)
        base = config.publish
        self.publisher = Publisher(
            base.host, *base.of_stream(index), f"{session.name}-{life}", base.replay_messages, base.hwm, keys=base.keys, peers=base.peers,
        )  # fmt: skip
        self.latency, self.chunk_ms = Latency(), Latency()
        # An early spike and a final one of its unit closer than a unit's refractory time are one.
        reach = self.info.samples(REFRACTORY_MS) - 1
        self.two_steps = TwoSteps(reach) if self.cfg.early and self.cfg.sorter == "templates" else None
        self.early_latency = Latency()
        self.stages, self.blind_tally = Stages(), BlindTally(self.info.n_channels)
        self.counters = {
            "spikes": 0, "mua": 0, "deadline_missed": 0, "skipped_samples": 0, "chunks": 0, "calibrations": 0, "suppressed": 0, "backlog_spikes": 0,
        }  # fmt: skip
        self.behind = 0
        self._poll_s = POLL_S if config.rig.priority == "auto" else SPARING_POLL_S
        self._unit_counts: Counter[int] = Counter()
        self._counted_ns = time.monotonic_ns()
        self._topic = {
            k: f"{k}.{self.info.name}" for k in ("spikes", "early", "mua", "gaps", "stim", "units")
        }
        self._gap_row = self._event_row = 0
        self.calibration = Recalibration(
            self.pipeline, self.cfg, link, config.rig.runtime, ring.path.stem, self.units_path,
            asked=self.pipeline.units is None and self.cfg.sorter != "none",
            not_before=ring.first_sample + self.info.samples(self.cfg.calibrate_after_s * 1000),
        )  # fmt: skip
        self.acting = Acting(config, self.info, session, link, self.publisher, self.pipeline, life)
        self._told_s = 0.0
        samples = self.info.samples
        self._heartbeat, self._second = samples(HEARTBEAT_MS), samples(1000)
        self._chunk_samples, self._max_chunk = samples(self.cfg.chunk_ms), samples(self.cfg.max_chunk_ms)
        self._start_reader(life)

    # ---- start -------------------------------------------------------------------------------------------------

    def _known_units(self) -> Units | None:
        """What this session found before, or what the configuration brings along."""
        if self.cfg.sorter == "none":
            return None
        matching = self.cfg.sorter == "templates"
        brought = self.cfg.templates if matching else self.cfg.sequences
        if brought == configuration.LIBRARY and not self.units_path.exists():
            return self._library_units()
        path = self.units_path if self.units_path.exists() else brought
        if path is None:
            return None
        units = Templates.load(path) if matching else Sequences.load(path)
        units.check(self.info)
        if path != self.units_path:
            shutil.copy2(path, self.units_path)
        if isinstance(units, Sequences):
            self._sequences_scaling = units.inference_scaling
        return units

    def _library_units(self) -> Templates | None:
        """The rig's library where it fits this stream; else a line that says why not, and calibration."""
        path = library_path(self.session, self.info.name)
        if not path.exists():
            why = f"{path} does not exist yet: it is made when a session has been sorted offline"
        else:
            try:
                units = Templates.load(path)
                units.check(self.info)
            except ConfigError as e:
                why = str(e)
            else:
                shutil.copy2(path, self.units_path)
                since = units.source.get("session", "a session")
                text = f"{len(units)} units of the rig's library, from {since}"
                self.link.tell("log", level="info", text=text)
                return units
        self.link.tell(
            "log", level="warning", text=f"the rig's library is not used, calibrating instead: {why}"
        )
        return None

    _sequences_scaling: float | None = None

    def _known_scaling(self) -> float | None:
        try:
            return float(json.loads(self.state_path.read_text(encoding="utf-8"))["scaling"])
        except (OSError, ValueError, KeyError):
            return self._sequences_scaling

    def _start_reader(self, life: int) -> None:
        """A restarted process re-reads what warms its filters up, and reports nothing twice."""
        self.reader = RingReader(self.ring, "live", reuse=True)
        self.emitted_until = max(self.ring.reader_position("live"), self.spool.last_sample + 1) if life else 0
        if life and self.ring.committed:
            back = self.emitted_until - self.info.samples(REWIND_MS)
            self.reader.skip_to(
                max(back, self.ring.oldest_sample + self.ring.capacity // 4, self.ring.first_sample)
            )
        self._blind_from = self._sent_until = self._covered = self.emitted_until if life else -1

    # ---- one chunk ---------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Process what is there, at least one chunk unless the stream has ended; False when there was not enough."""
        self.behind = self.reader.behind()
        chunk_n = self._chunk_samples
        if self.behind < (1 if self.ring.ended else chunk_n):
            return False
        if self._too_late():
            self._skip_ahead()
        n = min(max(self.behind // chunk_n, 1) * chunk_n, self._max_chunk)
        try:
            chunk = self.reader.read(n)
        except Overrun as e:
            self._hole(e.start, e.stop)
            return True
        if chunk is None:
            return False
        self._note_gaps()
        start = time.monotonic_ns()
        result = self._new(self.pipeline.process(chunk))
        steps = self.two_steps
        resolved = None if steps is None else steps.final(result.spikes, result.decided_until)
        self.acting.take(chunk, result)
        acted = time.monotonic_ns()
        self._publish(chunk, result)
        published = time.monotonic_ns()
        if steps is not None and resolved is not None:
            found = steps.early(
                self.pipeline.early(), result.spikes, result.decided_until, self.emitted_until
            )
            if len(found) or len(resolved):
                self._tell_early(found, resolved, {"arrival": chunk.arrival_ns, **result.stamps})
        self.acting.poll()
        self.pipeline.prepare()
        self.reader.position, position = (
            max(result.decided_until, self.ring.first_sample),
            self.reader.position,
        )
        self.reader.done()
        self.reader.position = position
        done = time.monotonic_ns()
        self.chunk_ms.add(np.array([(done - start) / 1e6]))
        if self._caught_up:
            self.stages.add(chunk.arrival_ns, start, *result.stamps.values(), acted, published, done)
        self.counters["chunks"] += 1
        return True

    patient = False  # a replay as fast as it goes waits for its readers: never skip
    _caught_up = False

    def _too_late(self) -> bool:
        """Whether what is waiting must be given up. After a start there is a backlog that the ring still holds: it is worked off."""
        limit = self.info.samples(self.cfg.skip_behind_ms)
        self._caught_up = self._caught_up or self.behind < limit // 4
        if not self._caught_up:
            limit = max(limit, self.ring.capacity * 6 // 10)
        return self.behind > limit and not self.patient

    def _skip_ahead(self) -> None:
        keep = self.info.samples(self.cfg.max_chunk_ms)
        self._hole(self.reader.position, self.ring.next_sample - keep)

    def _hole(self, start: int, stop: int) -> None:
        """Samples that were not looked at: published as blind, counted, and left behind."""
        start = min(start, stop)
        self.pipeline.skip(start, stop)
        self.reader.skip_to(stop)
        self.counters["skipped_samples"] += stop - start
        blind = np.array([(max(self._covered, 0), stop, -1, BLIND_REASONS.index("behind"))], BLIND)
        self.spool.blind(blind)
        self.blind_tally.add(blind)
        self.acting.blind(blind)
        now = time.monotonic_ns()
        header = {
            "first": max(self._sent_until, 0),
            "stop": stop,
            "behind": stop - start,
            "deadline_missed": True,
            "stamps": {"published": now},
        }
        self.publisher.send(self._topic["spikes"], header, spikes=np.zeros(0, SPIKE), blind=blind)
        self._sent_until = self._blind_from = stop
        self.link.tell(
            "log", level="warning", text=f"live path fell behind: samples {start} to {stop} were not sorted"
        )
        self._covered = stop

    def _note_gaps(self) -> None:
        """Tell new gaps and stimuli; what an earlier life of this process told is not told again."""
        if self.ring.count("gaps") == self._gap_row and self.ring.count("events") == self._event_row:
            return
        rows, self._gap_row, _ = self.ring.rows("gaps", self._gap_row)
        new = rows[rows["start"] >= self.emitted_until]
        if len(new):
            out = np.zeros(len(new), GAP)
            for name in ("start", "stop", "n_channels", "reason"):
                out[name] = new[name]
            self.publisher.send(
                self._topic["gaps"],
                {"first": int(out["start"].min()), "stop": int(out["stop"].max())},
                gaps=out,
            )
        for row in rows:
            if GAP_REASONS[row["reason"]] == "partial":
                self.pipeline.mark_missing(
                    int(row["start"]), int(row["stop"]), gap_mask(row, self.info.n_channels)
                )
        events, self._event_row, _ = self.ring.rows("events", self._event_row)
        stims = events[(events["kind"] <= 2) & (events["sample"] >= self.emitted_until)]
        if len(stims):
            self.acting.stims(stims)
            out = np.zeros(len(stims), STIM)
            for name in STIM.names or ():
                out[name] = stims[name]
            self.publisher.send(
                self._topic["stim"],
                {"first": int(out["sample"].min()), "stop": int(out["sample"].max()) + 1},
                stims=out,
            )

    # ---- out ---------------------------------------------------------------------------------------------------

    def _new(self, r: LiveResult) -> LiveResult:
        """Without what an earlier life of this process told."""
        if r.first_sample >= self.emitted_until + self._second:
            return r
        spikes, mua = (a[a["sample"] >= self.emitted_until] for a in (r.spikes, r.mua))
        self.counters["suppressed"] += len(r.spikes) - len(spikes)
        return r._replace(spikes=spikes, mua=mua)

    def _publish(self, chunk: Chunk, r: LiveResult) -> None:
        spikes, mua, blind = r.spikes, r.mua, self._blindness(r)
        beat = r.decided_until - self._sent_until >= self._heartbeat
        now = time.monotonic_ns()
        if len(spikes) or len(r.blind) or beat:
            waited = [(now - t) / 1e6 for t in self.reader.arrival_ns(spikes["sample"]).tolist()]
            late = (now - chunk.arrival_ns) / 1e6 > (self.cfg.deadline_ms or 2 * self.cfg.chunk_ms)
            self.counters["deadline_missed"] += late
            header: dict[str, Any] = {
                "first": max(self._sent_until, 0), "stop": r.decided_until, "behind": self.behind, "deadline_missed": bool(late),
                "stamps": {"arrival": chunk.arrival_ns, **r.stamps, "published": now},
            }  # fmt: skip
            if len(spikes):
                header["latency_ms"] = {
                    "n": len(waited),
                    "mean": sum(waited) / len(waited),
                    "max": max(waited),
                }
            self.publisher.send(self._topic["spikes"], header, spikes=spikes, blind=blind)
            self._sent_until, self._blind_from = r.decided_until, r.decided_until
            self.spool.blind(blind)
            self.blind_tally.add(blind)
            if self._caught_up:
                self.latency.add(np.array(waited))
            else:  # worked off after a start: late by the start, not by the path
                self.counters["backlog_spikes"] += len(spikes)
        self._covered = r.decided_until
        self._send_mua(mua, now)
        if len(spikes):
            self.spool.spikes(spikes)
            self.counters["spikes"] += len(spikes)
            self._unit_counts.update(spikes["unit"].tolist())

    def _tell_early(self, found: np.ndarray, resolved: np.ndarray, stamps: dict[str, int]) -> None:
        """EARLY records, and RESOLVED ones of earlier chunks: acted on, then published."""
        self.acting.early(found, resolved)
        now = time.monotonic_ns()
        header: dict[str, Any] = {"stamps": {**stamps, "published": now}}
        if len(found):
            waited = (now - self.reader.arrival_ns(found["sample"])) / 1e6
            header["latency_ms"] = {
                "n": len(waited),
                "mean": float(waited.mean()),
                "max": float(waited.max()),
            }
            if self._caught_up:
                self.early_latency.add(waited)
        self.publisher.send(self._topic["early"], header, early=found, resolved=resolved)

    def _blindness(self, r: LiveResult) -> np.ndarray:
        """Blind records of the message: what the pipeline saw, and everything before units were known."""
        if self.cfg.sorter == "none":
            return r.blind
        start = self._blind_from if self._blind_from >= 0 else r.first_sample
        known = self.pipeline.sorter is not None
        stop = min(r.decided_until, self._sorted_from) if known else r.decided_until
        if stop <= start:
            return r.blind
        row = np.array([(start, stop, -1, BLIND_REASONS.index("uncalibrated"))], BLIND)
        return np.concatenate([r.blind, row])

    _sorted_from = 0  # the first sample that was looked at with known units

    _mua: list[np.ndarray] = []  # noqa: RUF012 - replaced on the first append
    _mua_sent_ns = 0

    def _send_mua(self, mua: np.ndarray, now: int) -> None:
        if len(mua):
            self._mua = [*self._mua, mua.copy()]
            self.counters["mua"] += len(mua)
        if self._mua and now - self._mua_sent_ns > MUA_MS * 1e6:
            batch = np.concatenate(self._mua)
            self.publisher.send(self._topic["mua"], {"stop": self._covered}, spikes=batch)
            self.spool.spikes(batch)
            self._mua, self._mua_sent_ns = [], now

    def _use(self, units: Units) -> None:
        """Swap at this chunk boundary and tell everybody."""
        if self.pipeline.sorter is None:
            self._sorted_from = self.reader.position
        self.pipeline.swap(units)
        self.acting.use(units)
        self.counters["calibrations"] += 1
        rows, about = self._tell_units(units, self.reader.position)
        self.spool.units(rows)
        self.link.tell("calibrated", units=len(units), from_sample=self.reader.position, **about)
        if isinstance(units, Templates):
            for line in expectation_lines(units):
                self.link.tell("log", level="info", text=line)

    def _tell_units(self, units: Units, from_sample: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Publish the units in use; as told: records of dtype UNIT, and the header's fields."""
        rows = np.zeros(len(units), UNIT)
        rows["unit"], rows["channel"] = units.unit_ids, units.roots
        rows["x_um"], rows["y_um"] = self.info.positions[units.roots].T if len(units) else (0, 0)
        rows["amplitude_uv"], rows["rate_hz"] = units.root_amplitude_uv, units.rate_hz
        about: dict[str, Any] = {
            "sorter": self.cfg.sorter,
            "id_confidence": [round(float(c), 3) for c in units.id_confidence],
        }
        if isinstance(units, Templates):
            about["expected"] = units.expected
        self.publisher.send(self._topic["units"], {"from_sample": from_sample, **about}, units=rows)
        return rows, about

    # ---- the loop ----------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        """What the supervisor commands; an emergency stop must not wait."""
        while command := self.link.next_command():
            if self.acting.answer(command):
                continue
            if command.get("op") == "calibrate":
                self.calibration.ask(self.reader.position)
            elif command.get("op") == "cancel_calibration":
                self.calibration.cancel()
            elif command.get("op") == "lost":
                span = int(command["start"]), int(command["stop"])
                gap = np.array([(*span, self.info.n_channels, GAP_REASONS.index("lost"))], GAP)
                self.publisher.send(self._topic["gaps"], {"first": span[0], "stop": span[1]}, gaps=gap)

    def _housekeeping(self) -> None:
        now = time.monotonic()
        if now - self._told_s < TELL_S:
            return
        self._told_s = now
        self.calibration.advance(self._use)
        self._tell_doubts()
        self.spool.flush()
        gc.collect(0)
        if self.pipeline.scaling is not None and not self.state_path.exists():
            self.state_path.write_text(json.dumps({"scaling": self.pipeline.scaling}), encoding="utf-8")
        self._tell()

    def _tell_doubts(self) -> None:
        """An alarm per unit, once, when it is no longer what was calibrated."""
        sorter = self.pipeline.sorter
        if not isinstance(sorter, TemplateSorter):
            return
        now = set(sorter.doubtful.tolist())
        for unit in sorted(now - self._doubted):
            text = f"unit {unit} of {self.info.name} no longer looks as calibrated; calibrate again before relying on it"
            self.link.tell("log", level="warning", text=text)
        self.acting.engine.rules.doubt(now)
        self._doubted = now

    _doubted: set[int] = set()  # noqa: RUF012 - replaced, never changed

    def _rates(self) -> dict[int, float]:
        """Spikes per second of each unit since the last call."""
        now = time.monotonic_ns()
        seconds, self._counted_ns = (now - self._counted_ns) / 1e9, now
        rates = {unit: round(n / seconds, 2) for unit, n in sorted(self._unit_counts.items())}
        self._unit_counts = Counter(dict.fromkeys(self._unit_counts, 0))
        return rates

    def _tell(self, event: str = "progress") -> None:
        covered = max(self._covered - self.ring.first_sample, 0)
        self.link.tell(
            event, rates_hz=self._rates(), samples=covered, behind=self.behind, stages=self.stages.told(self.latency), blind=self.blind_tally.told(covered),
            units=len(self.pipeline.units or ()), doubtful=sorted(self._doubted), latency_ms=self.latency.summary(), chunk_compute_ms=self.chunk_ms.summary(),
            act=self.acting.summary(), counters={**self.counters, **self.publisher.counters, "told_dropped": self.link.dropped},
            early=self._early_told(),
        )  # fmt: skip

    def _early_told(self) -> dict[str, Any]:
        """Of decisions in two steps: how many were told early, and what became of them; empty where there are none."""
        if self.two_steps is None:
            return {}
        return {**self.two_steps.counters, "latency_ms": self.early_latency.summary()}

    def run(self) -> None:
        """Until the ring has ended and is drained; a calibration that is not done by then is given up."""
        self.pipeline.warm_up()
        self.acting.engine.rules.warm_up()
        gc.collect()
        gc.freeze()
        gc.disable()  # collected by _housekeeping, where no sample waits for it
        if self.pipeline.units is not None:  # brought along, or found before a restart
            self._tell_units(self.pipeline.units, self.reader.position)
        endpoints = {**self.publisher.endpoints, "run": self.publisher.run}
        self.link.tell("ready", endpoints=endpoints, network=self.network.name, sha256=self.network.sha256)
        while not (self.link.orphaned and self.ring.forsaken):
            if not self.step():
                if self.ring.ended and self.reader.behind() == 0:
                    break
                time.sleep(self._poll_s)
                self.acting.poll()
            self._obey()
            self._housekeeping()
        self._finish()

    def _finish(self) -> None:
        rest = self.pipeline.flush()
        resolved = None if self.two_steps is None else self.two_steps.final(rest, END)
        if len(rest):
            self.publisher.send(
                self._topic["spikes"], {"first": self._sent_until, "stop": self.reader.position}, spikes=rest
            )
            self.spool.spikes(rest)
            self.counters["spikes"] += len(rest)
        if resolved is not None and len(resolved):
            self._tell_early(NO_EARLY, resolved, {})
        if self._mua:
            self.spool.spikes(np.concatenate(self._mua))
        self.calibration.close()
        self.acting.close()
        self.spool.close()
        self._tell()
        summary = {
            "latency_ms": self.latency.summary(),
            "chunk_compute_ms": self.chunk_ms.summary(),
            "counters": self.counters,
            **({"early": early} if (early := self._early_told()) else {}),
        }
        (self.session / f"{self.info.name}.latency.json").write_text(json.dumps(summary), encoding="utf-8")
        self._tell("done")


def main(args: argparse.Namespace, link: Link) -> None:
    config = configuration.load(args.session / "session.toml")
    torch.set_num_threads(config.live.threads)
    load_kernels(highpass=config.live.highpass_hz > 0)  # while the stream is still waited for
    ring = wait_for_ring(args.ring, link)
    if ring is None:
        return
    raise_priority("live_network", config.rig.priority)  # for the publisher's threads, which start now
    live = Live(config, ring, args.session, link, args.life)
    got = raise_priority("live", config.rig.priority)
    link.tell("log", level="info", text=f"live runs at {got} priority")
    stream = next(s for s in config.stream if s.name == args.stream)
    live.patient = stream.source == "replay" and stream.speed == 0
    try:
        live.run()
    finally:
        live.publisher.close(LAST_WORDS_S)


__all__ = ["SPIKE", "Live", "load_network", "main", "pick_device"]
