"""One TOML file <-> one typed configuration. Unknown keys and wrong types are refused by name."""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spiked.criteria import bounds
from spiked.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)

Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free port
Positive = Annotated[float, Field(gt=0)]


class Rig(Section):
    """The rig computer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] = "rig"  # in session names and MQTT topics
    sessions: Path = Path("~/spiked-sessions")  # where session folders go
    runtime: Path = Path("/dev/shm")  # tmpfs for the rings
    # auto: real-time for acquire, record and live where allowed; normal: none, and less processor for 0.5 ms more of latency
    priority: Literal["auto", "normal"] = "auto"
    # run --daemon: record when samples come, again after a crash; or only when `spiked start` asks for it
    begin: Literal["samples", "asked"] = "samples"
    lab: str = ""  # this and the next three go into the session files (NWB)
    institution: str = ""
    experimenter: str = ""
    description: str = ""


class Subject(Section):
    """Who is on the rig; NWB wants it."""

    id: str = "unknown"
    species: str = "Mus musculus"
    sex: Literal["M", "F", "U", "O"] = "U"
    age: str = "P1D/"  # ISO 8601 duration or range
    description: str = ""


class Stream(Section):
    """One probe, array or well."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]  # in topics and file names
    source: Literal["openephys", "maxwell", "spikeglx", "replay"]
    address: str = ""  # tcp://host:port; default: the program's own port on this machine
    path: Path | None = None  # replay: file or folder
    speed: Annotated[float, Field(ge=0)] = 1.0  # replay: 1 = real time, 0 = as fast as it goes
    fs_hz: Positive | None = None  # maxwell: 20000 unless told; others say it themselves
    probe: Path | None = None  # probeinterface JSON
    electrode_map: Path | None = None  # maxwell: a MaxLab .cfg or a .raw.h5 with the same routing
    gain: Positive = 512  # maxwell: amplifier gain
    well: Annotated[int, Field(ge=0)] = 0  # maxwell: which one, where several share the port
    device: Literal["imec", "onebox", "nidq"] = "imec"  # spikeglx: whose samples
    probe_index: Annotated[int, Field(ge=0)] = 0  # spikeglx: which of them; `spiked discover` lists them
    uv_per_bit: Literal["auto", "float"] | Positive = (
        "auto"  # openephys: "float" stores the float32 as they come
    )
    rail_uv: Positive | None = (
        None  # openephys: samples that far from 0 are clipped; else only where int16 ends
    )
    stim_lines: tuple[int, ...] = ()  # openephys, spikeglx: 0-based TTL lines that mean a stimulus
    sync_line: Annotated[int, Field(ge=0)] | None = (
        None  # TTL line of pulses that all streams get; spikeglx tells it
    )
    spikes: bool = True  # false: recorded only, sorted neither live nor offline
    heartbeat: bool = False  # openephys: talk to the plugin's REP socket (kills a headless GUI)
    wait_s: Positive = 30.0  # how long to wait for the first sample
    silence_s: Positive = 10.0  # how long the stream may stop before the session ends
    queue_mb: Positive = 2048  # what may wait in memory between socket and ring

    @model_validator(mode="after")
    def _complete(self) -> Stream:
        if self.source == "replay" and self.path is None:
            raise ValueError("source = 'replay' needs path = '...'")
        if self.address and not self.address.startswith(("tcp://", "ipc://")):
            raise ValueError(f"address {self.address!r} must look like tcp://127.0.0.1:5556")
        return self


class Ring(Section):
    """Shared memory between the processes of a stream."""

    seconds: Positive = 20.0  # how long a process may be away without loss


class Record(Section):
    """The session file."""

    enabled: bool = True  # false: nothing is kept
    flush_ms: Positive = 100.0  # what a kill of everything may cost
    fsync_ms: Positive = 1000.0  # what a power cut may cost
    min_free_gb: Annotated[float, Field(ge=0)] = 1.0  # the session ends cleanly below this


