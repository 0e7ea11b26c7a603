"""The commands. Every error a user can cause ends as one line on stderr and a non-zero exit."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

from spiked import __version__
from spiked.errors import ConfigError, SpikedError
from spiked.journald import Journald, is_journal

Command = Callable[[argparse.Namespace], int]
UMASK = 0o027  # of the daemon: files 0640, folders 0750


def _say(text: str) -> None:
    print(text, flush=True)


def _logging(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    if is_journal():  # it stamps the time itself
        logging.basicConfig(level=level, handlers=[Journald()], format="%(message)s")
    else:
        logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")  # fmt: skip
    for loud in ("numba", "h5py", "matplotlib", "asyncio"):
        logging.getLogger(loud).setLevel(logging.WARNING)


@contextlib.contextmanager
def _logging_behind() -> Iterator[None]:
    """Whatever logs waits for no terminal: Ctrl-S stops what is shown, and must not stop the daemon."""
    root = logging.getLogger()
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = QueueListener(lines, *root.handlers)
    before, root.handlers = root.handlers, [QueueHandler(lines)]
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers = before


def _room_for_json(args: argparse.Namespace) -> None:
    """A result that could not be written is said before the work, not after it."""
    path = getattr(args, "json", None)
    if isinstance(path, Path) and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"cannot write {path}; give a path in an existing folder")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a result; a folder that does not exist is a ConfigError."""
    try:
        path.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; give a path in an existing folder") from e


def run(args: argparse.Namespace) -> int:
    from spiked import config
    from spiked.service import serve

    settings = config.load(args.config)
    if settings.offline.enabled:  # what the night would refuse is said now
        from spiked.offline.presets import JobSettings, params_of

        JobSettings.of(params_of(settings.offline))
    os.umask(UMASK)  # sessions are for the service's user and group
    with _logging_behind():
        code, summary = asyncio.run(serve(settings, args.duration_s, not args.daemon, args.no_jobs))
    if summary:
        _say(
            f"session {summary['folder']}: {summary['state']}{'; ' + summary['error'] if summary['error'] else ''}"
        )
    if args.json:
        write_json(args.json, summary)
    return code


def _control(args: argparse.Namespace, op: str, **fields: Any) -> dict[str, Any]:
    from spiked_client.control import SyncControl
    from spiked_client.errors import ClientError

    try:
        with SyncControl(args.host, args.port, timeout=args.timeout_s, keys=args.keys) as control:
            return dict(control.request(op, **fields))
    except ClientError as e:
        raise SpikedError(str(e)) from e


def status(args: argparse.Namespace) -> int:
    _say(json.dumps(_control(args, "status"), indent=1, default=str))
    return 0


def stop(args: argparse.Namespace) -> int:
    if args.stimulation:
        _control(args, "stop_stimulation", why="spiked stop --stimulation")
        _say("nothing is stimulated any more, until clear_stop; the session goes on")
        return 0
    _control(args, "shutdown" if args.daemon else "stop_session")
    _say("stopping; the session file is closed and sorted by the daemon")
    return 0


def start(args: argparse.Namespace) -> int:
    _control(args, "start_session")
    _say("session starting")
    return 0


def calibrate(args: argparse.Namespace) -> int:
    only = {} if args.stream is None else {"stream": args.stream}
    _control(args, "cancel_calibration" if args.cancel else "calibrate", **only)
    _say(
        "calibration is given up; the units in use stay"
        if args.cancel
        else "calibration begins with the next samples; sorting goes on meanwhile"
    )
    return 0


def watch(args: argparse.Namespace) -> int:
    from spiked_client.errors import ClientError
    from spiked_client.watch import watch as watching

    try:
        there = watching(
            host=args.host, control_port=args.port, seconds=args.seconds, keys=args.keys,
            until_units=args.until_units,
        )  # fmt: skip
    except ClientError as e:
        raise SpikedError(str(e)) from e
    except KeyboardInterrupt:
        return 0
    if not there:
        raise SpikedError(f"no units within {args.seconds:g} s; `spiked status` says how the calibration is")
    return 0


