"""Typed parameters: each says its kind, limits, default and help, and refuses a wrong value in one line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spiked.errors import ConfigError

INT, FLOAT, BOOL, TEXT, LIST, ANY = "whole number", "number", "true or false", "text", "list", "any"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sorter. `least` and `most` are allowed themselves, `exclude` is not; `items` is the kind of a
    list's items, `length` how many of them there must be (0: any). `optional`: null is allowed."""

    name: str
    kind: str
    default: Any
    help: str = ""
    least: float = -math.inf
    most: float = math.inf
    exclude: tuple[float, ...] = ()
    choices: tuple[Any, ...] = ()
    optional: bool = False
    items: str = ANY
    length: int = 0

    def check(self, value: Any) -> Any:
        """The value in its own type; ValueError says what it should have been."""
        if value is None:
            if self.optional or self.default is None:
                return None
            raise ValueError(self.wanted())
        if self.choices and value not in self.choices:
            raise ValueError(self.wanted())
        if self.kind == LIST:
            return self._list(value)
        return self._one(value, self.kind)

    def _list(self, value: Any) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = [value]
        if self.length and len(value) != self.length:
            raise ValueError(self.wanted())
        return [self._one(v, self.items) for v in value]

    def _one(self, value: Any, kind: str) -> Any:
        if kind == TEXT:
            if isinstance(value, bool) or not isinstance(value, (str, int)):
                raise ValueError(self.wanted())
            return str(value)
        if kind == BOOL:
            if not isinstance(value, bool):
                raise ValueError(self.wanted())
            return value
        if kind not in (INT, FLOAT):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise ValueError(self.wanted())
        if kind == INT:
            if not math.isfinite(value) or value != int(value):
                raise ValueError(self.wanted())
            value = int(value)
        else:
            value = float(value)
        if not self.least <= value <= self.most or value in self.exclude:
            raise ValueError(self.wanted())
        return value

    def wanted(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            text = "one of " + ", ".join(str(c) for c in self.choices)
        elif self.kind == LIST:
            many = f"{self.length} " if self.length else ""
            text = f"a list of {many}{self.items}s" if self.items != ANY else "a list"
        else:
            text = {INT: "a whole number", FLOAT: "a number", TEXT: "a text"}.get(self.kind, self.kind)
        text += self.limits()
        return f"{text}, or null" if self.optional or self.default is None else text

    def limits(self) -> str:
        """' of at least 1', ' above 0 and at most 10', '' where there are none."""
        parts = []
        if self.least > -math.inf:
            parts.append(
                f"above {self.least:g}" if self.least in self.exclude else f"of at least {self.least:g}"
            )
        if self.most < math.inf:
            parts.append(f"below {self.most:g}" if self.most in self.exclude else f"at most {self.most:g}")
        return " " + " and ".join(parts) if parts else ""


def checked(sorter: str, table: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` in its own types. ConfigError names the first parameter that does not exist, with the one that was most
    likely meant, or that has a value it cannot have."""
    known = {p.name: p for p in table}
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{sorter} has no parameter {name!r}; {_meant(sorter, name, list(known))}")
        try:
            out[name] = known[name].check(value)
        except ValueError as e:
            raise ConfigError(f"{sorter} parameter {name} = {value!r}: it must be {e}") from e
    return out


def _meant(sorter: str, name: str, known: list[str]) -> str:
    same = [k for k in known if k.lower() == name.lower()]
    near = same or difflib.get_close_matches(name.lower(), [k.lower() for k in known], 1, 0.5)
    if near:
        return f"did you mean {next(k for k in known if k.lower() == near[0].lower())}?"
    return f"`spiked sorters {sorter}` lists them"


def listing(table: Sequence[Parameter]) -> list[str]:
    """Lines for the terminal: name, kind with limits, default, help."""
    lines = []
    for p in table:
        default = "null" if p.default is None else str(p.default).lower() if p.kind == BOOL else p.default
        lines.append(f"  {p.name} = {default}   ({p.wanted()})")
        if p.help:
            lines.append(f"      {p.help}")
    return lines


def plain(text: str) -> str:
    """Help text on one line."""
    return " ".join(text.split())
