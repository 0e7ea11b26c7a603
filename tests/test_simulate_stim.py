"""The simulated device closes the loop: commands in, artifacts and evoked spikes out, at the right samples."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from output_rig import PATIENT_MS, acks, closing, command, eventually, opened, ready
from source_rig import blocks_of, collect, events_of, into_ring, noise_codes, serving, some_info
from source_rig import opened as source_opened

from spiked.errors import ConfigError, SourceError
from spiked.rehearsal import free_ports
from spiked.sources import simulate_command, simulate_stim_inputs
from spiked.sources.simulate import Cycle, MaxwellWire, OpenEphysWire, Stored, Synthetic
from spiked.sources.simulate_stim import Pattern, Pulse, Stimulation, cells_made, cells_seen, rails
from spiked_models.synthesis import hdmea_grid, synthesize

FS = 20_000


@pytest.fixture(scope="module")
def made() -> Any:
    return synthesize(
        hdmea_grid(6, 6), FS, 12.0, 6, seed=3, adc=simulate_adc(), snr=(12, 25), rate_hz=(5, 12)
    )


def simulate_adc() -> Any:
    from spiked_models.synthesis import Adc

    return Adc(lsb_uv=6.29, zero_code=512, dtype="uint16", code_min=0, code_max=1023)


def stimulation(made: Any, **options: Any) -> Stimulation:
    return Stimulation(Synthetic(made, "s").info, cells_made(made), **options)


def served(s: Stimulation, codes: np.ndarray, block: int, pulses: dict[int, Pulse]) -> np.ndarray:
    """Blocks as the server hands them over; a pulse comes while its sample's block is being acquired."""
    out = []
    for a in range(0, len(codes), block):
        b = min(a + block, len(codes))
        for at, pulse in pulses.items():
            if a <= at < b:
                s.fire(pulse)
        out.append(s.apply(a, codes[a:b], lambda ns: ns))
    return np.concatenate(out)


def test_an_artifact_from_its_sample_on_clipped_near_and_small_afar(made: Any) -> None:
    s = stimulation(made, evoked_p=0.0)
    out = served(s, made.codes, 20, {10_007: Pulse(Pattern((14,)), 10_007)})
    np.testing.assert_array_equal(out[:10_007], made.codes[:10_007])
    np.testing.assert_array_equal(out[10_007 + 1200 :], made.codes[10_007 + 1200 :])
    assert s.stims[0][1] == 10_007 and out.dtype == made.codes.dtype
    moved = np.abs(out.astype(int) - made.codes)
    assert (moved[10_007] > 100).all()
    railed = (out == 0) | (out == 1023)
    ms = railed[10_007:11_007].sum(0) / 20
    away = np.linalg.norm(s.info.positions - s.info.positions[14], axis=1)
    assert 2.0 < ms[14] < 4.0 and ms[away < 20].mean() > 1.2 * ms[away > 50].mean() > 0
    late = moved[10_007 + 100 : 10_007 + 140].mean(0)  # 5 to 7 ms after
    assert late[away < 20].mean() > 5 and moved[10_007 + 1000 : 10_007 + 1200].max() <= 3


@pytest.mark.parametrize("block", [1, 7, 460])
def test_the_same_samples_however_they_are_cut(made: Any, block: int) -> None:
    pulses = {3_000: Pulse(Pattern((14,), 4, 150.0), 3_000), 3_100: Pulse(Pattern((20, 21)), 3_100)}
    whole = served(stimulation(made, evoked_p=1.0, seed=5), made.codes[:8_000], 8_000, pulses)
    cut = served(stimulation(made, evoked_p=1.0, seed=5), made.codes[:8_000], block, pulses)
    np.testing.assert_array_equal(whole, cut)