def web(args: argparse.Namespace) -> int:
    from spiked_client.errors import ClientError
    from spiked_client.web.command import run as serving

    try:
        serving(args)
    except ClientError as e:
        raise SpikedError(str(e)) from e
    return 0


def monitor(args: argparse.Namespace) -> int:
    from spiked_client.errors import ClientError

    try:
        from spiked_client.monitor.app import monitor as monitoring
    except ModuleNotFoundError as e:
        raise SpikedError(
            f"spiked monitor needs {e.name}: pip install 'spiked[monitor]'; `spiked watch` works without"
        ) from e
    if not sys.stdout.isatty():
        raise SpikedError("spiked monitor needs a terminal; `spiked watch` writes into files and pipes")
    try:
        monitoring(args.host, args.port, args.keys, args.stream)
    except ClientError as e:
        raise SpikedError(str(e)) from e
    return 0


def lsl(args: argparse.Namespace) -> int:
    from spiked_client.lsl import main as bridging

    return bridging(
        ["--host", args.host, "--port", str(args.port), *(["--keys", str(args.keys)] if args.keys else [])]
    )


def keys(args: argparse.Namespace) -> int:
    from spiked.keys import run as keeping

    return keeping(args, _say)


def recover(args: argparse.Namespace) -> int:
    from spiked.record.recover import recover as recovering

    _say(str(recovering(args.path)))
    return 0


def sort(args: argparse.Namespace) -> int:
    from spiked.offline.command import sort as sorting

    code, results = sorting(args, _say)
    if args.json:
        one = next(iter(results.values())) if len(results) == 1 else {"recordings": results}
        write_json(args.json, one)
    return code


def sorters(args: argparse.Namespace) -> int:
    from spiked.offline.command import sorters as telling

    return telling(args, _say)


def jobs(args: argparse.Namespace) -> int:
    from spiked.offline.command import jobs as showing

    return showing(args, _say)


def curate(args: argparse.Namespace) -> int:
    from spiked.offline.curation.command import run as curating

    code, results = curating(args, _say)
    if args.json:
        write_json(args.json, next(iter(results.values())) if len(results) == 1 else {"sortings": results})
    return code


def report(args: argparse.Namespace) -> int:
    from spiked.act.report import lines, of_session
    from spiked.offline import show
    from spiked.record.sync import lines as clocks

    sorted_or_not = show.reports(args.session) or show.failures(args.session)
    told = of_session(args.session, required=not sorted_or_not)
    _say("\n".join([*lines(told), *clocks(args.session), *show.lines(args.session)]))
    if args.json:
        write_json(args.json, told)
    if args.open:
        show.open_pages(args.session)
    return 0


def demo(args: argparse.Namespace) -> int:
    from spiked.demo import demo as demonstrate

    result = demonstrate(
        args.folder,
        args.electrodes,
        args.duration_s,
        args.calibrate_s,
        args.seed,
        _say,
        offline=not args.no_offline,
    )
    if args.json:
        write_json(args.json, result)
    return 0


def simulate(args: argparse.Namespace) -> int:
    from spiked.sources.simulate_command import run as simulating

    result = simulating(args, _say)
    if args.json:
        write_json(args.json, result)
    return 0


def discover(args: argparse.Namespace) -> int:
    from spiked.rig.discovered import run as discovering

    discovering(args, _say)
    return 0


def bench(args: argparse.Namespace) -> int:
    from spiked.bench.command import run as benching

    code, result = benching(args, _say)
    if args.json:
        write_json(args.json, result)
    return code


def warmup(args: argparse.Namespace) -> int:
    from spiked.rig.warm import is_warm, leave_stamp

    if args.once and is_warm():
        _say("kernels are compiled")
        return 0
    from spiked.live.compile import compile_kernels

    compile_kernels(_say)
    leave_stamp()
    return 0


def init(args: argparse.Namespace) -> int:
    from spiked.rig.init import run as initialising

    return initialising(args, _say)


def doctor(args: argparse.Namespace) -> int:
    from spiked.rig.doctor import run as examining

    return examining(args, _say)


def install_service(args: argparse.Namespace) -> int:
    from spiked.rig.install import run as installing

    return installing(args, _say)


