"""Every option of a rig's file with its default and what it is for, read from the configuration's own source.

The comments beside the fields of spiked.config are the one place where an option is described.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from spiked import config as configuration


@dataclass(frozen=True)
class Option:
    """One key. `default` None: there is none. `shape` is what goes there when it has no default."""

    key: str
    default: Any
    needed: bool
    shape: str
    choices: tuple[Any, ...]
    about: str


@cache
def _comments() -> dict[tuple[str, str], str]:
    """{(class, field): comment}, from the lines of the field and those right above it."""
    source = inspect.getsource(configuration)
    told = {
        t.start[0]: (t.string.lstrip("# ").strip(), t.line.lstrip().startswith("#"))
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    out = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            above: list[str] = []
            row = field.lineno - 1
            while row in told and told[row][1]:
                above.insert(0, told[row][0])
                row -= 1
            beside = [
                told[n][0] for n in range(field.lineno, (field.end_lineno or field.lineno) + 1) if n in told
            ]
            out[node.name, field.target.id] = " ".join(above + beside)
    return out


def section_about(model: type[BaseModel]) -> str:
    """The section's docstring, its first line."""
    return (inspect.getdoc(model) or "").split("\n")[0] if model.__doc__ else ""


def options(model: type[BaseModel]) -> list[Option]:
    """The keys of a section, in the order of the configuration; tables within it are not among them."""
    out = []
    for key, field in model.model_fields.items():
        if _model(field.annotation) is not None:
            continue
        default = None if field.default is PydanticUndefined else field.default
        choices = _choices(field.annotation)
        about = _comments().get((model.__name__, key), "")
        out.append(Option(key, default, field.is_required(), _shape(field.annotation), choices, about))
    return out


def tables(model: type[BaseModel]) -> list[tuple[str, type[BaseModel], bool]]:
    """(key, model, several) of each table within a section."""
    out = []
    for key, field in model.model_fields.items():
        found = _model(field.annotation)
        if found is not None:
            out.append((key, found, typing.get_origin(field.annotation) is tuple))
    return out


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is tuple:
        return _model(typing.get_args(annotation)[0])
    return None


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of one among others."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(c for a in typing.get_args(annotation) for c in _choices(a))
    return ()


def _shape(annotation: Any) -> str:
    """What to write for a key without a default."""
    kinds = typing.get_args(annotation) or (annotation,)
    if any(k is Path or typing.get_origin(k) is Path for k in kinds):
        return '"FILE"'
    if any(k is str for k in kinds) or _choices(annotation):
        return '"..."'
    if typing.get_origin(annotation) is tuple or any(k is dict for k in kinds):
        return "[...]"
    return "NUMBER"
