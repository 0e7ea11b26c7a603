"""A rig's file as text: what was answered, and every other option as a comment with its default."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from spiked.config import Config, toml_value
from spiked.rig.described import Option, options, section_about, tables

WIDTH, BESIDE = 110, 44

Answers = Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]]


def rig_file(answers: Answers, head: str) -> str:
    """The text. `answers` are sections by name, as the TOML file has them; `stream` is a list."""
    out = [*(f"# {row}".rstrip() for row in head.splitlines()), ""]
    for name, model, several in tables(Config):
        given = answers.get(name)
        out += [f"# {row}" for row in textwrap.wrap(section_about(model), WIDTH - 2)]
        if several:
            entries = list(given) if isinstance(given, Sequence) else []
            for i, entry in enumerate(entries):  # what there is to choose from stands with the first
                out += [f"[[{name}]]", *_body(model, entry, rest=i == 0), ""]
            if not entries:
                out += [f"# [[{name}]]", *_body(model, {}), ""]
            continue
        out += _table(name, model, given if isinstance(given, Mapping) else {})
    return "\n".join(out).rstrip() + "\n"


def _table(name: str, model: type[BaseModel], given: Mapping[str, Any]) -> list[str]:
    out = [f"[{name}]", *_body(model, given), ""]
    for key, inner, several in tables(model):
        if not several:
            out += [f"# {row}" for row in textwrap.wrap(section_about(inner), WIDTH - 2)]
            found = given.get(key, {})
            out += _table(f"{name}.{key}", inner, found if isinstance(found, Mapping) else {})
    return out


def _body(model: type[BaseModel], given: Mapping[str, Any], rest: bool = True) -> list[str]:
    """What was answered and, with `rest`, the other options as comments."""
    out: list[str] = []
    for option in options(model):
        if option.key in given:
            out += _line(option, f"{option.key} = {toml_value(given[option.key])}", "")
        elif rest:
            out += _line(option, f"{option.key} = {_default(option)}", "# ")
    return out


def _default(option: Option) -> str:
    return option.shape if option.default is None else toml_value(option.default)


def _line(option: Option, text: str, mark: str) -> list[str]:
    """The option with what it is for: beside it where that fits, else above it."""
    about = option.about
    if len(option.choices) > 1:
        listed = " or ".join(", ".join(toml_value(c) for c in option.choices).rsplit(", ", 1))
        about = f"{listed}; {about}" if about else listed
    if not about:
        return [mark + text]
    row = f"{mark + text:<{BESIDE}}  # {about}"
    if len(row) <= WIDTH:
        return [row]
    return [*(f"## {part}" for part in textwrap.wrap(about, WIDTH - 3)), mark + text]