class Live(Section):
    """The live path."""

    enabled: bool = True  # false: recorded only
    network: str = "auto"  # name of a shipped network, or a folder in the published RT-Sort format
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: Annotated[int, Field(ge=1)] = 1  # cores for the detection network
    precision: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # of the network; auto: the fastest here
    )
    gate: bool = True  # run the network only where a sentinel, learned while calibrating, foresees detections
    chunk_ms: Positive = 1.0  # what is taken at once
    max_chunk_ms: Positive = 50.0  # when behind, this much is taken at once
    skip_behind_ms: Positive = 2000.0  # further behind than this: skip ahead and publish the hole as blind
    deadline_ms: Positive | None = None  # default: two chunks
    highpass_hz: Annotated[float, Field(ge=0)] = 0.0  # causal first-order high-pass for broadband streams
    reference: Literal["none", "median"] = "none"
    sorter: Literal["templates", "rt_sort", "none"] = "templates"
    # Who finds the units whose templates are learned; auto: lupin where SpikeInterface is installed, else rt_sort.
    templates_from: Literal["auto", "lupin", "tridesclous2", "spykingcircus2", "kilosort4", "rt_sort"] = (
        "auto"
    )
    calibrate_s: Positive = 120.0  # how much is listened to before units are found
    calibrate_after_s: Annotated[float, Field(ge=0)] = 1.0
    sequences: Path | None = None  # a saved .sequences.h5: sort from the first second
    # A saved .templates.h5, for sorter = "templates"; "library": the rig's own, of its last session sorted offline.
    templates: Path | Literal["library"] | None = None
    early: bool = False  # templates: tell spikes 0.8 ms before they are final too, and what became of each
    stringent_p: Annotated[float, Field(gt=0, lt=1)] | None = None  # default: the network's card
    loose_p: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _sorter_of_the_units(cls, data: Any) -> Any:
        """Units that are brought along say which sorter runs, unless that is said too."""
        if (
            isinstance(data, dict)
            and "sorter" not in data
            and data.get("sequences")
            and not data.get("templates")
        ):
            return {**data, "sorter": "rt_sort"}
        return data

    @model_validator(mode="after")
    def _units_fit_the_sorter(self) -> Live:
        if self.sequences and self.sorter == "templates":
            raise ValueError('sequences are for RT-Sort; set sorter = "rt_sort", or give templates instead')
        if self.templates and self.sorter == "rt_sort":
            raise ValueError(
                'templates are not for RT-Sort; set sorter = "templates", or give sequences instead'
            )
        if self.early and self.sorter == "rt_sort":
            raise ValueError(
                'early needs sorter = "templates": what RT-Sort decides is final at once; remove early'
            )
        return self


