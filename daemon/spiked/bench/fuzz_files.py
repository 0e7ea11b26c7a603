"""What reads files, with whole ones to begin from."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from spiked.bench.fuzz import Decoder, Message
from spiked.bench.fuzz_seeds import CHANNELS, FS, WEIGHTS, spikes
from spiked.errors import ConfigError, OfflineError, RecordingError
from spiked_client import access
from spiked_client.errors import AccessError
from spiked_client.protocol import LEDGER


def _file(
    path: Path,
    seeds: list[bytes],
    read: Callable[[Path], Any],
    name: str,
    errors: tuple[type[BaseException], ...],
) -> Decoder:
    """A decoder of a file's content."""

    def feed(frames: Message) -> None:
        path.write_bytes(b"".join(frames))
        path.chmod(0o600)
        read(path)

    return Decoder(name, [[s] for s in seeds], feed, errors, WEIGHTS.get(name, 1.0))


def configuration(folder: Path) -> Decoder:
    from spiked import config

    full = config.parse({
        "stream": [{"name": "a", "source": "maxwell"}, {"name": "b", "source": "openephys", "stim_lines": [1]}],
        "output": [{"name": "o", "kind": "zmq", "address": "tcp://127.0.0.1:5580"}],
        "trigger": [{"name": "t", "when": "sequence", "units": [1, 2], "intervals_ms": [[1, 5]], "stream": "a", "output": "o"}],
    })  # fmt: skip
    texts = [
        config.dump(full).encode(),
        b'[[stream]]\nname = "x"\nsource = "replay"\npath = "r"\n[live]\ncalibrate_s = 5\n',
    ]
    return _file(folder / "rig.toml", texts, config.load, "configuration", (ConfigError,))


def _keys() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def access_list(folder: Path) -> Decoder:
    entries = (
        access.Entry("anna", "control", key=_keys()[0]),
        access.Entry("wall", "watch", token_sha256=access.hash_token("t")),
    )
    return _file(
        folder / "access.toml",
        [access.dump_access(entries).encode()],
        lambda p: access.read_access(p.parent),
        "access list",
        (AccessError,),
    )


def key_file(folder: Path) -> Decoder:
    key = access.ClientKey("anna", "watch", _keys()[0], *_keys())
    return _file(folder / "anna.key", [key.dump().encode()], access.load_key, "key file", (AccessError,))


def task(_folder: Path) -> Decoder:
    from spiked.offline.task import Task

    seeds = [
        Task(
            ("/data/a.nwb", "/data/b.nwb"),
            "/data/out",
            "",
            {"well": 1, "fs_hz": 20000.0},
            {"sorter": "kilosort4"},
        ).dump()
    ]

    def feed(frames: Message) -> None:
        found = Task.load(b"".join(frames).decode("utf-8", "replace"))
        found.key, found.name, found.folder, found.is_session, found.dump()

    return Decoder("task", [[s.encode()] for s in seeds], feed, (OfflineError,))


def stream_description(_folder: Path) -> Decoder:
    from spiked.stream import StreamInfo

    info = StreamInfo(
        "s", FS, ("a", "b"), ((0.0, 1.0), (2.0, 3.0)), "int16", (1.0, 2.0), annotations={"x": [1]}
    )

    def feed(frames: Message) -> None:
        found = StreamInfo.from_json(b"".join(frames))
        found.positions, found.samples(1.0), found.same_wire(info)

    return Decoder("stream description", [[info.to_json().encode()]], feed, (ConfigError,))


def superblock(_folder: Path) -> Decoder:
    from spiked.record import superblock as block

    head = bytearray(block.SIGNATURE + bytes([3, 8, 8, 5]) + bytes(block.SIZE - 16))
    seed = bytes(head[:44]) + block.lookup3(bytes(head[:44])).to_bytes(4, "little")

    def feed(frames: Message) -> None:
        block.parse(b"".join(frames), Path("x")).cleared(4096)

    return Decoder("superblock", [[seed]], feed, (RecordingError,))


def electrode_map(folder: Path) -> Decoder:
    from spiked.sources.electrode_map import read_electrode_map

    return _file(
        folder / "m.cfg",
        [b"0(1000)17.5/35;1(1001)35/35;\n2(1002)5.25e1/35;"],
        read_electrode_map,
        "electrode map",
        (ConfigError,),
    )