def test_evoked_spikes_lie_where_the_log_says(made: Any) -> None:
    s = stimulation(made, evoked_p=1.0)
    codes = np.full((4_000, 36), 512, np.uint16)
    s._shape = lambda *_: np.zeros((1, 36), np.float32)  # type: ignore[method-assign]
    out = served(s, codes, 20, {1_000: Pulse(Pattern((14,)), 1_000)})
    assert len(s.evoked) >= 2
    expected = np.full((4_000, 36), 512, np.float32)
    for sample, unit in s.evoked:
        assert 1_000 + 20 <= sample <= 1_000 + 20 * 8
        cell = s.cells[unit]
        expected[sample - cell.pre : sample - cell.pre + len(cell.wave), cell.channels] += cell.wave
        assert np.abs(cell.wave[cell.pre]).max() == np.abs(cell.wave).max()
    np.testing.assert_array_equal(out, np.rint(expected).clip(0, 1023))


def test_cells_seen_in_a_recording_are_the_cells_that_made_it(made: Any) -> None:
    truth = SimpleNamespace(
        samples=made.spikes["sample"].astype(int),
        units=made.spikes["unit"].astype(int),
        unit_ids=np.arange(6),
    )
    recording = SimpleNamespace(
        info=Synthetic(made, "s").info, first_sample=0, n_samples=len(made.codes), ground_truth=truth,
        read=lambda a, b: made.codes[a:b],
    )  # fmt: skip
    seen, known = cells_seen(recording), cells_made(made)
    assert [c.unit for c in seen] == [c.unit for c in known]
    for a, b in zip(seen, known, strict=True):
        assert np.abs(a.wave).max() == pytest.approx(np.abs(b.wave).max(), rel=0.25)
        assert np.abs(a.wave).max(1).argmax() == pytest.approx(a.pre, abs=1)


def test_rails() -> None:
    assert rails(some_info(1, 1e4, "uint16", zero_code=512.0)) == (0, 1023)
    assert rails(some_info(1, 1e4)) == (-32768, 32767)
    assert rails(some_info(1, 1e4, code_min=-512, code_max=511)) == (-512, 511)


def test_a_ttl_edge_beside_the_artifact_and_nothing_lost(tmp_path: Path) -> None:
    info = some_info(4, 10_000.0)
    codes = noise_codes(100_000, 4, spread=5)
    signal = Stored(_Memory(info, codes))
    s = Stimulation(info, [], line=2)
    with (
        serving(signal, OpenEphysWire(info, False), duration_s=9.0, stimulation=s, first_sample=500) as (address, report),
        source_opened("openephys", address, stim_lines=(2,)) as (source, found),
    ):  # fmt: skip
        items = []
        while sum(len(b.data) for b in blocks_of(items)) < 3000:
            items += source.read(0.05)
        s.fire(Pulse(Pattern((1,)), time.monotonic_ns()))
        items += collect(source)
        report()
    at = s.stims[0][1]
    assert [(e.sample, e.line, e.state) for e in events_of(items)] == [(at + 500, 2, 1), (at + 510, 2, 0)]
    with into_ring(items, found, tmp_path / "ring") as (data, integrity, _):
        assert integrity.counters["gaps"] == 0 and len(data) == 90_000
        np.testing.assert_array_equal(data[:at], codes[:at])
        assert (np.abs(data[at].astype(int) - codes[at]) > 1000).all()
    assert sum(len(b.data) for b in blocks_of(items)) == 90_000


class _Memory:
    def __init__(self, info: Any, codes: np.ndarray) -> None:
        self.info, self._codes, self.n_samples = info, codes, len(codes)

    def read(self, a: int, b: int) -> np.ndarray:
        return self._codes[a:b]