class Output(Section):
    """A way to a stimulator. Nothing goes over it before a rule is armed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
    kind: Literal["zmq", "network_events", "oe_message", "maxlab", "spikeglx", "serial"]
    address: str = ""  # default: that program's own port on this machine; serial: /dev/ttyACM0
    timeout_ms: Positive = 100.0  # a command without an answer for so long has failed
    # What a pattern is called there: a TTL line (network_events), a text (oe_message), a sequence (maxlab),
    # digital lines (spikeglx), a byte (serial). zmq and maxlab take those that are not listed by their name.
    patterns: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")], str | int] = {}
    pulse_ms: Annotated[float, Field(ge=0)] = 1.0  # network_events, spikeglx: the line is lowered after this
    baud: Annotated[int, Field(gt=0)] = 115_200  # serial
    echo: bool = False  # serial: the device answers every byte with the same byte

    @model_validator(mode="after")
    def _complete(self) -> Output:
        if self.kind == "serial" and not self.address:
            raise ValueError("kind = 'serial' needs address = '/dev/...'")
        named = self.kind in ("zmq", "maxlab")
        if not named and not self.patterns:
            raise ValueError(f"kind = {self.kind!r} needs patterns = {{ NAME = ... }}")
        return self


class Stim(Section):
    """Stimulation artifacts: how they are taken out of the live stream."""

    enabled: bool = True  # clean after every stimulus that is marked
    detect: bool = False  # look for stimuli in the data too: steep deflections of many channels at once
    template: bool = True  # learn each pattern's artifact per channel
    half_window_ms: Annotated[float, Field(ge=0.5, le=5)] = 3.0  # of the sliding cubic: the delay then
    timeout_ms: Positive = 50.0  # a channel that cannot be cleaned this long after a pulse is left as it is
    longest_ms: Positive = 250.0  # cleaning ends this long after the last stimulus, whatever is left


class Publish(Section):
    """ZeroMQ ports. Beyond loopback only with keys."""

    keys: Path | None = None  # folder of `spiked keys init`: only clients of its access list, encrypted
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: all of this computer's
    peers: Annotated[int, Field(ge=1, le=4096)] = 128  # clients of each port
    live_port: Port = (
        5570  # PUB: spikes, mua, blind, gaps of the first stream; the next streams take +20, +40 ...
    )
    replay_port: Port = 5571  # ROUTER: missed ranges
    control_port: Port = 5572  # ROUTER: requests
    health_port: Port = 5573  # PUB: health, session
    replay_messages: Annotated[int, Field(ge=16, le=1_000_000)] = 4096
    hwm: Annotated[int, Field(ge=16, le=100_000)] = 10_000  # messages that wait for a slow client

    def of_stream(self, index: int) -> tuple[int, int]:
        """PUB and ROUTER port of a stream, by its place among the streams; 0: any that is free."""
        live, replay = (port and port + 20 * index for port in (self.live_port, self.replay_port))
        return live, replay

    @field_validator("host")
    @classmethod
    def _guarded(cls, host: str, others: ValidationInfo) -> str:
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            raise ValueError(
                "is no address; give one of this computer's, or 0.0.0.0 for all of them"
            ) from None
        if not loopback and others.data.get("keys") is None:
            raise ValueError(
                "reaches beyond this computer and needs keys; run `spiked keys init` and set publish.keys to its folder"
            )
        return host


class Mqtt(Section):
    """A broker that is told status, events, rates and alarms."""

    enabled: bool = False  # true: connect
    host: str = "127.0.0.1"
    port: Port = 1883  # 8883 is usual with TLS
    prefix: Annotated[str, Field(pattern=r"^[^#+\s]+$")] = "spiked"  # topics are prefix/rig/...
    username: str | None = None
    password_file: Path | None = None
    commands: bool = False  # obey start, stop and mark from whoever the broker lets; the emergency stop is heard in any case
    tls: bool = False
    ca_file: Path | None = None  # who signed the broker's certificate; default: the system's authorities
    cert_file: Path | None = None  # of this rig, where the broker wants one
    key_file: Path | None = None

    @model_validator(mode="after")
    def _complete(self) -> Mqtt:
        if not self.tls and (self.ca_file or self.cert_file or self.key_file):
            raise ValueError(
                "certificates are for TLS; set tls = true, or remove ca_file, cert_file and key_file"
            )
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; give both or neither")
        return self


LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Metrics(Section):
    """Figures for Prometheus: http://host:port/metrics."""

    enabled: bool = False
    host: str = "127.0.0.1"
    port: Port = 9464
    # Beyond this computer only with TLS and a token (Prometheus: `authorization: credentials_file:`).
    cert_file: Path | None = None
    key_file: Path | None = None
    token_file: Path | None = None

    @model_validator(mode="after")
    def _complete(self) -> Metrics:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; give both or neither")
        if self.host not in LOOPBACK and not (self.cert_file and self.token_file):
            raise ValueError(
                f"host = {self.host!r} is beyond this computer: give cert_file, key_file and token_file too"
            )
        return self


class Web(Section):
    """The page for browsers, served by a process of its own."""

    enabled: bool = False
    host: str = "127.0.0.1"
    port: Port = 5575
    # Beyond this computer only with TLS and tokens (`spiked keys`).
    cert_file: Path | None = None
    key_file: Path | None = None
    access: Path | None = None  # folder with access.toml; default beyond this computer: publish.keys
    client_key: Path | None = (
        None  # with which the page's server asks the daemon; default: local.key in publish.keys
    )

    @model_validator(mode="after")
    def _complete(self) -> Web:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together; give both or neither")
        if self.host not in LOOPBACK and not self.cert_file:
            raise ValueError(f"host = {self.host!r} is beyond this computer: give cert_file and key_file too")
        return self