def probe_file(folder: Path) -> Decoder:
    import probeinterface

    from spiked.sources.probe import positions_for

    probe = probeinterface.generate_linear_probe(num_elec=CHANNELS)
    probe.set_device_channel_indices(np.arange(CHANNELS))
    path = folder / "seed.json"
    probeinterface.write_probeinterface(path, probe)
    return _file(
        folder / "p.json",
        [path.read_bytes()],
        lambda p: positions_for(p, CHANNELS),
        "probe file",
        (ConfigError,),
    )


def ledger(folder: Path) -> Decoder:
    from spiked.act.ledger import read
    from spiked.act.report import summary

    records = np.zeros(4, LEDGER)
    records["number"], records["rule"], records["outcome"], records["reason"] = (
        [1, 2, 2, 3],
        b"r",
        [5, 0, 4, 5],
        [0, 0, 1, 0],
    )
    records["sent_ns"], records["ack_ns"] = 10, 20
    return _file(
        folder / "s.ledger.bin", [records.tobytes()], lambda p: json.dumps(summary(read(p), FS)), "ledger", ()
    )


def spool(folder: Path) -> Decoder:
    from spiked.live.spool import Spool

    def read(path: Path) -> None:
        one = Spool(path.parent, "f")
        one.close()

    return _file(folder / "f.spikes.bin", [spikes(20).tobytes()], read, "spool", ())


def state_file(folder: Path) -> Decoder:
    from spiked.service import unfinished

    seed = json.dumps({"state": "recording", "pid": 4_000_000, "started": "2026-01-01T00:00:00", "error": ""})
    return _file(folder / "state.json", [seed.encode()], unfinished, "state file", ())


def redo_log(folder: Path) -> Decoder:
    import struct
    import zlib

    from spiked.record import edit

    body = edit.HEAD.pack(edit.MAGIC, 4096, 8192, 1) + struct.pack("<qi", 0, 16) + bytes(16)
    victim = folder / "victim.nwb"

    def feed(frames: Message) -> None:
        log = b"".join(frames)
        if log[:1] != b"!":  # as if the sum had been right: what is in it must still make sense
            log = log[:-4] + struct.pack("<I", zlib.crc32(log[:-4]))
        victim.write_bytes(bytes(4096))
        edit.redo_path(victim).write_bytes(log)
        edit.replay(victim)

    return Decoder(
        "redo log",
        [[body + struct.pack("<I", zlib.crc32(body))]],
        feed,
        (RecordingError,),
        WEIGHTS["redo log"],
    )


def sequences(folder: Path) -> Decoder:
    from spiked.sort.parameters import RTSortParameters
    from spiked.sort.sequences import Sequences

    n, of_each = np.ones(2, np.float32), np.ones(3)
    one = Sequences(
        FS, ("0", "1", "2", "3"), np.zeros((4, 2)), 1.0, 0.0, RTSortParameters(), unit_ids=np.arange(2), roots=np.array([0, 2]),
        root_amp_mean=n, root_amp_sd=n, root_amplitude_uv=-n, min_loose=n, min_inner=n, n_spikes=n, rate_hz=n, ptr=np.array([0, 2, 3]),
        electrode=np.array([0, 1, 2]), latency=of_each, latency_sd=of_each, amp=of_each, amp_sd=of_each,
        prob=of_each, flags=of_each,
    )  # fmt: skip
    one.save(folder / "seed.sequences.h5")
    return _hdf5(folder / "x.sequences.h5", folder / "seed.sequences.h5", Sequences.load, "sequences")


def templates(folder: Path) -> Decoder:
    from spiked.templates.library import Templates

    n = np.ones(2, np.float32)
    one = Templates(
        FS, ("0", "1"), np.zeros((2, 2)), np.tile([1.0, 0, 0, 1, 0, 0], (1, 1)), np.ones(3), np.eye(2), 4, np.eye(2, 8), np.arange(2), np.array([0, 1]),
        -n, n, n, n, n, n, n, np.array([0, 1, 2]), np.array([0, 1]), np.ones((2, 2)), np.array([0, 1, 2]), np.array([0, 1]), np.ones((2, 10)),
    )  # fmt: skip
    one.save(folder / "seed.templates.h5")
    return _hdf5(folder / "x.templates.h5", folder / "seed.templates.h5", Templates.load, "templates")