def test_commands_over_the_trigger_socket_and_as_maxlab_takes_them() -> None:
    """The artifact begins at the sample that existed when the command came."""
    info = some_info(4, 10_000.0, "uint16", 6.29, zero_code=512.0)
    codes = (noise_codes(20_000, 4, spread=5) + 512).clip(0, 1023).astype(np.uint16)
    signal, s = Cycle(info, codes), Stimulation(info, [])
    ports = free_ports(2)
    known = {"tetanus": Pattern((0, 1), 3, 200.0)}
    text = f"tcp://127.0.0.1:{ports[1]}"
    with (
        closing(opened("zmq", f"tcp://127.0.0.1:{ports[0]}", timeout_ms=PATIENT_MS)) as output,
        simulate_stim_inputs.Inputs(s, known, f"tcp://127.0.0.1:{ports[0]}", text),
        closing(opened("maxlab", text, timeout_ms=PATIENT_MS)) as chip,
        serving(signal, MaxwellWire(info, False), duration_s=15.0, stimulation=s) as (address, report),
        source_opened("maxwell", address, fs_hz=10_000.0) as (source, _),
    ):
        reading = threading.Thread(target=collect, args=(source,))
        reading.start()
        eventually(lambda: output.poll() == [] and output.there)  # type: ignore[attr-defined]
        ready(chip)
        output.send(command("single", electrodes=(3,)))
        output.send(command("single", electrodes=(4,)))
        output.send(command("single", electrodes=()))
        good, far, none = acks(output, 3)
        assert good.ok and not far.ok and not none.ok
        assert "there are channels 0 to 3" in far.text and "no pattern 'single'" in none.text
        chip.send(command("tetanus"))
        chip.send(command("unknown"))
        assert [a.ok for a in acks(chip, 2)] == [True, False]
        sent = report()
        reading.join(200)
    rows = s.stims
    assert [r[3] for r in rows] == [4711, -1] and [r[5] for r in rows] == [1, 3]
    for row in rows:
        existed = (row[2] - sent.started_ns) / 1e9 * 10_000
        # a late sender begins with the samples it still has
        assert 0 <= row[1] - round(existed) <= 20 + sent.most_behind_s * 10_000


def arguments(*args: str) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    simulate_command.options(p)
    return p.parse_args(args)


def test_the_command_from_its_arguments_to_its_log(tmp_path: Path) -> None:
    ports = free_ports(2)
    address, log = f"tcp://127.0.0.1:{ports[0]}", tmp_path / "stim.npz"
    args = arguments(
        "--address", f"tcp://127.0.0.1:{ports[1]}", "--electrodes", "4x4", "--duration-s", "15", "--stim-text", address,
        "--pattern", "probe=5:2@100", "--stim-log", str(log), "--evoked-prob", "1",
    )  # fmt: skip
    box: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: box.update(simulate_command.run(args, lambda _s: None)))
    thread.start()
    with source_opened("maxwell", f"tcp://127.0.0.1:{ports[1]}", fs_hz=20_000.0) as (source, _):
        with closing(opened("maxlab", address, timeout_ms=PATIENT_MS)) as chip:
            ready(chip)
            chip.send(command("probe"))
            assert acks(chip)[0].ok
        collect(source)
        thread.join(200)
    assert box["stims"] == 1 and box["stim_errors"] == []
    with np.load(log) as z:
        (row,) = z["stims"]
        assert 100_000 <= row["sample"] < 400_000 and row["pulses"] == 2
        assert len(z["evoked_samples"]) >= 1 and (z["evoked_samples"] > row["sample"]).all()


def test_arguments_that_make_no_sense() -> None:
    info = some_info(4, 10_000.0)
    with pytest.raises(ConfigError, match=r"--pattern 'a' must look like"):
        simulate_stim_inputs.patterns(["a"], 4)
    with pytest.raises(ConfigError, match="there are channels 0 to 3"):
        simulate_stim_inputs.patterns(["a=4"], 4)
    with pytest.raises(ConfigError, match="real time only"):
        simulate_stim_inputs.make(arguments("--stim", "--speed", "0"), info, None)
    with zmq.Context() as context, context.socket(zmq.REP) as other:
        port = other.bind_to_random_port("tcp://127.0.0.1")
        inputs = simulate_stim_inputs.Inputs(Stimulation(info, []), {}, None, f"tcp://127.0.0.1:{port}")
        with pytest.raises(SourceError, match="cannot answer on"):
            inputs.__enter__()
