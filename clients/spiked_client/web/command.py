"""The command line of the page's server. No aiohttp before it runs, so that `spiked --help` stays quick."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from spiked_client.control import CONTROL_PORT, Control
from spiked_client.errors import ClientError

WEB_PORT = 5575
log = logging.getLogger("spiked.web")


def _path(value: str) -> Path:
    return Path(os.path.expanduser(value))


def port(text: str) -> int:
    """A port's number; others would be taken for one by the system, modulo 65536."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 to 65535")
    return number


def options(p: argparse.ArgumentParser) -> None:
    """The arguments."""
    p.add_argument("--connect", default="127.0.0.1", help="computer of the daemon (default %(default)s)")
    p.add_argument(
        "--control-port", type=port, default=CONTROL_PORT, help="its control port (default %(default)s)"
    )
    p.add_argument(
        "--keys", type=_path, help="key file for a daemon that uses keys; else SPIKED_KEYS names it"
    )
    p.add_argument("--host", default="127.0.0.1", help="where the page is served (default %(default)s)")
    p.add_argument("--port", type=port, default=WEB_PORT, help="0: any free one (default %(default)s)")
    p.add_argument("--tls-cert", type=_path, help="PEM; needed beyond 127.0.0.1")
    p.add_argument("--tls-key", type=_path)
    p.add_argument("--access", type=_path, help="folder with access.toml: whose tokens open the page")
    p.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted. Raises ClientError."""
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> None:
    try:
        from spiked_client.web import door, server
    except ImportError as e:
        raise ClientError(f"the page needs aiohttp ({e}); pip install 'spiked[web]'") from e
    from spiked_client.access import AccessList
    from spiked_client.subscribe import Client
    from spiked_client.web.feed import Feed

    if bool(args.tls_cert) != bool(args.tls_key):
        raise ClientError("give both --tls-cert and --tls-key, or neither")
    how: dict[str, Any] = {"keys": args.keys}

    def ask() -> Control:
        return Control(args.connect, args.control_port, **how)

    def connect() -> Client:
        return Client(args.connect, args.control_port, wait_s=5.0, **how)

    access = AccessList(args.access) if args.access else None
    context = door.tls(args.tls_cert, args.tls_key) if args.tls_cert else None
    guard = door.guard_for(args.host, access, context is not None)
    pages = server.Pages(Feed(connect, ask), guard, ask, secure=context is not None)
    serving = asyncio.ensure_future(door.serve(pages, args.host, args.port, context, _ready(args.supervised)))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, serving.cancel)
    # Ctrl-C in a terminal reaches the daemon's children too; the daemon says when it is time
    loop.add_signal_handler(signal.SIGINT, (lambda: None) if args.supervised else serving.cancel)
    if args.supervised:
        loop.add_reader(sys.stdin.fileno(), _commanded, serving)
    await serving


def _ready(supervised: bool) -> Any:
    def ready(address: str) -> None:
        if supervised:
            _tell("ready", url=address, pid=os.getpid())
        else:
            sys.stdout.write(f"open {address}\n")
            sys.stdout.flush()

    return ready


def _tell(event: str, **fields: Any) -> None:
    """One line to the daemon."""
    with contextlib.suppress(OSError):
        os.write(
            sys.stdout.fileno(), json.dumps({"event": event, "process": "web", **fields}).encode() + b"\n"
        )


def _commanded(serving: asyncio.Future[None]) -> None:
    """The daemon says stop, or is gone."""
    data = os.read(sys.stdin.fileno(), 4096)
    if not data or b'"stop"' in data:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        serving.cancel()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spiked_client.web", description="Serve the rig's page.")
    options(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        run(args)
    except ClientError as e:
        if args.supervised:
            _tell("fatal", error=str(e), code=2)
        sys.stderr.write(f"{e}\n")
        return 2
    return 0