def _hdf5(path: Path, seed: Path, load: Callable[[Path], Any], name: str) -> Decoder:
    """A reader of HDF5: messages are the file's content as JSON, from which a sound file is made. The format is libhdf5's affair."""
    import h5py

    with h5py.File(seed, "r") as f:
        attributes = {k: v.item() if isinstance(v, np.generic) else v for k, v in f.attrs.items()}
        content = {"attributes": attributes, "datasets": {k: v[()].tolist() for k, v in f.items()}}

    def feed(frames: Message) -> None:
        try:
            told = json.loads(b"".join(frames))
            with h5py.File(path, "w") as f:
                for k, v in told["attributes"].items():
                    f.attrs[k] = v
                for k, v in told["datasets"].items():
                    f[k] = v
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RuntimeError):
            return  # no file can say that
        with np.errstate(all="ignore"):
            load(path)

    return Decoder(name, [[json.dumps(content).encode()]], feed, (ConfigError,), WEIGHTS[name])


def session_file(folder: Path) -> Decoder:
    """A session's NWB file in which something is other than it should be: `spiked recover`, and whoever reads recordings."""
    import shutil

    import h5py

    from spiked import config
    from spiked.errors import SpikedError
    from spiked.record.recover import recover
    from spiked.record.writer import SessionWriter
    from spiked.ring import Ring, RingWriter
    from spiked.sources.recordings import open_recording
    from spiked.stream import EventKind, StreamEvent, StreamInfo

    positions = tuple((0.0, 20.0 * c) for c in range(CHANNELS))
    info = StreamInfo(
        "s", FS, tuple(map(str, range(CHANNELS))), positions, "int16", (1.0,) * CHANNELS, source="maxwell"
    )
    ring = Ring.create(folder / "s.ring", info, 1.0)
    writer = RingWriter(ring)
    writer.start_at(1000)
    writer.write(np.ones((4000, CHANNELS), np.int16), 5)
    writer.add_gap(2000, 2100, "lost")
    writer.add_event(StreamEvent(1500, EventKind.STIM, 0, 1, 0.0, "p"))
    ring.end()
    settings = config.parse({"stream": [{"name": "s", "source": "maxwell"}], "record": {"min_free_gb": 0.0}})
    with warnings.catch_warnings():  # pynwb's own
        warnings.simplefilter("ignore")
        SessionWriter(folder / "s.nwb", ring, settings, session_id="x").run()
    names: list[str] = []
    with h5py.File(folder / "s.nwb", "r") as f:
        f.visit(names.append)
    path = folder / "x.nwb"

    def feed(frames: Message) -> None:
        shutil.copy(folder / "s.nwb", path)
        with h5py.File(path, "r+") as f:
            _disturb(f, names, random.Random(b"".join(frames)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in (recover, _whole_recording):
                with suppress(SpikedError):
                    read(path)

    def _whole_recording(path: Path) -> None:
        with open_recording(path) as recording:
            recording.read(0, min(100, recording.n_samples))
            len(recording.invalid), len(recording.events)

    return Decoder("session file", [[b"s.nwb"]], feed, (), WEIGHTS["session file"])


def _disturb(f: Any, names: list[str], rng: random.Random) -> None:
    """Some objects or attributes of an HDF5 file gone, cut short, or replaced by something else."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(names)
        strange = rng.choice(
            (
                0,
                -1,
                1 << 62,
                1e300,
                float("nan"),
                "x",
                b"\xff",
                np.zeros(0),
                np.zeros((2, 3), "<i8"),
                [b"a", b"b"],
                np.full(9, -5),
                7.5,
            )
        )
        with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RuntimeError):
            item, attributes = f[name], list(f[name].attrs)
            what = rng.randrange(5)
            if what == 0:
                del f[name]
            elif what == 1 and attributes:
                del item.attrs[rng.choice(attributes)]
            elif what == 2 and attributes:
                item.attrs[rng.choice(attributes)] = strange
            elif what == 3 and hasattr(item, "shape") and item.shape:
                short, kept = item[: rng.randrange(len(item) + 1)], dict(item.attrs)
                del f[name]
                f[name] = short
                f[name].attrs.update(kept)
            else:
                kept = dict(item.attrs)
                del f[name]
                f[name] = strange
                f[name].attrs.update(kept)
