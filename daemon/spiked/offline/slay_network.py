"""SLAy's autoencoder: trained on a session's spikes, kept for the next session of the same probe and animal.

A snippet is a spike's waveform (microvolt) on the electrodes nearest to its unit's peak, nearest first, so that only its shape tells. Two
units are as alike as their spikes' latent clouds overlap, less where one is seen at the other's peak electrode much smaller.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from spiked.config import Slay
from spiked.offline.manifest import digest, write_json

WINDOW_MS = (0.5, 1.5)  # before and after the spike
EPOCHS, BATCH, RATE = 25, 128, 1e-4  # as SLAy trains
LEAST_SPIKES = 20  # fewer: the unit is not compared
MOST_SNIPPETS = 100_000
WORSE = (
    0.1  # a kept network that explains so much less of the variance than when it was trained is trained anew
)

Say = Callable[[float, str], None]


@dataclass(frozen=True)
class Store:
    """Where networks are kept, and of which animal they are; an unknown animal's stay with its session."""

    folder: Path
    animal: str = ""
    session: str = ""

    def path(self, analyzer: Any, channels: int, length: int) -> Path:
        """The file of the network for this probe, rate and animal."""
        places = analyzer.get_channel_locations()
        shape = np.round(places - places.min(0), 1).tolist()
        key = digest(shape, float(analyzer.sampling_frequency), channels, length, self.animal)
        return self.folder / f"{key}.pt"


def snippets(analyzer: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """((snippets, samples * channels) float32 microvolt, (snippets,) rows of their units)."""
    extension = analyzer.get_extension("waveforms")
    templates = analyzer.get_extension("templates").get_templates(operator="average")
    places = analyzer.get_channel_locations()
    fs = analyzer.sampling_frequency
    start = extension.nbefore - round(WINDOW_MS[0] * fs / 1000)
    stop = extension.nbefore + round(WINDOW_MS[1] * fs / 1000)
    most = max(MOST_SNIPPETS // max(len(analyzer.unit_ids), 1), LEAST_SPIKES)
    out, rows = [], []
    for k, unit in enumerate(analyzer.unit_ids):
        peak = int(np.abs(templates[k]).max(0).argmax())
        near = np.argsort(np.hypot(*(places - places[peak]).T), kind="stable")[:channels]
        waveforms = extension.get_waveforms_one_unit(unit, force_dense=True)[:most]
        out.append(waveforms[:, start:stop][:, :, near].reshape(len(waveforms), -1).astype(np.float32))
        rows.append(np.full(len(waveforms), k))
    return np.concatenate(out), np.concatenate(rows)


def similarity(analyzer: Any, network: Any, channels: int) -> np.ndarray:
    """(units, units), symmetric, diagonal 0. Units of fewer than LEAST_SPIKES spikes are like none."""
    import torch

    x, rows = snippets(analyzer, channels)
    device = next(network.parameters()).device
    with torch.no_grad():
        latents = torch.cat(
            [network.encode(p.to(device)).cpu() for p in torch.from_numpy(x).split(4096)]
        ).numpy()
    n = len(analyzer.unit_ids)
    count = np.bincount(rows, minlength=n)
    centre = np.stack(
        [latents[rows == k].mean(0) if count[k] else np.zeros(latents.shape[1]) for k in range(n)]
    )
    away = np.linalg.norm(latents - centre[rows], axis=1)
    spread = np.bincount(rows, away, n) / np.maximum(count, 1)
    alike = np.exp(-cdist(centre, centre) / np.maximum(2 * (spread[:, None] + spread[None]), 1e-12))
    alike *= _decay(analyzer)
    alike[count < LEAST_SPIKES] = 0
    alike[:, count < LEAST_SPIKES] = 0
    np.fill_diagonal(alike, 0)
    return np.asarray(alike)


def _decay(analyzer: Any) -> np.ndarray:
    """(units, units): geometric mean of how much of either unit is left at the other's peak electrode."""
    templates = analyzer.get_extension("templates").get_templates(operator="average")
    size = np.ptp(templates, axis=1)  # (units, channels)
    peak = np.abs(templates).max(1).argmax(1)
    left = size[:, peak] / np.maximum(size[np.arange(len(size)), peak], 1e-12)[:, None]
    return np.asarray(np.sqrt(left * left.T))


def network_for(analyzer: Any, wish: Slay, store: Store, device: str, say: Say) -> tuple[Any, str]:
    """(the network of this probe and animal, what was done to have it). Same spikes, same network."""
    import torch
    from slay.autoencoder import AE

    channels = min(wish.channels, analyzer.get_num_channels())
    x, rows = snippets(analyzer, channels)
    length = x.shape[1] // channels
    path = store.path(analyzer, channels, length)

    def fresh() -> Any:
        torch.manual_seed(0)
        return AE(num_chan=channels, num_samp=length).to(device)

    why = "as wished" if wish.retrain else ""
    if path.is_file() and not wish.retrain:
        network = fresh()
        card, why = _loaded(network, path, x)
        if not why:
            return network, f"network of {card['session']} ({card['trained']})"
    network = fresh()
    _train(network, x, rows, say)
    explained = _explained(network, x)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(network.state_dict(), beside)
    beside.replace(path)
    card = {
        "session": store.session, "animal": store.animal, "trained": time.strftime("%Y-%m-%d"), "fs_hz": float(analyzer.sampling_frequency),
        "channels": channels, "samples": length, "snippets": len(x), "units": len(analyzer.unit_ids), "explained": explained,
    }  # fmt: skip
    write_json(path.with_suffix(".json"), card)
    return network, f"network trained on {len(x)} spikes" + (f" ({why})" if why else "")


def _loaded(network: Any, path: Path, x: np.ndarray) -> tuple[dict[str, Any], str]:
    """(its card, why it cannot serve or '')."""
    import pickle

    import torch

    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        before = float(card["explained"])
        card["session"], card["trained"]
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as e:
        return {}, f"the one before cannot be read: {type(e).__name__}"
    now = _explained(network, x)
    if now < before - WORSE:
        return card, f"the one before explains {now:.0%} of these waveforms, and {before:.0%} of its own"
    return card, ""


def _explained(network: Any, x: np.ndarray) -> float:
    """Share of the snippets' variance that comes back out of the network."""
    import torch

    device = next(network.parameters()).device
    with torch.no_grad():
        lost = sum(
            float(((network(p.to(device))[0].cpu() - p) ** 2).sum()) for p in torch.from_numpy(x).split(4096)
        )
    return 1 - lost / max(float(((x - x.mean(0)) ** 2).sum()), 1e-12)


def _train(network: Any, x: np.ndarray, rows: np.ndarray, say: Say) -> None:
    """As SLAy trains: mean squared error, Adam, every unit drawn equally often."""
    import torch

    data = torch.from_numpy(x)
    device = next(network.parameters()).device
    weight = torch.from_numpy(1.0 / np.bincount(rows)[rows])
    drawn = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    for epoch in range(EPOCHS):
        order = torch.multinomial(weight, max(len(x) * 4 // 5, 1), replacement=True, generator=drawn)
        lost = 0.0
        for part in order.split(BATCH):
            batch = data[part].to(device)
            loss = torch.nn.functional.mse_loss(network(batch)[0], batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lost += float(loss.detach()) * len(part)
        say(
            (epoch + 1) / EPOCHS,
            f"training the autoencoder, round {epoch + 1} of {EPOCHS}, error {lost / len(order):.3g}",
        )
