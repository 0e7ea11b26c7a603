"""Probe files: positions by device channel, and one clear line for every file that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import probeinterface
import pytest

from spiked.errors import ConfigError
from spiked.sources.probe import load_probe, positions_for


def write_probe(path: Path, xy: np.ndarray, device: list[int] | None = None, units: str = "um") -> Path:
    probe = probeinterface.Probe(ndim=2, si_units=units)
    probe.set_contacts(positions=xy, shapes="circle", shape_params={"radius": 5})
    probe.set_contact_ids([f"e{i}" for i in range(len(xy))])
    if device is not None:
        probe.set_device_channel_indices(device)
    probeinterface.write_probeinterface(path, probe)
    return path


def grid(n: int) -> np.ndarray:
    return np.stack([np.arange(n) % 4 * 17.5, np.arange(n) // 4 * 17.5], 1)


def test_positions_follow_the_wiring(tmp_path: Path) -> None:
    xy = grid(8)
    path = write_probe(tmp_path / "p.json", xy, [7, 6, 5, 4, 3, 2, 1, 0])
    assert np.allclose(positions_for(path, 8), xy[::-1])
    loaded = load_probe(path)
    assert loaded.ids[3] == "e3" and loaded.device_channel_indices.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_unwired_file_is_taken_in_contact_order(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "p.json", grid(6))
    assert np.allclose(positions_for(path, 4), grid(6)[:4])


def test_unwired_contacts_between_wired_ones(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "p.json", grid(4), [1, -1, 0, -1])
    assert np.allclose(positions_for(path, 2), grid(4)[[2, 0]])


def test_millimetres_become_micrometres(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "p.json", grid(4) / 1000, [0, 1, 2, 3], units="mm")
    assert np.allclose(positions_for(path, 4), grid(4))


def test_two_probes_of_a_group_are_joined(tmp_path: Path) -> None:
    group = probeinterface.ProbeGroup()
    for k in range(2):
        probe = probeinterface.Probe(ndim=2, si_units="um")
        probe.set_contacts(
            positions=grid(4) + np.array([1000 * k, 0]), shapes="circle", shape_params={"radius": 5}
        )
        probe.set_device_channel_indices(np.arange(4) + 4 * k)
        group.add_probe(probe)
    probeinterface.write_probeinterface(tmp_path / "g.json", group)
    xy = np.asarray(positions_for(tmp_path / "g.json", 8))
    assert np.allclose(xy[4:] - xy[:4], [1000, 0])


def test_too_few_contacts_names_both_numbers(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "p.json", grid(6), list(range(6)))
    with pytest.raises(ConfigError, match="6 contacts but the stream has 16 channels"):
        positions_for(path, 16)


def test_channel_without_contact_is_named(tmp_path: Path) -> None:
    path = write_probe(tmp_path / "p.json", grid(4), [0, 1, 9, 3])
    with pytest.raises(ConfigError, match="channel 2 has no contact"):
        positions_for(path, 4)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"specification": "probeinterface", "version": "0.2.21", "probes": [{"ndim": 2}]}),
        json.dumps({"specification": "probeinterface", "version": "0.2.21", "probes": []}),
        "\x00\x01\x02",
    ],
)
def test_malformed_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.json") as e:
        load_probe(tmp_path / "p.json")
    assert "\n" not in str(e.value)


def test_absent_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read probe file"):
        load_probe(tmp_path / "no.json")
