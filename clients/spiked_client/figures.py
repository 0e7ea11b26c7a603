"""What the numbers of the health message are called, when they are good and when they are bad, and what to do then.

One table, `FIGURES`, for everybody: the Prometheus endpoint, MQTT alarms, the colours of the monitors, the alert rules and
docs/metrics.md. Reading is pure: `figure.read(status)` gives (label values, value) pairs of one health message and bears any
field missing. Standard library only.

A figure is judged by its value, by how much a counter grew within a minute ("increase"), or by the 99th percentile of the
last minute of a histogram ("p99"). Up to `good` it is good, from `bad` on it is bad, between them it is a warning; where
`good` is above `bad` it is the low values that are bad. Without `bad` it never gets worse than a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

PREFIX = "spiked_"
ACTIVE = ("starting", "recording", "stopping")  # states of a session in which its streams run
STATES = ("idle", *ACTIVE, "finalizing", "queued", "offline", "done", "failed")
CALIBRATION = ("collecting", "calculating", "done", "failed", "cancelled")
JOBS = ("queued", "running", "done", "failed", "cancelled")

Kind = Literal["gauge", "counter", "histogram"]
Status = dict[str, Any]
Labels = tuple[str, ...]
Found = Iterable[tuple[Labels, Any]]


@dataclass(frozen=True)
class Figure:
    """One metric. A histogram's value is {"n": counts per bin, "sum": of all, "edges": upper edges of the bins but the last}."""

    name: str
    kind: Kind
    labels: Labels
    about: str
    read: Callable[[Status], Found]
    good: float | None = None
    bad: float | None = None
    todo: str = ""
    alarm: bool = True  # False: coloured and listed, but nobody is called for it
    room: str = ""

    @property
    def judged_by(self) -> str:
        return {"gauge": "value", "counter": "increase", "histogram": "p99"}[self.kind]

    @property
    def exposed(self) -> str:
        """The name Prometheus sees."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    def level(self, value: float) -> Literal["good", "warning", "bad"]:
        """What to think of the judged number."""
        if self.good is None or value != value:  # not a number: nothing is known
            return "good"
        low_is_bad = self.bad is not None and self.bad < self.good
        if value >= self.good if low_is_bad else value <= self.good:
            return "good"
        if self.bad is None:
            return "warning"
        return "bad" if (value <= self.bad if low_is_bad else value >= self.bad) else "warning"


# ---- reading a status that may lack anything -----------------------------------------------------------------------


def _map(d: Any, *path: str) -> dict[Any, Any]:
    for key in path:
        d = d.get(key) if isinstance(d, dict) else None
    return d if isinstance(d, dict) else {}


def number(x: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(x, bool) or not isinstance(x, int | float) or x != x or abs(x) == float("inf"):
        return None
    return x


def _numbers(x: Any) -> bool:
    return isinstance(x, list) and all(number(v) is not None for v in x)


def streams(status: Status) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and map of each stream."""
    for name, stream in _map(status, "streams").items():
        if isinstance(stream, dict):
            yield str(name), stream


def active(status: Status) -> bool:
    """Whether the streams run, so that their gauges mean something."""
    return status.get("state") in ACTIVE


def process(stream: dict[str, Any], role: str) -> dict[str, Any]:
    """What a process of the stream told last."""
    return _map(stream, "processes", role)


def hours_left(status: Status) -> float | None:
    """Until the disk is full at the present rate; None while nothing is recorded."""
    per_s = 0.0
    for _, s in streams(status):
        row, fs = number(process(s, "acquire").get("row_bytes")), number(s.get("fs_hz"))
        if "record" in _map(s, "processes") and row and fs:
            per_s += row * fs
    free = number(status.get("disk_free_gb"))
    return None if not per_s or free is None or not active(status) else free * 1e9 / per_s / 3600


def _told(role: str, *path: str, while_active: bool = False) -> Callable[[Status], Found]:
    """A number of one process of each stream."""

    def read(status: Status) -> Found:
        if not while_active or active(status):
            for name, s in streams(status):
                value = number(_map(process(s, role), *path[:-1]).get(path[-1]))
                if value is not None:
                    yield (name,), value

    return read


def _each(role: str, *path: str) -> Callable[[Status], Found]:
    """A map of numbers of one process of each stream, by its keys."""

    def read(status: Status) -> Found:
        for name, s in streams(status):
            for key, value in _map(process(s, role), *path).items():
                if number(value) is not None:
                    yield (name, str(key)), value

    return read


