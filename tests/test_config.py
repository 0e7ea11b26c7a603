"""The configuration: what is written loads again; what is wrong is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from spiked import config
from spiked.errors import ConfigError

MINIMAL = {"stream": [{"name": "a", "source": "maxwell"}]}


def test_dump_loads_to_the_same_configuration(tmp_path: Path) -> None:
    full = config.parse(
        {
            "rig": {
                "name": "rigA",
                "sessions": str(tmp_path),
                "description": 'quote " and \\ and\nnewline, µ, tab\t, \r\x07\x7f',
            },
            "stream": [
                {"name": "p0", "source": "openephys", "uv_per_bit": 0.195, "stim_lines": [1, 3]},
                {"name": "p1", "source": "replay", "path": "/data/x.nwb", "speed": 0},
                {"name": "p2", "source": "openephys", "uv_per_bit": "float"},
            ],
            "offline": {"params": {"nblocks": 0, "x_centers": [1.5, 2.0], "a key": {"b.c": "d"}}},
        }
    )
    (tmp_path / "c.toml").write_text(config.dump(full))
    assert config.load(tmp_path / "c.toml") == full


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stream": []}, "at least one"),
        ({"strem": 1}, "unknown key strem; did you mean stream"),
        ({"live": {"chunk": 1}}, "unknown key live.chunk"),
        ({"live": {"calibrate": 1}}, "unknown key live.calibrate; did you mean calibrate_s"),
        (
            {"offline": {"guards": {"stall_ms": 1}}},
            "unknown key offline.guards.stall_ms; did you mean stall_s",
        ),
        ({"rig": {"quite_another_thing": 1}}, "unknown key rig.quite_another_thing; remove it"),
        (
            {"stream": [{"nmae": "a", "source": "maxwell"}]},
            r"unknown key stream.0.nmae; did you mean name\? \(and 1",
        ),
        ({"live": {"chunk_ms": "fast"}}, "live.chunk_ms = 'fast'"),
        ({"live": {"sorter": "templates", "sequences": "a.h5"}}, "sequences are for RT-Sort"),
        ({"live": {"sorter": "rt_sort", "templates": "a.h5"}}, "templates are not for RT-Sort"),
        ({"publish": {"live_port": 70000}}, "publish.live_port"),
        ({"publish": {"host": "0.0.0.0"}}, "publish.host"),
        ({"stream": [{"name": "a", "source": "replay"}]}, "needs path"),
        ({"stream": [{"name": "a b", "source": "maxwell"}]}, "stream.0.name"),
        ({"stream": [{"name": "a", "source": "maxwell"}] * 2}, "must differ"),
        (
            {"stream": [{"name": "a", "source": "maxwell", "address": "localhost:7204"}]},
            "must look like tcp://",
        ),
    ],
)
def test_wrong_configuration_is_one_line_naming_the_key(change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        config.parse({**MINIMAL, **change})
    assert "\n" not in str(e.value)


def test_units_brought_along_say_which_sorter_runs() -> None:
    stream = [{"name": "a", "source": "maxwell"}]
    for live, sorter in (
        ({}, "templates"),
        ({"sequences": "a.h5"}, "rt_sort"),
        ({"templates": "a.h5"}, "templates"),
    ):
        assert config.parse({"stream": stream, "live": live}).live.sorter == sorter


def test_files_that_are_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[rig\n")
    with pytest.raises(ConfigError, match="not TOML"):
        config.load(tmp_path / "bad.toml")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets" / "mine").mkdir(parents=True)
    (tmp_path / "c.toml").write_text(
        '[rig]\nsessions = "here"\n[live]\nnetwork = "nets/mine"\n'
        '[[stream]]\nname = "a"\nsource = "replay"\npath = "rec.nwb"\n'
    )
    monkeypatch.chdir(tmp_path)
    loaded = config.load("c.toml")
    assert loaded.stream[0].path == tmp_path / "rec.nwb"
    assert loaded.rig.sessions == tmp_path / "here"
    assert loaded.live.network == str(tmp_path / "nets" / "mine")
    (tmp_path / "c.toml").write_text(
        '[live]\nnetwork = "rtsort-20k"\n[[stream]]\nname = "a"\nsource = "maxwell"\n'
    )
    assert config.load("c.toml").live.network == "rtsort-20k"
