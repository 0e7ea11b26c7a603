"""Prometheus: the figures of the newest health message, at http://host:port/metrics.

Nothing is measured here and nothing asks the live path: what the supervisor publishes once a second is written down in
another form when somebody scrapes (docs/decisions/0011).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import ssl
from collections import Counter
from collections.abc import Iterator
from email.parser import BytesParser
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from spiked import __version__
from spiked.config import Metrics
from spiked.errors import ConfigError
from spiked_client.figures import FIGURES, PREFIX, Figure

CONNECTIONS = 16
REQUEST_BYTES = 8192
PATIENCE_S = 5.0


class Exposition(Collector):
    """`status` is the newest health message."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        about = GaugeMetricFamily(
            f"{PREFIX}info", "What runs here; always 1.", labels=("rig", "version", "session")
        )
        told = (self.status.get("rig"), __version__, self.status.get("session"))
        about.add_metric([str(t or "") for t in told], 1)
        yield about
        limits = GaugeMetricFamily(
            f"{PREFIX}limit",
            "Where a figure stops being good, and where it is bad.",
            labels=("figure", "limit"),
        )
        for figure in FIGURES:
            for name in ("good", "bad"):
                if (value := getattr(figure, name)) is not None:
                    limits.add_metric([figure.exposed, name], value)
            yield _family(figure, self.status)
        yield limits


def _family(figure: Figure, status: dict[str, Any]) -> Metric:
    name = f"{PREFIX}{figure.name}"
    if figure.kind == "histogram":
        histogram = HistogramMetricFamily(name, figure.about, labels=figure.labels)
        for labels, value in figure.read(status):
            edges = [*(repr(float(e)) for e in value["edges"]), "+Inf"]
            buckets = list(zip(edges, itertools.accumulate(value["n"]), strict=True))
            histogram.add_metric(labels, buckets, sum_value=value["sum"])
        return histogram
    kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
    family = kind(name, figure.about, labels=figure.labels)
    for labels, value in figure.read(status):
        family.add_metric(labels, value)
    return family


class MetricsServer:
    """Answers GET /metrics; `see` a status first. Raises ConfigError where it cannot listen.

    At most 16 connections at once, 8 KiB and five seconds per request. `counters`: scrapes, refused, malformed, busy.
    """

    def __init__(self, cfg: Metrics) -> None:
        self.counters: Counter[str] = Counter()
        self._cfg, self._exposition, self._registry = cfg, Exposition(), CollectorRegistry()
        self._registry.register(self._exposition)
        self._open = 0
        self._token, self._tls = self._read_token(), self._read_certificate()
        self._server: asyncio.Server | None = None

    def _read_token(self) -> bytes:
        if self._cfg.token_file is None:
            return b""
        try:
            token = self._cfg.token_file.expanduser().read_bytes().strip()
        except OSError as e:
            raise ConfigError(f"cannot read metrics.token_file {self._cfg.token_file}: {e.strerror}") from e
        if len(token) < 16:
            raise ConfigError(
                "metrics.token_file holds less than 16 characters; `openssl rand -hex 32` makes a good token"
            )
        return token

    def _read_certificate(self) -> ssl.SSLContext | None:
        cert, key = self._cfg.cert_file, self._cfg.key_file
        if cert is None or key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(cert.expanduser(), key.expanduser())
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(
                f"cannot use the metrics certificates {cert}, {key}: {e}; check that they are PEM"
            ) from e
        return context

    def see(self, status: dict[str, Any]) -> None:
        """The health message to tell from now on."""
        self._exposition.status = status

    async def start(self) -> None:
        """Listen."""
        host, port = self._cfg.host, self._cfg.port
        patience = {} if self._tls is None else {"ssl_handshake_timeout": PATIENCE_S}
        try:
            self._server = await asyncio.start_server(
                self._serve, host, port, ssl=self._tls, limit=REQUEST_BYTES, **patience
            )
        except OSError as e:
            raise ConfigError(
                f"metrics cannot listen on {host}:{port}: {e.strerror}; stop the program that has the port, or choose another"
            ) from e

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server else 0

    async def close(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > CONNECTIONS:
                self.counters["busy"] += 1
                return
            async with asyncio.timeout(PATIENCE_S):
                writer.write(await self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            self.counters["malformed"] += 1
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await writer.wait_closed()

    async def _answer(self, request: bytes) -> bytes:
        first, _, rest = request.partition(b"\r\n")
        try:
            method, target, _ = first.decode("ascii").split(" ")
        except ValueError:
            self.counters["malformed"] += 1
            return _reply("400 Bad Request", "not an HTTP request\n")
        headers = BytesParser().parsebytes(rest, headersonly=True)
        if self._token:
            given = str(headers.get("Authorization", "")).encode("utf-8", "replace")
            if not hmac.compare_digest(given, b"Bearer " + self._token):
                self.counters["refused"] += 1
                return _reply(
                    "401 Unauthorized", "give the token of metrics.token_file\n", "WWW-Authenticate: Bearer"
                )
        if method not in ("GET", "HEAD") or target.partition("?")[0] != "/metrics":
            self.counters["refused"] += 1
            return _reply("404 Not Found", "there is /metrics here\n")
        self.counters["scrapes"] += 1
        encoder, content_type = choose_encoder(str(headers.get("Accept", "")))
        body = await asyncio.to_thread(encoder, self._registry)
        return _reply("200 OK", body if method == "GET" else b"", content_type=content_type)


def _reply(
    status: str, body: str | bytes, *headers: str, content_type: str = "text/plain; charset=utf-8"
) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data