class Lsl(Section):
    """Lab Streaming Layer outlets: spikes, rates and markers, by a process of its own (`spiked lsl`)."""

    enabled: bool = False


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,32}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class Act(Section):
    """Stimulation: the limits that every command obeys, whoever asks for it, for all streams of a session together."""

    max_per_s: Annotated[int, Field(ge=0)] = 50  # stimuli in any one second
    max_count: Annotated[int, Field(ge=0)] = 10_000  # stimuli in the session
    lockout_ms: Annotated[float, Field(ge=0)] = 5.0  # after any stimulus, also one seen from elsewhere
    max_nc_per_pulse: Positive | None = 3.0  # nanocoulomb per phase, where amplitude and width are known
    max_nc_per_s: Positive | None = 150.0
    late_ms: Positive = 20.0  # a spike older than this when it is decided on triggers nothing
    expected_ms: Annotated[float, Field(ge=0)] = 1.0  # from a command to its artifact, until some were seen
    artifact_ms: Positive = 50.0  # a stimulus seen within this after a command is that command's
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0  # of probability and sham_fraction


Number = Annotated[int, Field(ge=0, lt=1 << 31)]  # of a unit or a channel
Millis = Annotated[float, Field(le=3_600_000)]


class Trigger(Section):
    """One rule: when to stimulate, and what."""

    name: Name
    when: Literal["unit", "count", "rate", "sequence", "burst", "python"]
    stream: str = ""  # needed where there are several
    units: tuple[Number, ...] = ()  # any of them; for a sequence in their order; for a burst none means all
    count: Annotated[int, Field(ge=1, le=4096)] | None = None  # spikes within window_ms
    rate_hz: Annotated[float, Field(gt=0, le=1e6)] | None = None  # of all the units together, over window_ms
    share: Annotated[float, Field(gt=0, le=1)] | None = None  # burst: of the units, each at least once
    window_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    intervals_ms: tuple[tuple[Millis, Millis], ...] = ()  # sequence: least and most between each two spikes
    call: str = ""  # python: module:function, or path/to/file.py:function
    budget_ms: Positive = 0.5  # python: per batch of spikes
    refractory_ms: Annotated[float, Field(ge=0, le=86_400_000)] = 0.0  # between two decisions of this rule
    delay_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0  # from the trough of the last trigger spike
    probability: Share = 1.0
    sham_fraction: Share = 0.0  # decided and recorded, not sent
    blind: Literal["ignore", "array", "units"] = "units"  # while which electrodes see nothing: no stimulus
    least_confidence: Share = 0.0  # id_confidence of every trigger unit
    least_accuracy: Share = 0.0  # accuracy expected of every trigger unit
    block_doubtful: bool = True  # units that no longer look as calibrated trigger nothing
    early: bool = False  # act before the order of the last spikes is final, and on early ones (live.early)
    output: str = ""  # name of an [[output]]; none: decisions are recorded, nothing can be sent
    pattern: Name = "default"  # what the output is asked for
    electrodes: tuple[Number, ...] = ()
    amplitude_ua: Annotated[float, Field(gt=0, le=1e6)] | None = None
    width_us: Annotated[float, Field(gt=0, le=1e7)] | None = None  # of one phase
    pulses: Annotated[int, Field(ge=1, le=1_000_000)] = 1  # of one stimulus, for the charge per second

    @model_validator(mode="after")
    def _complete(self) -> Trigger:
        needed = {
            "unit": ("units",), "count": ("units", "count", "window_ms"), "rate": ("units", "rate_hz", "window_ms"),
            "sequence": ("units", "intervals_ms"), "burst": ("window_ms",), "python": ("call",),
        }[self.when]  # fmt: skip
        missing = [k for k in needed if not getattr(self, k)]
        if missing:
            raise ValueError(f"a trigger when = '{self.when}' needs {' and '.join(missing)}")
        if self.when == "burst" and (self.count is None) == (self.share is None):
            raise ValueError("a burst needs either count (spikes) or share (of the units)")
        if self.when == "sequence" and not (
            2 <= len(self.units) <= 8 and len(self.intervals_ms) == len(self.units) - 1
        ):
            raise ValueError("a sequence has 2 to 8 units and one interval less than units")
        if any(not 0 <= low <= high for low, high in self.intervals_ms):
            raise ValueError("an interval is [least, most] in ms, neither negative")
        if self.call and not all(self.call.rpartition(":")[::2]):
            raise ValueError("call is module:function or path/to/file.py:function")
        return self

    @property
    def charge_nc(self) -> float | None:
        """Of one phase, nanocoulomb; None where amplitude or width are not known."""
        if self.amplitude_ua is None or self.width_us is None:
            return None
        return self.amplitude_ua * self.width_us / 1000


