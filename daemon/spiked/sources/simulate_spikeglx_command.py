"""`spiked simulate --wire spikeglx`: several probes behind one command server."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError
from spiked.priority import raise_priority
from spiked.sources.simulate import Cycle, Signal, Synthetic
from spiked.sources.simulate_spikeglx import SimProbe, SpikeGlxServer
from spiked.sources.spikeglx_link import host_and_port

REFUSED = ("recording", "stim", "stim_text", "map", "truth", "schedule")  # what only the other wires can
TELL_S = 5.0


def _numbered(path: Path | None, k: int, n: int) -> Path | None:
    """FILE for one probe, FILE.1 and so on for the second and later ones."""
    return path if path is None or n == 1 or k == 0 else path.with_name(f"{path.name}.{k}")


def probes(args: argparse.Namespace) -> list[SimProbe]:
    """What the arguments describe. Raises ConfigError."""
    from spiked.sources.simulate_command import CYCLE_S, pairs, ppms, pulses, synthetic

    for name in REFUSED:
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --wire spikeglx; leave it out")
    rates = ppms(args)
    if len(rates) not in (1, args.probes):
        raise ConfigError(f"--ppm has {len(rates)} numbers for {args.probes} probes")
    out = []
    for k in range(args.probes):
        recording = synthetic(argparse.Namespace(**{**vars(args), "seed": args.seed + k}))
        info = Synthetic(recording, f"imec{k}").info
        signal: Signal = Cycle(info, recording.codes, round(args.duration_s / CYCLE_S)) if args.cycle else Synthetic(recording, info.name)  # fmt: skip
        out.append(
            SimProbe(
                signal,
                serial=f"1901111{k:04d}",
                ppm=rates[k % len(rates)],
                pulses=pulses(args, seed=k),
                missed=pairs(args.missed, int, "--missed"),
                untold=pairs(args.untold, int, "--untold") if k == args.probes - 1 else (),
                sent=_numbered(args.sent, k, args.probes),
            )
        )
    return out


def run(args: argparse.Namespace, stop: threading.Event, say: Callable[[str], None]) -> dict[str, Any]:
    """Serve until everything exists or `stop`; what was served. The run begins when somebody wants to know whether it has."""
    made = probes(args)
    priority = raise_priority("device", args.priority)
    host, port = host_and_port(args.address or "")
    info = made[0].signal.info
    with SpikeGlxServer(made, host, port, running=False) as server:
        say(
            f"serving {len(made)} probes of {info.n_channels} channels at {info.fs_hz:g} Hz as spikeglx on {server.address}"
        )
        _wait_for_reader(server, args.wait_s, stop)
        server.start_run()
        begun = told = time.monotonic()
        restart_s = None if args.restart_at is None else args.restart_at / info.fs_hz
        while not stop.wait(0.05) and not server.ended and server.produced() < args.duration_s * info.fs_hz:
            if restart_s is not None and time.monotonic() - begun > restart_s:
                restart_s = None
                server.stop_run()
                time.sleep(0.5)
                server.start_run()
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                say(f"{server.produced() / info.fs_hz:.1f} s exist, {server.requests} requests")
        samples = server.produced()
        stop.wait(1.0)  # for the last fetch
        return {
            "wire": "spikeglx", "address": server.address, "probes": len(made), "channels": info.n_channels, "fs_hz": info.fs_hz,
            "priority": priority, "first_sample": 0, "samples": samples, "requests": server.requests, "errors": server.errors,
            "messages": server.requests, "most_behind_s": 0.0,
        }  # fmt: skip


def _wait_for_reader(server: SpikeGlxServer, wait_s: float, stop: threading.Event) -> None:
    until = time.monotonic() + wait_s
    while not server.awaited and time.monotonic() < until and not stop.is_set():
        time.sleep(0.02)
