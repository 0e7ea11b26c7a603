"""SpikeGLX: digital lines of its National Instruments device, over the command server.

`NIDOSET Dev4/port0/line5 255` raises, 0 lowers; the lowest eight bits are those of port 0, the next of port 1.
The server answers OK or ERROR and a text, and closes a connection that is silent for about 10 s.
"""

from __future__ import annotations

import re

from spiked.act.outputs.exchange import Exchange, Words
from spiked.act.outputs.transports import TcpBytes, host_and_port, reach
from spiked.config import Output
from spiked.errors import ConfigError

ADDRESS = "tcp://127.0.0.1:4142"
ALIVE_S = 4.0
LINE = re.compile(r"[\w-]+/port([0-3])(/line\d+(:\d+)?)?")


def open_output(config: Output) -> Exchange:
    """Patterns are lists of lines, such as "Dev4/port0/line5" or "Dev4/port0/line0:1,Dev4/port0/line5"."""
    raises, lowers = {}, {}
    for pattern, lines in config.patterns.items():
        bits = _bits(str(lines))
        if bits == 0:
            raise ConfigError(f"output {config.name}: {pattern} = {lines!r} must look like Dev4/port0/line5")
        raises[pattern] = f"NIDOSET {lines} {bits}\n".encode()
        lowers[pattern] = f"NIDOSET {lines} 0\n".encode()
    address, host, port = host_and_port(config.address, ADDRESS, ("tcp",))
    reach(config.name, host, port)
    words = Words(
        raise_=raises.get,
        lower=lowers.__getitem__,
        pulse_ns=round(config.pulse_ms * 1e6),
        patterns=tuple(lowers),
        judge=_answer,
        alive=b"NOOP\n",
        alive_s=ALIVE_S,
    )
    return Exchange(config.name, f"SpikeGLX at {address}", TcpBytes(host, port), words, config.timeout_ms)


def _bits(lines: str) -> int:
    """All bits of the ports that the lines are on; 0 where one of them makes no sense."""
    bits = 0
    for line in lines.split(","):
        found = LINE.fullmatch(line)
        if found is None:
            return 0
        bits |= 255 << 8 * int(found[1])
    return bits


def _answer(reply: bytes) -> tuple[bool, str] | None:
    if not reply.endswith(b"\n"):
        return None
    last = reply.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return last == "OK", last.removeprefix("ERROR ")
