"""`spiked bench`: the arguments of every benchmark, and how its figures are shown. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]
Result = dict[str, Any]


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def options(p: argparse.ArgumentParser) -> None:
    """One sub-command for every benchmark."""
    benches = p.add_subparsers(dest="bench", required=True)

    def bench(
        name: str, what: str, call: Callable[[argparse.Namespace, Say], Result]
    ) -> argparse.ArgumentParser:
        b = benches.add_parser(name, help=what, description=what)
        b.set_defaults(bench_call=call)
        b.add_argument("--json", type=_path, help="write the figures here")
        b.add_argument("--table", action="store_true", help="print the row of docs/benchmarks.md")
        return b

    _sort_options(bench("sort", "the live pipeline over a recording folder: accuracy and speed", _sort))
    _ingest_options(
        bench("ingest", "simulate -> acquire + record at rate: what is missing, what it costs", _ingest)
    )
    _calibrate_options(
        bench("calibrate", "how long it takes until a recording's units are known", _calibrate)
    )
    _network_options(bench("network", "what the streaming network costs, by channels and chunk", _network))
    _peer_options(
        bench("peer", "the published RT-Sort and ours on the same samples, with the same weights", _peer)
    )
    _live_options(
        bench("live", "real sockets in real time: from a true spike's trough to a client's hands", _live)
    )
    _loop_options(
        bench("loop", "the closed loop: from a true spike's trough to the command at the stimulator", _loop)
    )
    _stim_options(bench("stim", "spikes after stimuli, and what the removal of artifacts costs", _stim))
    _merges_options(
        bench("merges", "do merges put together what was taken apart: SLAy through us, and directly", _merges)
    )
    _offline_options(
        bench(
            "offline",
            "Kilosort4 called directly and through `spiked sort`: time, disk, the same spikes",
            _offline,
        )
    )
    _subscribers_options(
        bench(
            "subscribers",
            "many clients, one stalled, one killed every second: what the live path notices",
            _subscribers,
        )
    )
    _fuzz_options(bench("fuzz", "hostile messages to everything that reads messages", _fuzz))
    _web_options(
        bench("web", "frames per second of the web page in Chromium, and what its server takes", _web)
    )
    _clocks_options(
        bench("clocks", "two streams' clocks over simulated hours: offset errors, jumps", _clocks)
    )
    _outputs_options(bench("outputs", "every output to a peer and back: the round trip", _outputs))


def _network_option(b: argparse.ArgumentParser) -> None:
    b.add_argument(
        "--network", default="auto", help="name of a shipped network, or a folder in the published format"
    )
    b.add_argument("--threads", type=int, default=1)


def _sort_options(b: argparse.ArgumentParser) -> None:
    _network_option(b)
    b.add_argument("--recording", type=_path, required=True)
    b.add_argument("--calibrate-s", type=float, default=60.0)
    b.add_argument("--chunk-ms", type=float, default=1.0)
    b.add_argument("--device", default="cpu")
    b.add_argument("--sorter", default="rt_sort", choices=["rt_sort", "templates"])
    b.add_argument(
        "--templates-from", default="auto", help="what finds the units whose templates are matched"
    )
    b.add_argument("--duration-s", type=float, help="use only the first seconds of the recording")
    b.add_argument("--spikes", type=_path, help="write the spikes here (npz)")
    b.add_argument("--sequences", type=_path, help="keep the calibration here (h5)")


def _ingest_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("--wire", choices=["openephys", "maxwell", "spikeglx"], required=True)
    b.add_argument("--seconds", type=float, default=60.0)
    b.add_argument("--folder", type=_path, default=Path("out/ingest"))
    b.add_argument("--live", action="store_true", help="with the live path on")


def _calibrate_options(b: argparse.ArgumentParser) -> None:
    _network_option(b)
    b.add_argument("recording", type=_path)
    b.add_argument("--seconds", type=float, default=60.0, help="of the recording, from its start")
    b.add_argument("--device", default="cpu")
    b.add_argument("--sequences", type=_path, help="keep the calibration here (h5)")


def _network_options(b: argparse.ArgumentParser) -> None:
    _network_option(b)
    b.set_defaults(network="rtsort-20k-lite")
    b.add_argument("--channels", type=int, nargs="+", default=[16, 64, 256, 1024])
    b.add_argument("--chunk-ms", type=float, nargs="+", default=[1.0, 5.0])
    b.add_argument("--seconds", type=float, default=2.0, help="wall time for each pair of these")
    b.add_argument("--device", default="cpu")
    b.add_argument("--precision", default="auto", help="auto, float32, bfloat16, or float16 on a GPU")
    b.add_argument("--spikes", action="store_true", help="cells over the noise")


def _peer_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("recording", type=_path, help="a recording folder with known spikes")
    b.add_argument(
        "--weights",
        type=_path,
        required=True,
        help="folder with the published init_dict.json and state_dict.pt",
    )
    b.add_argument(
        "--limits",
        choices=["default", "tight", "both"],
        default="both",
        help="the package's own matching limits, tighter ones, or both",
    )
    b.add_argument("--calibrate-s", type=float, default=120.0)
    b.add_argument("--seconds", type=float, default=60.0, help="sorted, after the calibration part")
    b.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of both, for calibration and sorting; speed is taken with 1 and with all cores",
    )
    b.add_argument(
        "--rounds", type=int, default=10, help="turns in which speed is taken, 20 chunks of the peer each"
    )
    b.add_argument(
        "--env", type=_path, help="a virtual environment that has the peer; default: one is made and kept"
    )
    b.add_argument(
        "--folder",
        type=_path,
        default=Path("out/peer"),
        help="intermediate results; the same command goes on from them",
    )


def _live_options(b: argparse.ArgumentParser) -> None:
    _network_option(b)
    b.add_argument(
        "--recording", type=_path, help="a recording folder with known spikes; default: synthetic cells"
    )
    b.add_argument("--electrodes", default="8x8", help="grid of the synthetic array")
    b.add_argument("--units", type=int, help="known synthetic cells; default: one for four electrodes")
    b.add_argument("--seed", type=int, default=1)
    b.add_argument("--chunk-ms", type=float, default=1.0)
    b.add_argument("--seconds", type=float, default=60.0, help="measured, once there are units")
    b.add_argument("--calibrate-s", type=float, default=60.0)
    b.add_argument(
        "--sequences", type=_path, help="units of an earlier calibration (h5): nothing to wait for"
    )
    b.add_argument("--sorter", default="rt_sort", choices=["rt_sort", "templates"])
    b.add_argument("--templates", type=_path, help="the same for templates (h5), which then are matched")
    b.add_argument(
        "--priority",
        choices=["auto", "normal"],
        default="auto",
        help="real-time priority where allowed, or none",
    )
    b.add_argument(
        "--burst-ms", type=float, help="the device sends this much at once; default 1 (Open Ephys: 23)"
    )
    b.add_argument("--columns", type=int, default=1027, help="Maxwell: readout channels of a frame")
    b.add_argument("--folder", type=_path, default=Path("out/live"))


def _loop_options(b: argparse.ArgumentParser) -> None:
    _live_options(b)
    b.set_defaults(folder=Path("out/loop"))
    b.add_argument("--every-ms", type=float, default=100.0, help="least time between two commands")
    b.add_argument(
        "--early",
        action="store_true",
        help="the rule acts on spikes that are not final yet; templates: on early decisions",
    )
    b.add_argument(
        "--no-artifact", action="store_true", help="the stimulator takes commands and changes no sample"
    )
    b.add_argument(
        "--wire",
        choices=["maxwell", "openephys"],
        help="what the device speaks; default: the recording's own",
    )


def _stim_options(b: argparse.ArgumentParser) -> None:
    _network_option(b)
    b.add_argument("--recording", type=_path, required=True)
    b.add_argument("--control", type=_path, help="the same recording without artifacts")
    b.add_argument("--calibrate-s", type=float, default=60.0, help="without stimuli, from its start")
    b.add_argument("--half-window-ms", type=float)
    b.add_argument("--sorter", default="rt_sort", choices=["rt_sort", "templates"])
    b.add_argument("--chunk-ms", type=float, default=5.0)
    b.add_argument("--channels", type=int, default=1024, help="for the cost")


def _offline_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("recording", type=_path, help="a session, or a recording of any format")
    b.add_argument("--seconds", type=float, default=60.0, help="of the recording, from its start")
    b.add_argument("--turns", type=int, default=3, help="each way, in turns")
    b.add_argument("--threads", type=int, default=1)
    b.add_argument("--device", default="cpu")
    b.add_argument("--preset", default="auto", help="Kilosort4's parameters, for both")
    b.add_argument("--folder", type=_path, default=Path("out/offline"))


def _subscribers_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("--clients", type=int, default=50)
    b.add_argument(
        "--seconds", type=float, default=60.0, help="of one turn; turns with and without them alternate"
    )
    b.add_argument("--turns", type=int, default=3)
    b.add_argument("--electrodes", default="6x6", help="grid of the synthetic array")
    b.add_argument("--calibrate-s", type=float, default=20.0)
    b.add_argument("--sorter", default="rt_sort", choices=["rt_sort", "templates", "none"])
    b.add_argument("--curve", action="store_true", help="with keys: everything is encrypted")
    b.add_argument("--hwm", type=int, default=64, help="messages that wait for a slow client")
    b.add_argument("--replay-messages", type=int, default=256)
    b.add_argument("--folder", type=_path, default=Path("out/subscribers"))


def _fuzz_options(b: argparse.ArgumentParser) -> None:
    b.add_argument(
        "--messages", type=int, default=1_000_000, help="in all; 10 million are what a release takes"
    )
    b.add_argument("--processes", type=int, default=2)
    b.add_argument("--seed", type=int, default=1, help="the same number makes the same messages")
    b.add_argument("--only", default="", help="decoders with this in their name")
    b.add_argument("--findings", type=_path, help="write what was found here, with the messages (json)")


def _outputs_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("--commands", type=int, default=500, help="per output")
    b.add_argument("--every-ms", type=float, default=10.0)


def _merges_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("recording", type=_path, help="a recording folder with known spikes")
    b.add_argument(
        "--sorting", type=_path, help="a sorter's output of it; default: known neurons, split on purpose"
    )
    b.add_argument("--duration-s", type=float, help="use only the first seconds of the recording")
    b.add_argument("--seed", type=int, default=0, help="of the splits")
    b.add_argument(
        "--method", action="append", metavar="WHO:SIMILARITY[:PARAMETERS]",
        help="ours or package; auto, l2, autoencoder, spikeinterface; auto or manual; default: a set of them",
    )  # fmt: skip


def _merges(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.merges import bench

    methods = a.method or ["ours:auto", "ours:spikeinterface:manual", "package:l2:manual", "package:l2:auto"]
    return bench(a.recording, a.sorting, methods, duration_s=a.duration_s, seed=a.seed, say=say)


def _sort(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.sort import bench

    return bench(
        a.recording, calibrate_s=a.calibrate_s, network=a.network, chunk_ms=a.chunk_ms, device=a.device, sorter=a.sorter,
        spikes_out=a.spikes, sequences_out=a.sequences, threads=a.threads, duration_s=a.duration_s, say=say, templates_from=a.templates_from,
    )  # fmt: skip


def _ingest(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.ingest import bench

    return bench(a.wire, a.seconds, a.folder, live=a.live, say=say)


def _calibrate(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.calibrate import bench

    return bench(
        a.recording,
        a.seconds,
        network=a.network,
        threads=a.threads,
        device=a.device,
        sequences_out=a.sequences,
        say=say,
    )


def _network(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.network import bench

    return bench(
        a.network, a.channels, a.chunk_ms, threads=a.threads, device=a.device, seconds=a.seconds, spikes=a.spikes, precision=a.precision, say=say
    )  # fmt: skip


def _peer(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.peer import bench

    return bench(
        a.recording, a.weights, a.folder, calibrate_s=a.calibrate_s, seconds=a.seconds, limits=a.limits, threads=a.threads, env=a.env,
        rounds=a.rounds, say=say,
    )  # fmt: skip


def _live(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.live import bench

    return bench(
        a.folder, electrodes=a.electrodes, recording=a.recording, network=a.network, chunk_ms=a.chunk_ms, seconds=a.seconds,
        calibrate_s=a.calibrate_s, sequences=a.sequences, threads=a.threads, units=a.units, burst_ms=a.burst_ms, columns=a.columns,
        priority=a.priority, seed=a.seed, say=say, sorter=a.sorter, templates=a.templates,
    )  # fmt: skip


def _loop(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.loop import bench

    return bench(
        a.folder, electrodes=a.electrodes, recording=a.recording, network=a.network, sorter=a.sorter, chunk_ms=a.chunk_ms, seconds=a.seconds,
        calibrate_s=a.calibrate_s, sequences=a.sequences, templates=a.templates, threads=a.threads, every_ms=a.every_ms, early=a.early,
        artifact=not a.no_artifact, burst_ms=a.burst_ms, columns=a.columns, seed=a.seed, priority=a.priority, wire=a.wire, say=say,
    )  # fmt: skip


def _stim(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.stim import bench

    return bench(
        a.recording, a.calibrate_s, network=a.network, control=a.control, half_window_ms=a.half_window_ms, chunk_ms=a.chunk_ms,
        threads=a.threads, channels=a.channels, sorter=a.sorter, say=say,
    )  # fmt: skip


def _offline(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.offline import bench

    return bench(a.recording, a.folder, a.seconds, a.turns, a.threads, a.device, a.preset, say)


def _subscribers(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.subscribers import bench

    return bench(
        a.folder, say, clients=a.clients, seconds=a.seconds, turns=a.turns, electrodes=a.electrodes, calibrate_s=a.calibrate_s, sorter=a.sorter,
        curve=a.curve, hwm=a.hwm, replay_messages=a.replay_messages,
    )  # fmt: skip


def _fuzz(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.fuzz import bench

    return bench(a.messages, a.processes, a.seed, say, a.only, a.findings)


def _web_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("--units", type=int, default=1000)
    b.add_argument("--electrodes", type=int, default=1024, help="a square number")
    b.add_argument("--rate-hz", type=float, default=5.0, help="of each unit, and of detections per electrode")
    b.add_argument("--seconds", type=float, default=15.0, help="for each kind of rows")
    b.add_argument("--pages", type=int, default=1, help="open at once")


def _web(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.web import bench

    return bench(a.units, a.electrodes, a.rate_hz, a.seconds, a.pages, say)


def _clocks_options(b: argparse.ArgumentParser) -> None:
    b.add_argument("--hours", type=float, default=1.0, help="simulated, for each seed and method")
    b.add_argument("--seeds", type=int, default=5)


def _clocks(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.clocks import bench

    return bench(a.hours, a.seeds, say)


def _outputs(a: argparse.Namespace, say: Say) -> Result:
    from spiked.bench.outputs import bench

    return bench(a.commands, a.every_ms, say)


def run(args: argparse.Namespace, say: Say) -> tuple[int, Result]:
    """Run the chosen benchmark and show its figures; the exit code and the figures."""
    from spiked.bench import tables

    result = args.bench_call(args, say)
    for line in tables.summary(result):
        say(line)
    if args.table:
        for line in tables.table(result):
            say(line)
    return (1 if result.get("missing") else 0), result