def _stream(key: str, scale_by_rate: bool = False) -> Callable[[Status], Found]:
    def read(status: Status) -> Found:
        for name, s in streams(status):
            value, fs = number(s.get(key)), number(s.get("fs_hz"))
            if value is not None and not (scale_by_rate and not fs):
                yield (name,), value / fs if scale_by_rate and fs else value

    return read


def _top(*path: str) -> Callable[[Status], Found]:
    def read(status: Status) -> Found:
        value = _map(status, *path[:-1]).get(path[-1])
        value = int(value) if isinstance(value, bool) else number(value)
        if value is not None:
            yield (), value

    return read


def _stage(role: str, name: str) -> Callable[[Status], Found]:
    """A histogram that a process told."""

    def read(status: Status) -> Found:
        for stream, s in streams(status):
            stages = _map(process(s, role), "stages")
            edges, told = stages.get("edges_ms"), _map(stages, name)
            n, total = told.get("n"), number(told.get("sum"))
            if not isinstance(edges, list) or not isinstance(n, list) or total is None:
                continue
            if _numbers(edges) and _numbers(n) and len(n) == len(edges) + 1:
                yield (stream,), {"n": n, "sum": total, "edges": edges}

    return read


def _one_of(
    states: tuple[str, ...], of: Callable[[Status], Iterable[tuple[Labels, Any]]]
) -> Callable[[Status], Found]:
    """1 for the state it is in, 0 for the others."""

    def read(status: Status) -> Found:
        for labels, now in of(status):
            for state in states:
                yield (*labels, state), int(state == now)

    return read


def _calibrations(status: Status) -> Iterator[tuple[Labels, dict[str, Any]]]:
    for name, s in streams(status):
        told = s.get("calibration")
        if isinstance(told, dict):
            yield (name,), told


def _ring(status: Status) -> Iterator[tuple[Labels, float, float, float]]:
    """(stream, reader), samples behind, capacity, sampling rate; of the streams that run."""
    for name, s in streams(status) if active(status) else ():
        ring, fs = _map(process(s, "acquire"), "ring"), number(s.get("fs_hz"))
        capacity = number(ring.get("capacity"))
        for reader, behind in _map(ring, "behind").items():
            if capacity and fs and number(behind) is not None:
                yield (name, str(reader)), behind, capacity, fs


