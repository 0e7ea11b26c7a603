"""The files and folders that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from spiked import config as configuration

WRITTEN = ("rig.sessions", "rig.runtime")


def named(config: configuration.Config) -> list[tuple[str, Path]]:
    """(key, path) of everything that is read and has to be there; absolute, as `load` makes them."""
    found = [(key, path) for key, path in _paths(config, "") if key not in WRITTEN]
    found.append(("live.network", Path(config.live.network)))
    found += [(f"trigger {t.name}: call", Path(t.call.rpartition(":")[0])) for t in config.trigger if ".py:" in t.call]  # fmt: skip
    return [(key, path) for key, path in found if path.is_absolute()]


def _paths(model: BaseModel, before: str) -> Iterator[tuple[str, Path]]:
    for key in type(model).model_fields:
        value = getattr(model, key)
        name = f"{before}{key}"
        if isinstance(value, Path):
            yield name, value
        elif isinstance(value, BaseModel):
            yield from _paths(value, f"{name}.")
        elif isinstance(value, tuple):
            for part in value:
                if isinstance(part, BaseModel):
                    yield from _paths(part, f"{name} {getattr(part, 'name', '')}: ")