class Guards(Section):
    """What is watched before and while the sorter works; 0 turns a guard off."""

    memory_percent: Annotated[float, Field(ge=0, le=100)] = 92.0  # of the computer's memory in use
    gpu_memory_percent: Annotated[float, Field(ge=0, le=100)] = 98.0
    gpu_celsius: Annotated[float, Field(ge=0)] = 90.0
    disk_gb: Annotated[float, Field(ge=0)] = 1.0  # least free space where the results go
    stall_s: Annotated[float, Field(ge=0)] = 900.0  # neither computing nor reading nor writing
    silent_s: Annotated[float, Field(ge=0)] = 3600.0  # computing without a sign of progress
    canary_s: Annotated[float, Field(ge=0)] = 10.0  # the sorter is tried on so much first
    canary_from_s: Annotated[float, Field(ge=0)] = 300.0  # of recordings at least this long


class Labels(Section):
    """What makes a unit good, in the lab's own words; without criteria our own rules decide."""

    criteria: dict[
        str, str
    ] = {}  # {"firing_rate": ">= 0.05", "contamination": "<= 10 %"}, names of spiked.criteria
    combine: Literal["replace", "and", "or"] = "replace"  # with what Kilosort says of the unit

    @model_validator(mode="after")
    def _criteria(self) -> Labels:
        bounds(self.criteria)
        return self


class Slay(Section):
    """Which units are merged after sorting. auto: the autoencoder where a session is long and rich enough, else l2."""

    similarity: Literal["auto", "autoencoder", "l2", "spikeinterface", "none"] = "auto"
    parameters: Literal["auto", "manual"] = "auto"  # auto: k1, k2 and threshold from units split on purpose
    k1: Annotated[float, Field(ge=0)] = 0.25  # weight of the correlogram
    k2: Annotated[float, Field(ge=0)] = 1.0  # weight of the refractory penalty
    threshold: float = 0.5  # pairs with a higher score are merged
    min_similarity: Annotated[float, Field(gt=0, le=1)] = 0.4
    max_distance_um: Positive = 100.0  # between peak electrodes
    max_contamination: Annotated[float, Field(gt=0, lt=1)] = 0.15
    window_ms: Annotated[float, Field(ge=20)] = 100.0  # of the correlograms
    bin_ms: Annotated[float, Field(gt=0, lt=2)] = 0.5
    split_share: Annotated[float, Field(gt=0, le=1)] = 0.4  # of the units are split on purpose
    channels: Annotated[int, Field(ge=1, le=64)] = 8  # electrodes that the autoencoder sees
    retrain: bool = False  # although a network for this probe and animal is there
    censor_ms: Annotated[float, Field(ge=0)] = 0.3  # spikes closer than this are one after a merge
    apply: Literal["merge", "suggest"] = "merge"  # suggest: for SpikeInterface-GUI and Phy only


