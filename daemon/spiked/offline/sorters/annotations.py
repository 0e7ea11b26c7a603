"""Parameters from Python annotations: the fields of a typed configuration, ours or another package's."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiked.offline.sorters.parameters import ANY, BOOL, FLOAT, INT, LIST, TEXT, Parameter, plain

KINDS: dict[Any, str] = {bool: BOOL, int: INT, float: FLOAT, str: TEXT, Path: TEXT}


def parameter(
    name: str, annotation: Any, default: Any, text: str = "", limits: Iterable[Any] = ()
) -> Parameter:
    """The parameter of a field. `limits` are what pydantic calls its metadata: objects with gt, ge, lt or le."""
    found: dict[str, Any] = {"kind": ANY, "choices": (), "optional": False, "limits": list(limits)}
    _read(annotation, found)
    least, most, exclude = -math.inf, math.inf, []
    for limit in found["limits"]:
        for word in ("gt", "ge", "lt", "le"):
            value = getattr(limit, word, None)
            if value is None:
                continue
            least, most = (value, most) if word[0] == "g" else (least, value)
            if word.endswith("t"):
                exclude.append(value)
    value = str(default) if isinstance(default, Path) else default
    return Parameter(
        name,
        found["kind"],
        value,
        plain(text),
        least,
        most,
        tuple(exclude),
        found["choices"],
        found["optional"],
    )


def _read(annotation: Any, found: dict[str, Any]) -> None:
    """Into `found`: kind, choices, whether null is allowed, limits."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in KINDS:
        found["kind"] = KINDS[annotation]
    elif origin is typing.Annotated:
        for word in inside[1:]:
            found["limits"] += [word, *getattr(word, "metadata", ())]
        _read(inside[0], found)
    elif origin is typing.Literal:
        found["choices"] = inside
        found["kind"] = KINDS.get(type(inside[0]), ANY)
    elif origin in (typing.Union, types.UnionType):
        found["optional"] = type(None) in inside
        kinds = [a for a in inside if a is not type(None)]
        for one in kinds:
            _read(one, found)
        if str in kinds and len(kinds) > 1:  # the choices are not all there are
            found["choices"], found["kind"] = (), TEXT
    elif origin in (list, tuple) or str(origin).endswith("Sequence'>"):
        found["kind"] = LIST
