"""`spiked simulate`: a recording, or a synthetic one with known spikes, served as a device would serve it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError
from spiked.priority import raise_priority
from spiked.sources import simulate_stim_inputs
from spiked.sources.simulate import Cycle, Faults, Sent, Signal, Stored, Synthetic, make_wire, serve
from spiked.sources.simulate_sync import SyncPulses
from spiked.sources.wire_spikeglx import gain_uv
from spiked.stream import StreamInfo

PORTS = {"openephys": 5556, "maxwell": 7204, "spikeglx": 4142}
MAXWELL_GAIN = 512
MAXWELL_LSB_UV = 3.3e6 / 1024 / MAXWELL_GAIN
CYCLE_S = 2.0  # of --cycle: this much is made once and served over and over


def options(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--wire", choices=sorted(PORTS), default="maxwell")
    p.add_argument("--address", help="where to serve; default: the program's own port on this machine")
    p.add_argument("--recording", type=Path, help="serve this instead of synthetic cells")
    p.add_argument("--stream", help="which stream of the recording, where it has several")
    p.add_argument("--name", default="sim", help="name of the stream")
    p.add_argument(
        "--electrodes", default="6x6", help="RxC grid of 17.5 um, or a number of Neuropixels sites"
    )
    p.add_argument("--fs-hz", type=float, help="default 20000 for a grid, 30000 for Neuropixels")
    p.add_argument("--units", type=int, help="default: one for three electrodes, at most 60")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument(
        "--cycle", action="store_true", help=f"serve the same {CYCLE_S:g} s over and over: costs the least"
    )
    p.add_argument("--loop", action="store_true", help="begin the recording again when it ends")
    p.add_argument("--duration-s", type=float, default=60.0)
    p.add_argument("--speed", type=float, default=1.0, help="1: real time, 0: as fast as it goes")
    p.add_argument(
        "--first-sample", type=int, default=100_000, help="the device's counter of the first sample"
    )
    p.add_argument("--columns", type=int, default=1027, help="Maxwell: readout channels of a frame")
    p.add_argument(
        "--burst-ms", type=float, help="send this much at once; default 1 for Maxwell, 23 for Open Ephys"
    )
    p.add_argument(
        "--wait-s", type=float, default=60.0, help="wait this long for a reader before the first sample"
    )
    p.add_argument(
        "--drop", action="append", default=[], metavar="START:STOP", help="lose these samples on the way"
    )
    p.add_argument("--restart-at", type=int, help="restart the device's counter at this sample")
    p.add_argument(
        "--silence", action="append", default=[], metavar="SAMPLE:SECONDS", help="send nothing for so long"
    )
    p.add_argument("--garbage-every", type=int, default=0, help="a meaningless message after every so many")
    p.add_argument("--ttl-hz", type=float, default=0.0, help="Open Ephys: line 0 goes up and down so often")
    p.add_argument("--truth", type=Path, help="write the known spikes here (npz)")
    p.add_argument("--map", type=Path, help="write the MaxLab electrode map here (.cfg)")
    p.add_argument("--probe", type=Path, help="write the probe here (probeinterface JSON)")
    p.add_argument("--sent", type=Path, help="write every code that is served here (raw)")
    p.add_argument("--schedule", type=Path, help="write when each burst went out here (npy)")
    p.add_argument("--json", type=Path, help="write what was sent here")
    p.add_argument(
        "--priority", choices=("auto", "normal"), default="normal", help="auto: as punctual as a device"
    )
    p.add_argument(
        "--ppm",
        default="0",
        help="how much faster its clock runs than it says; SpikeGLX: one per probe, 0,20",
    )
    p.add_argument(
        "--sync-hz", type=float, default=0.0, help="Open Ephys, SpikeGLX: pulses that all simulators here get"
    )
    p.add_argument("--sync-random", action="store_true", help="at random intervals of that mean")
    p.add_argument(
        "--sync-line", type=int, default=6, help="TTL line of these pulses; SpikeGLX always has line 6"
    )
    p.add_argument(
        "--sync-missing", type=float, default=0.0, help="share of pulses that this device does not see"
    )
    p.add_argument(
        "--untold", action="append", default=[], metavar="SAMPLE:N", help="lose N samples inside the device, uncounted"
    )  # fmt: skip
    p.add_argument("--probes", type=int, default=1, help="SpikeGLX: how many, each with its own cells")
    p.add_argument(
        "--missed", action="append", default=[], metavar="START:STOP", help="SpikeGLX: samples with MISS set"
    )
    simulate_stim_inputs.options(p)


def synthetic(args: argparse.Namespace) -> Any:
    """The synthetic recording that the arguments describe; the same arguments give the same samples."""
    from spiked_models import synthesis

    grid = "x" in args.electrodes
    try:
        shape = [int(n) for n in args.electrodes.split("x")]
        positions = synthesis.hdmea_grid(*shape) if grid else synthesis.neuropixels(*shape)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"--electrodes {args.electrodes!r} must look like 8x8 or 384") from e
    fs = args.fs_hz or (20_000.0 if grid else 30_000.0)
    if args.wire == "spikeglx":
        uv = gain_uv(0.5 / 8192 / 80, 0.5, 8192)  # Neuropixels 2.0
        adc = synthesis.Adc(lsb_uv=uv, code_min=-8192, code_max=8191)
    elif args.wire == "maxwell":
        adc = synthesis.Adc(lsb_uv=MAXWELL_LSB_UV, zero_code=512, dtype="uint16", code_min=0, code_max=1023)
    else:
        adc = synthesis.Adc(lsb_uv=0.195)
    units = args.units if args.units is not None else min(60, max(1, len(positions) // 3))
    try:
        return synthesis.synthesize(
            positions, fs, CYCLE_S if args.cycle else args.duration_s, units, args.seed, adc=adc
        )
    except ValueError as e:
        raise ConfigError(f"{e}; check --electrodes, --duration-s, --fs-hz and --units") from e


def pairs(texts: list[str], kind: Callable[[str], float], what: str) -> tuple[tuple[int, Any], ...]:
    out = []
    for text in texts:
        a, colon, b = text.partition(":")
        try:
            out.append((int(a), kind(b)))
        except ValueError as e:
            raise ConfigError(f"{what} {text!r} must look like 1000:2000") from e
        if not colon:
            raise ConfigError(f"{what} {text!r} must look like 1000:2000")
    return tuple(out)


def ppms(args: argparse.Namespace) -> list[float]:
    """--ppm as numbers. Raises ConfigError."""
    try:
        return [float(p) for p in args.ppm.split(",")]
    except ValueError as e:
        raise ConfigError(f"--ppm {args.ppm!r} must look like 20, or 0,20 for two probes") from e


def pulses(args: argparse.Namespace, seed: int = 0) -> SyncPulses | None:
    """The shared pulses that are asked for."""
    if args.sync_hz <= 0:
        return None
    line = 6 if args.wire == "spikeglx" else args.sync_line
    return SyncPulses(
        1 / args.sync_hz, args.sync_random, line, missing=args.sync_missing, seed=args.seed + seed
    )


def _write_map(path: Path, info: StreamInfo) -> None:
    rows = [
        f"{c}({1000 + i}){x}/{y};"
        for i, (c, (x, y)) in enumerate(zip(info.channel_ids, info.positions_um, strict=True))
    ]
    path.write_text("\n".join(rows), encoding="utf-8")


def _write_probe(path: Path, info: StreamInfo) -> None:
    import probeinterface

    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(info.positions, shapes="square", shape_params={"width": 10})
    probe.set_device_channel_indices(np.arange(info.n_channels))
    probeinterface.write_probeinterface(path, probe)


def _signal(args: argparse.Namespace) -> tuple[Signal, Any]:
    if args.recording is None:
        rec = synthetic(args)
        info = Synthetic(rec, args.name).info
        return (Cycle(info, rec.codes) if args.cycle else Synthetic(rec, args.name)), rec
    from spiked.sources.recordings import open_recording

    stored = open_recording(args.recording, stream=args.stream)
    return Stored(stored, args.loop), stored


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Serve until everything was sent or SIGINT/SIGTERM; what was sent."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, lambda *_: stop.set())
    if args.wire == "spikeglx":
        from spiked.sources.simulate_spikeglx_command import run as serving

        return serving(args, stop, say)
    source, rec = _signal(args)
    priority = raise_priority("device", args.priority)
    info = source.info
    for path, write in ((args.map, _write_map), (args.probe, _write_probe)):
        if path is not None:
            write(path, info)
    inputs = simulate_stim_inputs.make(args, info, rec)
    source.repeats = source.repeats and inputs is None
    wire = make_wire(args.wire, source, **({"n_columns": args.columns} if args.wire == "maxwell" else {}))
    address = args.address or f"tcp://127.0.0.1:{PORTS[args.wire]}"
    half = int(info.fs_hz / args.ttl_hz / 2) if args.ttl_hz else 0
    ttl = ((k * half, 0, k % 2) for k in range(1, int(args.duration_s * info.fs_hz) // half)) if half else ()
    faults = Faults(
        drop_samples=pairs(args.drop, int, "--drop"), silence=pairs(args.silence, float, "--silence"), restart_at=args.restart_at,
        garbage_every=args.garbage_every, untold=pairs(args.untold, int, "--untold"),
    )  # fmt: skip
    say(
        f"serving {info.n_channels} channels at {info.fs_hz:g} Hz as {args.wire} on {address}; waiting for a reader"
    )
    told = [0]

    def progress(sent: Sent) -> None:
        if int(sent.seconds) >= told[0] + 5:
            told[0] = int(sent.seconds)
            say(f"sent {sent.samples / info.fs_hz:.1f} s, at most {1000 * sent.most_behind_s:.0f} ms late")

    with inputs or contextlib.nullcontext():
        sent = serve(
            source, wire, address, stop=stop, speed=args.speed, duration_s=args.duration_s, first_sample=args.first_sample,
            wait_for_subscriber_s=args.wait_s, ttl=pulses(args) or ttl, faults=faults, record_sent=args.sent, on_progress=progress,
            block_samples=None if args.burst_ms is None else max(1, info.samples(args.burst_ms)), schedule=args.schedule,
            stimulation=inputs.stimulation if inputs else None, ppm=ppms(args)[0],
            on_look=lambda: say("somebody looked and left; waiting for a reader, for whom it begins anew"),
        )  # fmt: skip
    if args.truth is not None and args.recording is None and not args.cycle:
        write_truth(args.truth, rec, sent.samples)
    if inputs is not None and args.stim_log is not None:
        inputs.stimulation.save(args.stim_log, args.first_sample)
    return {
        "wire": args.wire,
        "address": address,
        "channels": info.n_channels,
        "fs_hz": info.fs_hz,
        "priority": priority,
        "stims": len(inputs.stimulation.stims) if inputs else 0,
        "stim_errors": inputs.errors if inputs else [],
        **dataclasses.asdict(sent),
    }


def write_truth(path: Path, rec: Any, n_samples: int) -> None:
    """Known spikes of the first n samples: samples (from 0), units, snr per unit, root channel per unit."""
    step = max(1, round(rec.fs_hz))
    served = itertools.islice(
        rec.blocks(step), -(-n_samples // step) + 1
    )  # it may have been ended long before its end
    spikes = np.concatenate([rec_spikes for _, rec_spikes in served])
    spikes = spikes[spikes["sample"] < n_samples]
    known = rec.units[: rec.n_units]
    np.savez(
        path, samples=spikes["sample"], units=spikes["unit"], snr=np.array([u.snr for u in known]),
        channels=np.array([u.template.root for u in known]), fs_hz=rec.fs_hz,
    )  # fmt: skip