class Offline(Section):
    """What runs when the session ends."""

    enabled: bool = True  # false: sessions are not sorted when they end
    sorter: Literal["kilosort4", "rt_sort", "templates", "dartsort", "kilosort2"] = "kilosort4"
    preset: str = "auto"  # named parameters; `spiked sorters NAME` lists them
    params: dict[str, Any] = {}  # of the sorter, over the preset's
    curate: bool = True  # merges, labels and quality metrics after the sorter
    labels: Labels = Labels()
    slay: Slay = Slay()
    library: bool = True  # keep the curated units beside the sessions, for live.templates = "library"
    phy: bool = True  # a folder for Phy with the curated units, beside the sorter's own
    device: str = "auto"
    nice: Annotated[int, Field(ge=0, le=19)] = 15
    timeout_s: Positive = 24 * 3600.0  # a job that takes longer has failed
    memory_gb: Annotated[float, Field(ge=0)] = 0.0  # what the sorter may allocate; 0: no limit
    retries: Annotated[int, Field(ge=0, le=5)] = (
        2  # after running out of memory, each with half the batch_size
    )
    guards: Guards = Guards()


class Config(Section):
    """Everything `spiked run` needs."""

    rig: Rig = Rig()
    subject: Subject = Subject()
    stream: tuple[Stream, ...]
    ring: Ring = Ring()
    record: Record = Record()
    live: Live = Live()
    stim: Stim = Stim()
    output: tuple[Output, ...] = ()
    publish: Publish = Publish()
    mqtt: Mqtt = Mqtt()
    metrics: Metrics = Metrics()
    web: Web = Web()
    lsl: Lsl = Lsl()
    act: Act = Act()
    trigger: tuple[Trigger, ...] = ()
    offline: Offline = Offline()

    @model_validator(mode="after")
    def _streams(self) -> Config:
        if not self.stream:
            raise ValueError("at least one [[stream]] is needed")
        names = [s.name for s in self.stream]
        if len(set(names)) != len(names):
            raise ValueError(f"stream names must differ: {', '.join(names)}")
        outputs = [o.name for o in self.output]
        if len(set(outputs)) != len(outputs):
            raise ValueError(f"output names must differ: {', '.join(outputs)}")
        rules = [t.name for t in self.trigger]
        if len(set(rules)) != len(rules):
            raise ValueError(f"trigger names must differ: {', '.join(rules)}")
        users: dict[str, str] = {}
        for t in self.trigger:
            self.check_trigger(t)
            of = t.stream or names[0]
            if t.output and users.setdefault(t.output, of) != of:
                raise ValueError(
                    f"triggers of {users[t.output]} and of {of} name the output {t.output}; each stream needs an [[output]] of its own"
                )
        return self

    @model_validator(mode="after")
    def _page(self) -> Config:
        if self.web.enabled and self.web.host not in LOOPBACK and not (self.web.access or self.publish.keys):
            raise ValueError("web beyond this computer needs access, a folder of `spiked keys init`")
        return self

    def check_trigger(self, t: Trigger) -> None:
        """ValueError unless the stream and the output that it names exist."""
        streams, outputs = [s.name for s in self.stream], [o.name for o in self.output]
        if t.stream not in streams and (t.stream or len(streams) > 1):
            raise ValueError(f"trigger {t.name} must name its stream: {', '.join(streams)}")
        if not all(s.spikes for s in self.stream if s.name == (t.stream or streams[0])):
            raise ValueError(f"trigger {t.name}: stream {t.stream or streams[0]} has spikes = false")
        if t.output and t.output not in outputs:
            raise ValueError(f"trigger {t.name}: no [[output]] is named {t.output}")

    def triggers_of(self, stream: str) -> tuple[Trigger, ...]:
        return tuple(t for t in self.trigger if t.stream in ("", stream))

    def outputs_of(self, stream: str) -> tuple[Output, ...]:
        """Those that the stream's triggers name; the first sorted stream also has those that none names."""
        first = next((s.name for s in self.stream if s.spikes), "")
        named = {t.output: t.stream or self.stream[0].name for t in self.trigger}
        return tuple(o for o in self.output if named.get(o.name, first) == stream)