def _publishers(status: Status) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sockets and bridges, with their counters."""
    for name, counters in _map(status, "ports").items():
        yield str(name), _map(counters)
    for name, s in streams(status):
        counters = _map(process(s, "live"), "counters")
        yield f"live.{name}", {k: v for k, v in counters.items() if k in PUBLISHER or k.startswith("refused")}


PUBLISHER = ("sent", "dropped", "replay_requests", "replayed", "gone", "malformed", "unsent")
UNWANTED = ("malformed", "refused", "busy", "unknown", "oversized", "too_")


def _sockets(status: Status) -> Found:
    for name, counters in _publishers(status):
        for what, n in counters.items():
            if number(n) is not None:
                yield (name, str(what)), n


def _unwanted(status: Status) -> Found:
    for name, counters in _publishers(status):
        yield (name,), sum(number(n) or 0 for what, n in counters.items() if str(what).startswith(UNWANTED))


def _ratio(role: str, part: str, whole: str) -> Callable[[Status], Found]:
    def read(status: Status) -> Found:
        for name, s in streams(status) if active(status) else ():
            some, all_ = process(s, role).get(part), number(process(s, role).get(whole))
            if isinstance(some, list) and all_:
                yield (name,), len(some) / all_

    return read


def _clock_error(status: Status) -> Found:
    for name, s in streams(status) if active(status) else ():
        clock = _map(process(s, "acquire"), "clock")
        ppm, error = number(clock.get("ppm")), number(clock.get("ppm_error"))
        if ppm is not None and error is not None and error < 10:
            yield (name,), abs(ppm)


def _aligned(key: str, while_active: bool = False) -> Callable[[Status], Found]:
    """A number of the clocks of several streams, as they are aligned with each other."""

    def read(status: Status) -> Found:
        for name, s in streams(status) if active(status) or not while_active else ():
            value = number(_map(s, "clock").get(key))
            if value is not None:
                yield (name,), value

    return read


def _behind_ms(status: Status) -> Found:
    for name, s in streams(status) if active(status) else ():
        behind, fs = number(process(s, "live").get("behind")), number(s.get("fs_hz"))
        if behind is not None and fs:
            yield (name,), 1000 * behind / fs


def _running(status: Status) -> Found:
    if status.get("state") == "recording":
        for name, s in streams(status):
            for role in _map(s, "processes"):
                yield (name, str(role)), int(role in _map(s, "pids"))


def _restarts(status: Status) -> Found:
    for name, s in streams(status):
        for role, n in _map(s, "lives").items():
            if number(n) is not None:
                yield (name, str(role)), n


def _recorder_lost(status: Status) -> Found:
    for name, s in streams(status):
        lost = process(s, "record").get("lost")
        if isinstance(lost, list):
            yield (name,), sum(x[1] - x[0] for x in lost if _numbers(x) and len(x) == 2)


def _armed(status: Status) -> Found:
    for name, s in streams(status):
        armed = _map(process(s, "live"), "act").get("armed")
        if isinstance(armed, list):
            yield (name,), len(armed)


def _failed(status: Status) -> Found:
    for name, s in streams(status):
        act = _map(process(s, "live"), "act")
        if act:
            yield (name,), number(_map(act, "decisions").get("failed")) or 0


def _stopped(status: Status) -> Found:
    for name, s in streams(status):
        act = _map(process(s, "live"), "act")
        if "stopped" in act:
            yield (name,), int(bool(act["stopped"]))


def _gpus(key: str, of: str = "") -> Callable[[Status], Found]:
    def read(status: Status) -> Found:
        told = status.get("gpus")
        for gpu in told if isinstance(told, list) else ():
            value, whole = number(_map(gpu).get(key)), number(_map(gpu).get(of)) if of else 1.0
            if value is not None and whole:
                yield (str(gpu.get("index", "?")),), value / whole

    return read


def _beside(name: str) -> Callable[[Status], Found]:
    """Whether a process that reads the public protocol beside the daemon runs."""

    def read(status: Status) -> Found:
        told = _map(status, name)
        if "pid" in told:
            yield (), int(told["pid"] is not None)

    return read


def _cpu(status: Status) -> Found:
    for name, seconds in _map(status, "cpu").items():
        if number(seconds) is not None:
            yield (str(name),), seconds


def _jobs(status: Status) -> Found:
    told = _map(status, "jobs")
    for state in JOBS if any(state in told for state in JOBS) else ():
        yield (state,), number(told.get(state)) or 0


def _jobs_ended(status: Status) -> Found:
    for how, n in _map(status, "jobs", "ended").items():
        if number(n) is not None:
            yield (str(how),), n


def _jobs_failed(status: Status) -> Found:
    ended = _map(status, "jobs", "ended")
    if ended:
        yield (), sum(number(ended.get(kind)) or 0 for kind in ("environment", "resource"))


def _job_progress(status: Status) -> Found:
    now = _map(status, "jobs").get("now")
    for job in now if isinstance(now, list) else ():
        overall = number(_map(job).get("overall"))
        if overall is not None:
            yield (str(job.get("session", "?")),), overall


def _alarms(status: Status) -> Found:
    told = status.get("alarms")
    levels = [_map(a).get("level") for a in told] if isinstance(told, list) else []
    for level in ("warning", "bad"):
        yield (level,), levels.count(level)


def _if_some(read: Callable[[Status], float | None]) -> Callable[[Status], Found]:
    def some(status: Status) -> Found:
        value = read(status)
        if value is not None:
            yield (), value

    return some


def _in(room: str, *figures: Figure) -> tuple[Figure, ...]:
    return tuple(replace(f, room=room) for f in figures)


# ---- the table -----------------------------------------------------------------------------------------------------

_S, _SP = ("stream",), ("stream", "process")
_G: Kind = "gauge"
_C: Kind = "counter"
_H: Kind = "histogram"
_SOURCE = "Look at cables, at the acquisition program's own losses and at this computer's load; every loss is in the file as a gap."
_SLOW = "Look for other load on the computer, then for `live.threads`, a faster network (`live.network`), fewer channels or a GPU."

FIGURES: tuple[Figure, ...] = (
    *_in(
        "session",
    Figure("session_state", _G, ("state",), "1 for the state that the session is in.", _one_of(STATES, lambda s: [((), s.get("state"))])),
    Figure("session_error", _G, (), "1 when the session has an error to tell.", lambda s: [((), int(bool(s.get("error"))))],
           0, 1, "`spiked status` says which; the line ends with what to do."),
    Figure("alarms", _G, ("level",), "Alarms that stand, by level.", _alarms),
    Figure("process_running", _G, _SP, "1 while a process of the stream runs, during recording.", _running,
           1, 0, "It is restarted up to five times a minute; if it stays away see STREAM.PROCESS.stderr in the session folder."),
    Figure("process_restarts", _C, _SP, "How often a process of the stream died and was restarted.", _restarts,
           0, 1, "See STREAM.PROCESS.stderr in the session folder; send it with a report."),
    Figure("process_cpu_seconds", _C, ("process",), "CPU time that each process has used.", _cpu),
    ),
    *_in(
        "acquire",
    Figure("samples", _C, _S, "Samples (of all channels at once) received since the session began, gaps included.", _stream("samples")),
    Figure("recorded_seconds", _G, _S, "Length of the session so far, by the stream's own clock.", _stream("samples", scale_by_rate=True)),
    Figure("channels", _G, _S, "Channels of the stream.", _stream("channels")),
    Figure("gaps", _C, _S, "Gaps: stretches of samples that never arrived.", _stream("gaps"), 0, 10, _SOURCE),
    Figure("gap_samples", _C, _S, "Samples that never arrived.", _stream("gap_samples")),
    Figure("source_messages", _C, ("stream", "what"), "What the source and the integrity check counted: messages, malformed, lost_messages, "
           "duplicate_samples, partial_samples, resets and more.", _each("acquire", "counters")),
    Figure("source_malformed", _C, _S, "Messages of the acquisition program that could not be read.", _told("acquire", "counters", "malformed"),
           0, 100, "Compare the versions of the acquisition program and of spiked; see README, On a rig."),
    Figure("source_resets", _C, _S, "How often the device's sample counter went back or jumped.", _told("acquire", "counters", "resets"),
           0, 3, "Acquisition was stopped and started, or a file loops."),
    Figure("acquire_ms", _H, _S, "From the arrival of a message to its samples being in the ring, oldest message of a batch.", _stage("acquire", "acquire"),
           20, 200, "The computer is overloaded: look for other load, and whether `rig.priority` could be had (log.jsonl says)."),
    Figure("ring_fill_ratio", _G, ("stream", "reader"), "Part of the ring that a reader has still to take.",
           lambda s: [(at, behind / capacity) for at, behind, capacity, _ in _ring(s)], 0.25, 0.7,
           "A reader is too slow; at 1 it loses samples. record: the disk. live: see live_behind_ms. `ring.seconds` buys time."),
    Figure("reader_behind_ms", _G, ("stream", "reader"), "How old the oldest sample is that a reader has still to take.",
           lambda s: [(at, 1000 * behind / fs) for at, behind, _, fs in _ring(s)], 1000, 5000, "As ring_fill_ratio."),
    Figure("sample_rate_hz", _G, _S, "Sampling rate as measured by this computer's clock.", _told("acquire", "clock", "fs_hz", while_active=True)),
    Figure("clock_ppm", _G, _S, "How much faster than nominal the device's clock runs, parts per million.", _told("acquire", "clock", "ppm", while_active=True)),
    Figure("clock_error_ppm", _G, _S, "Size of that, once it is known to 10 ppm.", _clock_error,
           100, 500, "The configured rate is wrong, or samples are lost without being told. Crystals differ by less than 100 ppm."),
    Figure("clock_offset_error_ms", _G, _S, "How surely this stream's samples are placed in the first stream's time (docs/decisions/0012).", _aligned("error_ms", while_active=True),
           10, 100, "Give all streams the same sync pulses (`sync_line`)."),
    Figure("clock_steps", _C, _S, "Jumps of a stream's clock against the first stream's.", _aligned("steps"),
           0, 1, "Samples were lost or repeated without being told: look at the cables and at the acquisition program's own log."),
    ),
    *_in(
        "record",
    Figure("record_ms", _H, _S, "To take what the ring holds, write it and flush it.", _stage("record", "record"),
           100, 1000, "The disk is slow: `spiked doctor` measures it. Use a local disk for `rig.sessions`."),
    Figure("record_lost_samples", _C, _S, "Samples that the recorder lost because the ring lapped it; zeros in the file.", _recorder_lost,
           0, 1, "The disk stood still for longer than `ring.seconds`: use a faster one or a longer ring."),
    Figure("recorded_bytes", _G, _S, "Bytes of samples in the session file.", _told("record", "bytes")),
    Figure("disk_free_gb", _G, (), "Free space where sessions go.", _top("disk_free_gb"), 20, 2, "Delete or move old sessions; below `record.min_free_gb` the session ends."),
    Figure("disk_hours_left", _G, (), "Until that disk is full, at the streams' data rate.", _if_some(hours_left), 12, 1, "Delete or move old sessions."),
    ),
    *_in(
        "live",
    Figure("live_wait_ms", _H, _S, "From a chunk's arrival to the start of work on it.", _stage("live", "wait"), 2, 20, _SLOW, alarm=False),
    Figure("live_clean_ms", _H, _S, "Filter, reference and artifact removal, per chunk; with detection, where stages overlap.", _stage("live", "clean"), 0.5, 5, _SLOW, alarm=False),
    Figure("live_detect_ms", _H, _S, "The detection network, per chunk.", _stage("live", "detect"), 1, 5, _SLOW, alarm=False),
    Figure("live_sort_ms", _H, _S, "Assignment to units, per chunk.", _stage("live", "sort"), 1, 5, _SLOW, alarm=False),
    Figure("live_act_ms", _H, _S, "Trigger rules and commands, per chunk.", _stage("live", "act"), 0.5, 5, "A rule in Python, or an output; see `budget_ms`.", alarm=False),
    Figure("live_publish_ms", _H, _S, "Encoding and sending, per chunk.", _stage("live", "publish"), 0.5, 5, _SLOW, alarm=False),
    Figure("live_chunk_ms", _H, _S, "All of the work on a chunk.", _stage("live", "chunk"), 2, 20, _SLOW),
    Figure("spike_latency_ms", _H, _S, "Per spike: from the arrival of the chunk that held its trough to its publication.", _stage("live", "spike"), 10, 50, _SLOW),
    Figure("live_behind_ms", _G, _S, "Samples that wait for the live path.", _behind_ms, 20, 500, _SLOW),
    Figure("live_skipped_samples", _C, _S, "Samples that the live path gave up to catch up; published as blind, recorded all the same.",
           _told("live", "counters", "skipped_samples"), 0, 1, _SLOW),
    Figure("live_deadline_missed", _C, _S, "Published chunks that took longer than the deadline.", _told("live", "counters", "deadline_missed"), 60, 600, _SLOW),
    Figure("live_chunks", _C, _S, "Chunks the live path has worked on.", _told("live", "counters", "chunks")),
    Figure("spikes", _C, _S, "Sorted spikes published.", _told("live", "counters", "spikes")),
    Figure("early_spikes", _C, ("stream", "fate"), "Spikes told before they were final: told, confirmed, withdrawn.", _each("live", "early")),
    Figure("mua", _C, _S, "Unsorted detections published.", _told("live", "counters", "mua")),
    Figure("unit_rate_hz", _G, ("stream", "unit"), "Rate of each unit over the last half second.", lambda s: _each("live", "rates_hz")(s) if active(s) else ()),
    Figure("units", _G, _S, "Units in use.", _told("live", "units")),
    Figure("doubtful_units_ratio", _G, _S, "Part of the units that no longer look as calibrated.", _ratio("live", "doubtful", "units"),
           0.05, 0.25, "`spiked calibrate`; the probe may have moved."),
    Figure("calibration_state", _G, ("stream", "state"), "1 for the state of the last calibration.",
           _one_of(CALIBRATION, lambda s: [(at, c.get("state")) for at, c in _calibrations(s)])),
    Figure("calibration_failed", _G, _S, "1 when the last calibration failed.", lambda s: [(at, int(c.get("state") == "failed")) for at, c in _calibrations(s)],
           0, 1, "log.jsonl says why; `spiked calibrate` tries again."),
    Figure("calibration_ratio", _G, _S, "How far the calibration is.",
           lambda s: [(at, c["fraction"]) for at, c in _calibrations(s) if number(c.get("fraction")) is not None]),
    Figure("blind_samples", _C, ("stream", "reason"), "Samples in which spikes could not be seen; an interval on some channels counts for its share.", _each("live", "blind", "samples")),
    Figure("blind_ratio", _G, _S, "Part of the last ten seconds that was blind, for other reasons than missing units.", _told("live", "blind", "ratio", while_active=True),
           0.05, 0.5, "The reasons are in blind_samples: gap (see gaps), clipped (amplifier or reference), artifact (stimulation), behind (see live_behind_ms)."),
    ),
    *_in(
        "act",
    Figure("stim_decisions", _C, ("stream", "outcome"), "Decisions to stimulate: sent, dry, sham, chance, refused, failed, lost.", _each("live", "act", "decisions")),
    Figure("stim_refused", _C, ("stream", "reason"), "Stimuli that were refused, by reason.", _each("live", "act", "refusals")),
    Figure("stim_failed", _C, _S, "Commands that the stimulator did not carry out.", _failed,
           0, 3, "`spiked report` and the ledger say which; check the [[output]] and its program."),
    Figure("stim_armed", _G, _S, "Rules that are armed.", _armed),
    Figure("stim_stopped", _G, _S, "1 after the emergency stop, until it is cleared.", _stopped, 0, None, "Somebody pulled it: log.jsonl says who. Clear it with clear_stop."),
    ),
    *_in(
        "offline",
    Figure("jobs", _G, ("state",), "Offline jobs by state.", _jobs),
    Figure("jobs_waiting", _G, (), "Offline jobs that wait.", _top("jobs", "queued"), 10, 100, "`spiked jobs`; sessions come faster than they are sorted."),
    Figure("jobs_ended", _C, ("how",), "Jobs that ended since the daemon began: done, cancelled, or failed for biology, environment or resource.", _jobs_ended),
    Figure("jobs_failed", _C, (), "Of these, the ones that failed for the environment or a resource.", _jobs_failed, 0, 1, "`spiked jobs` says why and what to do; `spiked jobs retry` when it is done."),
    Figure("job_ratio", _G, ("session",), "How far the running job is.", _job_progress),
    ),
    *_in(
        "out",
    Figure("socket_events", _C, ("socket", "what"), "What each socket counted: sent, dropped, requests, refused, malformed and more.", _sockets),
    Figure("unwanted_messages", _C, ("socket",), "Malformed, refused and oversized messages of clients.", _unwanted,
           10, 1000, "Somebody sends what is not understood or not allowed: an old client, a wrong key, a scan of the network."),
    Figure("mqtt_connected", _G, (), "1 while the broker listens.", _top("mqtt", "connected"), 1, 0, "Look at the broker, the network and the password; the log has the line."),
    Figure("mqtt_outbox", _G, (), "Events that wait for the broker.", _top("mqtt", "waiting"), 100, 900, "The broker is away or slow; the oldest are dropped first."),
    Figure("mqtt_dropped", _C, (), "Events that the broker never got.", _top("mqtt", "dropped"), 0, 1, "As mqtt_outbox; log.jsonl has them all."),
    Figure("web_running", _G, (), "1 while the page's server runs.", _beside("web"), 1, 0, "See web.stderr beside the sessions; it is started again by itself."),
    Figure("web_restarts", _C, (), "How often the page's server was started again.", _top("web", "lives")),
    Figure("lsl_running", _G, (), "1 while the Lab Streaming Layer bridge runs.", _beside("lsl"), 1, 0, "The daemon's log has its last words; it is started again by itself."),
    Figure("lsl_restarts", _C, (), "How often that bridge was started again.", _top("lsl", "lives")),
    ),
    *_in(
        "gpu",
    Figure("gpu_memory_ratio", _G, ("gpu",), "GPU memory in use.", _gpus("memory_used_mb", "memory_mb"), 0.85, 0.97, "End other programs on the GPU; offline jobs wait by themselves."),
    Figure("gpu_celsius", _G, ("gpu",), "GPU temperature.", _gpus("celsius"), 80, 90, "Clean its air path; it slows down when it is hot."),
    Figure("gpu_busy_ratio", _G, ("gpu",), "Part of the time that the GPU computed.", _gpus("busy_ratio")),
    ),
)  # fmt: skip

BY_NAME = {f.name: f for f in FIGURES}
