"""MaxLab Live: a sequence prepared on the system, started by its name over the server's text port.

Prepare it with `maxlab.Sequence(name, persistent=True)`; `system.Event` in it writes the stimulus into the
vendor's own file. The server answers OK.
"""

from __future__ import annotations

from spiked.act.outputs.exchange import Exchange, Words
from spiked.act.outputs.transports import ZmqRequests, host_and_port, reach
from spiked.config import Output

ADDRESS = "tcp://127.0.0.1:7210"


def open_output(config: Output) -> Exchange:
    """Patterns go by their own name, or by the sequence's that the configuration gives them."""
    address, host, port = host_and_port(config.address, ADDRESS, ("tcp",))
    reach(config.name, host, port)

    def sequence(pattern: str) -> bytes | None:
        name = str(config.patterns.get(pattern, pattern))
        return f"sequence_send {name}".encode() if name and not set(name) & set(" \r\n\t") else None

    words = Words(raise_=sequence, judge=_answer)
    return Exchange(config.name, f"MaxLab at {address}", ZmqRequests(address), words, config.timeout_ms)


def _answer(reply: bytes) -> tuple[bool, str]:
    text = reply.decode("utf-8", "replace").strip("\r\n\t \0")
    return text.upper().startswith("OK"), text
