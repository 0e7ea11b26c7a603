"""The services' files: complete with their reasons, sound to systemd, fitted to a rig, renewed and removed with care."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from spiked import config as configuration
from spiked.errors import ConfigError
from spiked.rig import adapt, install, units

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt install systemd)")  # fmt: skip
REMOTE = """
[rig]
name = "rigA"
sessions = "{sessions}"
[[stream]]
name = "probe0"
source = "openephys"
address = "tcp://192.0.2.7:5556"
"""


def command(root: Path, *words: str) -> tuple[int, str]:
    """`spiked install-service --root ...`: exit code and what it said."""
    parser = argparse.ArgumentParser()
    install.options(parser)
    said: list[str] = []
    code = install.run(parser.parse_args(["--root", str(root), *words]), said.append)
    return code, "\n".join(said)


@pytest.fixture
def rig(tmp_path: Path) -> Path:
    path = tmp_path / "rig.toml"
    path.write_text(REMOTE.format(sessions=tmp_path / "sessions"))
    return path


@pytest.mark.parametrize(
    "name", ["spiked.service", "spiked-jobs.service", "spiked.slice", "spikedjobs.slice"]
)
def test_every_line_says_why(name: str) -> None:
    lines = units.lines(units.shipped(name))
    assert len(lines) >= 3
    assert [d.key for d in lines if not d.why and d.key != "Description"] == []
    assert units.lines(units.write_unit(lines)) == lines


@needs_systemd
@pytest.mark.parametrize("words", [(), ("--instance", "rigA"), ("--user",)])
def test_systemd_finds_nothing_wrong(rig: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    code, said = command(tmp_path / "root", "--config", str(rig), *words)
    assert code == 0 and "systemd:" not in said
    if "--user" not in words:
        levels = [
            float(row.split("exposure ")[1].split()[0]) for row in said.splitlines() if "exposure" in row
        ]
        assert len(levels) == 2 and max(levels) <= install.EXPOSURE


@needs_systemd
def test_systemd_would_find_something_wrong(
    rig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = units.shipped
    monkeypatch.setattr(
        units, "shipped", lambda name: real(name).replace("WatchdogSec=30", "WatchdogSec=soon")
    )
    code, said = command(tmp_path / "root", "--config", str(rig))
    assert code == 1 and "ignoring: soon" in said


def test_the_drop_in_knows_what_the_rig_needs(tmp_path: Path) -> None:
    config = configuration.parse(
        {
            "rig": {"name": "a", "sessions": "/data/sessions"},
            "stream": [
                {"name": "p", "source": "openephys", "address": "tcp://192.0.2.7:5556"},
                {"name": "q", "source": "maxwell", "electrode_map": "/home/lab/network.cfg"},
            ],
            "mqtt": {"enabled": True, "host": "broker.example"},
            "output": [{"name": "o", "kind": "serial", "address": "/dev/ttyACM0", "patterns": {"x": 1}}],
        }
    )
    layout = units.Layout(Path("/etc/spiked/rig.toml"), root=tmp_path)
    told = [f"{d.key}={d.value}" for d in adapt.drop_in(config, layout)]
    assert told[0] == "RequiresMountsFor=/data/sessions"
    assert {"ReadWritePaths=-/data/sessions", "IPAddressAllow=192.0.2.7", "DeviceAllow=/dev/ttyACM0 rw", "SupplementaryGroups=dialout"} <= set(told)  # fmt: skip
    assert "IPAddressAllow=any" in told  # a broker with a name
    assert "ProtectHome=tmpfs" in told and any(t == "BindReadOnlyPaths=-/home/lab/network.cfg" for t in told)
    here = units.Layout(Path("/tmp/rig/rig.toml"), root=tmp_path)  # where PrivateTmp hides it
    assert "BindReadOnlyPaths=-/tmp/rig/rig.toml" in [
        f"{d.key}={d.value}" for d in adapt.drop_in(config, here)
    ]
    jobs = units.files(layout, adapt.drop_in(config, layout))[
        layout.units / "spiked-jobs.service.d/10-rig.conf"
    ]
    assert "ReadWritePaths" in jobs and "IPAddressAllow" not in jobs and "tty" not in jobs


def test_a_users_service_asks_for_nothing_that_needs_root(rig: Path, tmp_path: Path) -> None:
    layout = units.Layout(rig, user=True, root=tmp_path)
    for name in units.SERVICES:
        keys = {d.key for d in units.lines(units.service(name, layout))}
        assert keys <= units.FOR_USERS and {"Type", "ExecStart", "Restart"} <= keys
    assert "default.target" in units.service("spiked", layout)


def test_instances_share_a_template_and_keep_apart(rig: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("rigA", "rigB"):
        assert command(root, "--config", str(rig), "--instance", name)[0] == 0
    folder = root / "etc/systemd/system"
    text = (folder / "spiked@.service").read_text()
    assert "SPIKED_CONFIG=/etc/spiked/%i.toml" in text and "Also=spiked-jobs@%i.service" in text
    assert "After=spiked@%i.service" in (folder / "spiked-jobs@.service").read_text()
    command(root, "--config", str(rig), "--instance", "rigA", "--uninstall")
    assert (folder / "spiked@.service").exists() and (folder / "spiked@rigB.service.d/10-rig.conf").exists()
    assert not (folder / "spiked@rigA.service.d").exists()
    command(root, "--config", str(rig), "--instance", "rigB", "--uninstall")
    assert [p for p in root.rglob("*") if p.is_file()] == []
    assert (root / "etc/tmpfiles.d").is_dir() and not list(folder.glob("*.d"))  # that one is the system's
    with pytest.raises(ConfigError, match="instance"):
        command(root, "--instance", "../../etc")


def test_renewed_with_care(rig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    unit = root / "etc/systemd/system/spiked.service"
    command(root, "--config", str(rig))
    assert command(root, "--config", str(rig), "--check")[0] == 0
    assert "nothing was written" in command(root, "--config", str(rig))[1]

    own = unit.with_name("spiked.service.d") / "override.conf"  # as `systemctl edit` leaves it
    own.write_text("[Service]\nNice=-5\n")
    rig.write_text(rig.read_text().replace("192.0.2.7", "192.0.2.8"))
    code, said = command(root, "--config", str(rig), "--check")
    assert code == 1 and "-IPAddressAllow=192.0.2.7" in said and "+IPAddressAllow=192.0.2.8" in said
    monkeypatch.setattr(units, "program", lambda: "/srv/new/bin/spiked")  # an upgrade that moved
    code, said = command(root, "--config", str(rig))
    assert "renewed" in said and "/srv/new/bin/spiked run" in said and "spiked.slice" not in said
    assert "ExecStart=/srv/new/bin/spiked run" in unit.read_text()

    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=300"))
    code, said = command(root, "--config", str(rig))
    assert (
        "changed by hand" in said and "WatchdogSec=300" in unit.with_name("spiked.service.saved").read_text()
    )
    assert "WatchdogSec=30\n" in unit.read_text()

    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "recording.nwb").write_text("samples")
    command(root, "--config", str(rig), "--uninstall")
    left = sorted(p.name for p in root.rglob("*") if p.is_file())
    assert left == ["override.conf", "spiked.service.saved"]
    assert rig.exists() and (tmp_path / "sessions" / "recording.nwb").exists()


def test_files_of_others_are_left_alone(rig: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    theirs = root / "etc/systemd/system/spiked.service"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(ConfigError, match="not ours"):
        command(root, "--config", str(rig))
    assert [p for p in root.rglob("*") if p.is_file()] == [theirs]
    command(root, "--config", str(rig), "--uninstall")
    assert theirs.read_text() == "[Service]\nExecStart=/bin/true\n"
    assert command(root, "--config", str(rig), "--force")[0] == 0
    assert "/bin/true" in theirs.with_name("spiked.service.saved").read_text()


def test_explained_line_by_line(rig: Path, tmp_path: Path) -> None:
    code, said = command(tmp_path / "root", "--config", str(rig), "--explain")
    rows = said.splitlines()
    at = rows.index("    OOMPolicy=continue")
    assert code == 0 and "recording goes on" in rows[at + 1] and not (tmp_path / "root").exists()
    assert "    IPAddressAllow=192.0.2.7" in rows


def test_a_file_that_was_named_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "rgi.toml"
    with pytest.raises(
        ConfigError, match=r"there is no .*rgi\.toml; check the path, or .*`spiked init .*rgi\.toml`"
    ):
        command(tmp_path / "root", "--config", str(missing))
    assert not (tmp_path / "root").exists()
    assert command(tmp_path / "root", "--config", str(missing), "--uninstall")[0] == 0
