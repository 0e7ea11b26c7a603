"""A synthetic recording as a folder: what a benchmark runs on when it is given none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import probeinterface

from spiked.errors import ConfigError
from spiked_models import synthesis

FS_HZ, LSB_UV = 20_000.0, 3.3e6 / 1024 / 512  # a MaxLab array at its usual gain


def grid(text: str) -> np.ndarray:
    """Positions (channels, 2) of a grid written like 8x8, in micrometre."""
    rows, cross, columns = text.partition("x")
    try:
        return synthesis.hdmea_grid(int(rows), int(columns if cross else ""))
    except ValueError as e:
        raise ConfigError(f"--electrodes {text!r} must look like 8x8") from e


def write(folder: Path, positions: np.ndarray, seconds: float, units: int, seed: int = 1) -> Path:
    """Make `seconds` of a MaxLab-like array with known spikes; traces.npy, ground_truth.npz, probe.json, params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    adc = synthesis.Adc(lsb_uv=LSB_UV, zero_code=512, dtype="uint16", code_min=0, code_max=1023)
    made = synthesis.synthesize(positions, FS_HZ, seconds, units, seed, adc=adc)
    np.save(folder / "traces.npy", made.codes)
    known = made.units[: made.n_units]
    np.savez(
        folder / "ground_truth.npz", spike_samples=made.spikes["sample"], spike_units=made.spikes["unit"], unit_ids=np.arange(len(known)),
        unit_snr=np.array([u.snr for u in known]), unit_peak_channel=np.array([u.template.root for u in known]),
    )  # fmt: skip
    probe = probeinterface.Probe(ndim=2, si_units="um")
    probe.set_contacts(positions, shapes="square", shape_params={"width": 9.0})
    probe.set_device_channel_indices(np.arange(len(positions)))
    probeinterface.write_probeinterface(folder / "probe.json", probe)
    params = {
        "sampling_frequency": FS_HZ, "n_channels": len(positions), "n_samples": len(made.codes), "dtype": "uint16", "lsb_uv": LSB_UV,
        "zero_code": 512, "code_min": 0, "code_max": 1023, "seed": seed, "n_units": units,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return folder
