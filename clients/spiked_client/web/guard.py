"""Who may open the page, and how often anybody may ask for anything.

On loopback without an access list whoever is on this computer may do everything, as over the control port. A browser on it may be
led here by any other page, so requests must name this computer as their host and come from this page. Beyond loopback there is TLS,
and a token of the access list (`spiked keys`), which the page exchanges once for a cookie that scripts cannot read.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from spiked_client.access import AccessList

COOKIE = "spiked"
SESSION_S, MAX_SESSIONS = 12 * 3600.0, 256
MAX_SOURCES = 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a server bound to this address is reached from this computer only."""
    return host in LOOPBACK


@dataclass(frozen=True)
class Visitor:
    """Somebody who may come in."""

    name: str
    role: str


HERE = Visitor("this computer", "stimulate")


class Bucket:
    """`burst` at once, `per_s` in the long run."""

    def __init__(self, burst: float, per_s: float) -> None:
        self.burst, self.per_s = burst, per_s
        self._left, self._at = burst, time.monotonic()

    def take(self) -> bool:
        """Whether there is one more."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self.per_s, self.burst)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Buckets:
    """One bucket per source; the sources that were heard longest ago are forgotten."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._size = burst, per_s
        self._of: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, source: str) -> bool:
        bucket = self._of.pop(source, None) or Bucket(*self._size)
        self._of[source] = bucket
        if len(self._of) > MAX_SOURCES:
            self._of.popitem(last=False)
        return bucket.take()


class Guard:
    """`access` None: only on loopback, everybody there may do everything."""

    def __init__(self, access: AccessList | None, *, loopback: bool) -> None:
        self.access, self._loopback = access, loopback
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()  # cookie -> token, until

    def foreign(self, request: Any) -> str:
        """Why a request is not one of this page; empty: it is."""
        host = request.headers.get("Host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self._loopback and not is_loopback(
            name
        ):  # another name that leads here is a trick (DNS rebinding)
            return "this page answers as localhost only"
        origin = request.headers.get("Origin")
        if origin is None:
            return (
                "" if request.headers.get("Sec-Fetch-Site") in (None, "none", "same-origin") else "other site"
            )
        return "" if origin == f"{request.scheme}://{host}" else "a page of another site may not ask here"

    def visitor(self, request: Any) -> Visitor | None:
        """Whose request this is; None: nobody's we know."""
        if self.access is None:
            return HERE
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            token = self._token_of(request.cookies.get(COOKIE, ""))
        return self._known(token) if token else None

    def login(self, token: str) -> tuple[str, Visitor] | None:
        """A cookie's value for whoever has this token."""
        visitor = self._known(token)
        if visitor is None:
            return None
        cookie = secrets.token_urlsafe(32)
        self._sessions[cookie] = (token, time.monotonic() + SESSION_S)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return cookie, visitor

    def logout(self, request: Any) -> None:
        self._sessions.pop(request.cookies.get(COOKIE, ""), None)

    def _token_of(self, cookie: str) -> str:
        token, until = self._sessions.get(cookie, ("", 0.0))
        if until < time.monotonic():
            self._sessions.pop(cookie, None)
            return ""
        return token

    def _known(self, token: str) -> Visitor | None:
        entry = None if self.access is None or len(token) > 256 else self.access.client_of_token(token)
        return None if entry is None else Visitor(entry.name, entry.role)