def _meant(kind: type[Section], loc: tuple[int | str, ...]) -> str:
    """What to do about an unknown key at `loc` in a configuration of `kind`."""
    for part in loc[:-1]:
        if isinstance(part, str):
            found = kind.model_fields[part].annotation
            inside = [a for a in (found, *get_args(found)) if isinstance(a, type) and issubclass(a, Section)]
            kind = inside[0]
    near = difflib.get_close_matches(str(loc[-1]).lower(), kind.model_fields, 1, 0.6)
    return f"did you mean {near[0]}?" if near else "remove it or check its spelling"


def _explain(e: ValidationError, where: str, kind_of: type[Section]) -> str:
    errors = e.errors()  # a misspelt key before the one that is missing for it
    first = next((x for x in errors if x["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(p) for p in first["loc"]) or "the file"
    kind, more = first["type"], f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
    if kind == "extra_forbidden":
        return f"{where}: unknown key {key}; {_meant(kind_of, first['loc'])}{more}"
    if kind == "missing":
        return f"{where}: {key} is missing; add it{more}"
    value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"{where}: {key}{value}: {first['msg'].removeprefix('Value error, ')}{more}"


def parse(data: dict[str, Any], where: str = "configuration") -> Config:
    """A typed configuration, or ConfigError naming the first key that is wrong."""
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e, where, Config)) from e


def checked(kind: type[S], data: dict[str, Any], where: str) -> S:
    """One section alone, or ConfigError naming the first key that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e, where, kind)) from e


LIBRARY = "library"  # value of live.templates
PATHS = {
    "rig": ("sessions",),
    "live": ("sequences", "templates", "network"),
    "publish": ("keys",),
    "mqtt": ("password_file", "ca_file", "cert_file", "key_file"),
    "metrics": ("cert_file", "key_file", "token_file"),
    "web": ("cert_file", "key_file", "access", "client_key"),
    "stream": ("path", "probe", "electrode_map"),
    "trigger": ("call",),
    "offline.params": ("probe", "sequences", "templates", "network"),
}


def _make_absolute(data: dict[str, Any], base: Path) -> None:
    """Paths in the file are relative to it; the processes that read the session's copy find them elsewhere."""
    for name, keys in PATHS.items():
        found: Any = data
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        for section in found if isinstance(found, list) else [found]:
            for key in keys:
                value = section.get(key) if isinstance(section, dict) else None
                if not isinstance(value, str) or (key == "call" and ".py:" not in value):
                    continue
                try:
                    there = base / Path(value).expanduser()
                except RuntimeError as e:
                    raise ConfigError(
                        f"{name}.{key} = {value!r}: nobody here has that home folder; write the whole path"
                    ) from e
                named = key == "network" and not there.is_dir()  # one that ships
                if not named and (key, value) != ("templates", LIBRARY):
                    section[key] = str(there)


def load(path: Path | str) -> Config:
    """Read a TOML file; relative paths inside it are relative to the file."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; give the rig's TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from e
    _make_absolute(data, path.parent.absolute())
    return parse(data, str(path))


def toml_value(v: Any) -> str:
    """As it stands in a TOML file."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, int | float):
        return repr(v)
    if isinstance(v, list | tuple):
        return "[" + ", ".join(toml_value(x) for x in v) + "]"
    if isinstance(v, dict):
        return "{" + ", ".join(f"{_key(k)} = {toml_value(x)}" for k, x in v.items()) + "}"
    return json.dumps(str(v), ensure_ascii=False).replace("\x7f", "\\u007f")  # its escapes are TOML's


def _key(k: str) -> str:
    return k if re.fullmatch("[A-Za-z0-9_-]+", k) else toml_value(k)


def dump(config: Config) -> str:
    """The configuration as TOML: `load` of it gives the same configuration."""
    out = []
    for name, section in config.model_dump(mode="json").items():
        for title, body in (
            [(f"[{name}]", section)] if isinstance(section, dict) else [(f"[[{name}]]", s) for s in section]
        ):
            out.append(title)
            out += [f"{k} = {toml_value(v)}" for k, v in body.items() if v is not None]
            out.append("")
    return "\n".join(out)