def import_rtsort(args: argparse.Namespace) -> int:
    from spiked.sort.import_rtsort import import_rtsort as importing

    sequences, told = importing(args.pickle, args.positions, args.recording, args.network)
    sequences.save(args.out)
    _say("\n".join([f"{args.out}: {len(sequences)} units on {sequences.n_channels} electrodes", *told]))
    return 0


def templates(args: argparse.Namespace) -> int:
    from spiked.offline.carry import run as carrying

    result = carrying(args, _say)
    if args.json:
        write_json(args.json, result)
    return 0


def network_list(_args: argparse.Namespace) -> int:
    from spiked_models import networks

    for name in networks.available():
        net = networks.load(name)
        _say(
            f"{name}: {net.fs_hz:g} Hz, kernel {net.kernel}, width {net.width}, lookahead {net.lookahead} samples"
        )
    return 0


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # Path's own raises where nobody has that home


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from spiked_client.web.command import options as web_options
    from spiked_client.web.command import port

    p = argparse.ArgumentParser(prog="spiked", description="Record, sort and publish live electrophysiology.")
    p.add_argument("--version", action="version", version=f"spiked {__version__}")
    p.add_argument("-v", "--verbose", action="store_true")
    sub = p.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, call: Command) -> argparse.ArgumentParser:
        c = sub.add_parser(name, help=what, description=what)
        c.set_defaults(call=call)
        return c

    c = command("run", "Run the daemon with a rig's TOML file.", run)
    c.add_argument("config", type=_path)
    c.add_argument("--duration-s", type=_seconds, help="stop after this much of the stream")
    c.add_argument("--daemon", action="store_true", help="stay after a session and wait for the next start")
    c.add_argument(
        "--no-jobs", action="store_true", help="queue sessions only: `spiked jobs run --wait` sorts them"
    )
    c.add_argument("--json", type=_path, help="write the session's summary here")
    for name, what, call in (
        ("status", "Ask a running daemon how it is.", status),
        ("stop", "End the running session.", stop),
        ("start", "Start a session in a waiting daemon.", start),
        ("calibrate", "Find the units again, while sorting goes on.", calibrate),
        ("watch", "Watch rates, latency and gaps in the terminal.", watch),
        (
            "monitor",
            "The monitor for a terminal: raster, rates, latency, health, jobs; stops stimulation.",
            monitor,
        ),
        ("lsl", "Offer spikes, rates and markers to the Lab Streaming Layer.", lsl),
    ):
        c = command(name, what, call)
        c.add_argument("--host", default="127.0.0.1")
        c.add_argument("--port", type=port, default=5572, help="the daemon's control port")
        c.add_argument(
            "--keys", type=_path, help="key file for a daemon that uses keys; else SPIKED_KEYS names it"
        )
        c.add_argument("--timeout-s", type=_seconds, default=10.0, help="how long to wait for an answer")
        if name == "stop":
            c.add_argument("--daemon", action="store_true", help="end the daemon too")
            c.add_argument(
                "--stimulation", action="store_true", help="only the emergency stop of all stimulation"
            )
        if name == "calibrate":
            c.add_argument("--stream", help="one stream of the session; default: all")
            c.add_argument(
                "--cancel", action="store_true", help="give up the one under way, at whatever stage"
            )
        if name == "watch":
            c.add_argument("--seconds", type=_seconds, help="stop watching after this long")
            c.add_argument(
                "--until-units", action="store_true", help="stop when units fire in every stream; an error if --seconds pass first"
            )  # fmt: skip
        if name == "monitor":
            c.add_argument("--stream", default="", help="the stream to look at first")
    c = command("web", "Serve the page for browsers, of a daemon here or on another computer.", web)
    web_options(c)
    c = command("keys", "Who may reach this rig from elsewhere, and what each may do.", keys)
    from spiked.keys import options as keys_options

    keys_options(c)
    c = command("simulate", "Serve a recording, or a synthetic one, as a device would.", simulate)
    _simulate_options(c)
    c = command("recover", "Close a session file whose writer died.", recover)
    c.add_argument("path", type=_path, help="session folder or NWB file")
    from spiked.offline import command_options as offline_options

    c = command("sort", "Sort sessions, or recordings of any format, offline: Kilosort4, SLAy, report.", sort)
    offline_options.sort_options(c)
    c = command("sorters", "The offline sorters: which can run here, and what each can be told.", sorters)
    offline_options.sorters_options(c)
    from spiked.offline.curate_options import options as curate_options

    c = command(
        "curate", "Curate any sorting step by step, with a history that gives the same units again.", curate
    )
    curate_options(c)
    c = command("jobs", "The queue of offline jobs: list, show, run, cancel, retry.", jobs)
    offline_options.jobs_options(c)
    c = command(
        "report",
        "What a session gave: units, live against offline, stimuli and how long each step took.",
        report,
    )
    c.add_argument("session", type=_path, help="session folder, or where `spiked sort` put its results")
    c.add_argument("--open", action="store_true", help="show report.html in the browser")
    c.add_argument("--json", type=_path)
    c = command("demo", "See it all once: simulator, daemon, live units, offline units, report.", demo)
    c.add_argument("--folder", type=_path, default=Path("out/demo"))
    c.add_argument("--electrodes", type=int, default=36, help="a square number")
    c.add_argument("--duration-s", type=float, default=100.0)
    c.add_argument("--calibrate-s", type=float, default=40.0)
    c.add_argument("--seed", type=int, default=1)
    c.add_argument("--no-offline", action="store_true")
    c.add_argument("--json", type=_path)
    c = command(
        "import-rtsort", "Take over the units of a sorter saved by RT-Sort's own packages.", import_rtsort
    )
    c.add_argument("pickle", type=_path)
    c.add_argument("--positions", type=_path, help="probe file (probeinterface JSON) of its electrodes")
    c.add_argument("--recording", type=_path, help="recording of the rig: channel names and positions")
    c.add_argument("--out", type=_path, required=True, help="FILE.sequences.h5")
    c.add_argument("--network", help="the network it was made with: auto, a shipped name, or a folder")
    c = command(
        "templates", "Curated units of a session, for live sorting under the ids they have.", templates
    )
    _templates_options(c)
    from spiked.rig import discovered, install
    from spiked.rig import doctor as examination
    from spiked.rig import init as questions

    c = command("discover", "What acquisition programs offer, and the TOML that records it.", discover)
    discovered.options(c)
    c = command("init", "Write a rig's TOML file, after asking or from flags.", init)
    questions.options(c)

    c = command(
        "doctor", "Is everything right for a session? What is not, and the command that mends it.", doctor
    )
    examination.options(c)
    c = command(
        "install-service",
        "systemd services of this rig: write, check, explain, renew, remove.",
        install_service,
    )
    install.options(c)
    c = command("warmup", "Compile all kernels once, after an installation.", warmup)
    c.add_argument("--once", action="store_true", help="nothing, where this installation's are compiled")
    c = command("networks", "List the networks that ship.", network_list)
    c = command("bench", "Benchmarks.", bench)
    _bench_options(c)
    return p


def _simulate_options(c: argparse.ArgumentParser) -> None:
    from spiked.sources.simulate_command import options

    options(c)


def _templates_options(c: argparse.ArgumentParser) -> None:
    from spiked.offline.carry_options import options

    options(c)


def _bench_options(c: argparse.ArgumentParser) -> None:
    from spiked.bench.command import options

    options(c)


def _stop_telling() -> None:
    """Whoever read what is printed is gone, or its disk full: the rest goes nowhere, also at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    _logging(args.verbose)
    try:
        _room_for_json(args)
        return int(args.call(args))
    except SpikedError as e:
        sys.stderr.write(f"spiked: {e}\n")
        return e.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("spiked: interrupted\n")
        return 130
    except BrokenPipeError:
        _stop_telling()
        return (
            128 + signal.SIGPIPE
        )  # as of any program whose reader went away: a sort has not come to its end
    except OSError as e:
        logging.getLogger("spiked").debug("where it happened", exc_info=True)
        _stop_telling()
        where = f" {os.fsdecode(e.filename)}" if isinstance(e.filename, str | bytes) else ""
        sys.stderr.write(
            f"spiked: cannot read or write{where} ({e.strerror or e}); check that it is there, that you may, and the disk\n"
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
