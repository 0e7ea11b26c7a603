"""Parametric cells: extracellular action potentials from a prescribed-voltage cable (numpy only).

A cell is a tree of point compartments: soma, axon initial segment, axon, dendrites. The membrane voltage of
each compartment is prescribed: one action potential shape that is delayed, widened and attenuated on its way
into the dendrites and carried at full height along the axon. Neighbouring compartments exchange axial current
in proportion to their voltage difference, so the membrane currents of a cell sum to zero at every instant,
and the potential at an electrode is the sum of the currents over 4 pi sigma r. From these few rules follow
the narrow negative spike near the soma, its decay between 1/r and 1/r^2, positive return-current lobes over
the dendrites, the growing delay of back-propagation and small triphasic spikes along the axon. Point-source
potentials: Holt and Koch 1999; the components of extracellular spikes: Gold et al. 2006. All shapes and
ranges here are drawn from parameters; no recorded or published waveform enters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked_models.shapes import FAMILIES

OVERSAMPLE = 4  # templates are computed at this multiple of the sampling rate, one phase per sub-sample shift
PRE_MS, POST_MS = 1.5, 3.0  # template extent around the trough of the root electrode


@dataclass(frozen=True)
class Template:
    """One cell as the electrodes see it, trough of the root electrode at -1 (or a positive peak at +1).

    waves: (OVERSAMPLE, channels of the template, frames) float32, one sub-sample shift each; shift k
    delays the wave by k / OVERSAMPLE frames. channels: (n,) index into the recording's channels. root: the
    channel with the largest peak. The root's peak sits at frame `pre`.
    """

    waves: np.ndarray
    channels: np.ndarray
    root: int
    pre: int
    soma_um: tuple[float, float, float]

    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Per channel: frame of the trough and its height (negative), without sub-sample shift.

        Where the positive peak is more than twice the trough, that peak and its (positive) height instead.
        """
        w = self.waves[0]
        at, high = w.argmin(1), w.argmax(1)
        rows = np.arange(len(w))
        up = w[rows, high] > -2 * w[rows, at]
        at = np.where(up, high, at)
        return at, w[rows, at]


def action_potential(
    t_ms: np.ndarray, rise_ms: float, width_ms: float, ahp: float, ahp_ms: float
) -> np.ndarray:
    """Membrane voltage, rest 0, peak about 1 at t = 0; any shape of `t_ms`.

    rise_ms: SD of the Gaussian upstroke; width_ms: decay of the repolarisation; ahp, ahp_ms: depth and time
    to the maximum of the after-hyperpolarisation.
    """
    up = np.exp(-0.5 * (np.minimum(t_ms, 0) / rise_ms) ** 2)
    late = np.maximum(t_ms, 0)
    down = 1 / (1 + (late / width_ms) ** 3)
    after = ahp * (late / ahp_ms) * np.exp(1 - late / ahp_ms)
    return up * down - after


@dataclass(frozen=True)
class Morphology:
    """Compartments of a cell: place, parent and the voltage each one is given. All arrays (compartments,)."""

    position_um: np.ndarray  # (compartments, 3), relative to the soma
    parent: np.ndarray  # index of the parent, -1 for the soma
    conductance: np.ndarray  # to the parent, relative
    delay_ms: np.ndarray
    height: np.ndarray  # of the action potential, relative to the soma's
    stretch: np.ndarray  # its width, relative to the soma's


def _branch(rng: np.random.Generator, length_um: float, step_um: float, flat: float) -> np.ndarray:
    """(n, 3) offsets of a wandering path that starts at the origin, `flat` < 1 keeps it near the plane."""
    n = max(2, round(length_um / step_um))
    heading = rng.normal(size=3) * (1, 1, flat)
    steps = heading / np.linalg.norm(heading) + rng.normal(size=(n, 3)) * (0.25, 0.25, 0.25 * flat)
    return np.cumsum(steps * (step_um / np.linalg.norm(steps, axis=1, keepdims=True)), axis=0)


def grow(rng: np.random.Generator) -> Morphology:
    """Draw a cell: soma, 2 to 6 dendrites, initial segment and axon."""
    position, parent, conductance = [np.zeros((1, 3))], [-1], [0.0]
    delay, height, stretch = [0.0], [1.0], [1.0]
    flat = rng.uniform(0.2, 1.0)

    def add(path: np.ndarray, g: np.ndarray, late: np.ndarray, high: np.ndarray, wide: np.ndarray) -> None:
        first = len(parent)
        position.append(path)
        parent.extend([0, *range(first, first + len(path) - 1)])
        for into, values in ((conductance, g), (delay, late), (height, high), (stretch, wide)):
            into.extend(values.tolist())

    speed = rng.uniform(0.3, 1.0)  # m/s = mm/ms, back into the dendrites
    space_um = rng.uniform(80, 350)  # attenuation length of back-propagation
    for _ in range(rng.integers(2, 7)):
        path = _branch(rng, rng.uniform(60, 300), 20.0, flat)
        way = 20.0 * np.arange(1, len(path) + 1)
        taper = rng.uniform(0.2, 1.0) * np.exp(-way / rng.uniform(100, 400))
        add(path, taper, way / 1000 / speed, np.exp(-way / space_um), 1 + way / 1000 * rng.uniform(0.5, 3))
    path = _branch(rng, rng.uniform(60, 700), 20.0, flat)
    way = 20.0 * np.arange(1, len(path) + 1)
    site = rng.uniform(15, 50)  # where the spike starts on the initial segment
    ahead = rng.uniform(0.05, 0.25)  # ms by which it leads the soma
    speed = rng.uniform(0.3, 1.0)
    late = np.where(way <= site, -ahead * way / site, -ahead + (way - site) / 1000 / speed)
    initial = rng.uniform(0.3, 2.0) * np.exp(-0.5 * ((way - site) / 20) ** 2)
    add(path, rng.uniform(0.03, 0.25) + initial, late, np.full(len(path), rng.uniform(0.9, 1.2)),
        np.full(len(path), rng.uniform(0.5, 0.9)))  # fmt: skip
    return Morphology(np.concatenate(position), np.array(parent), np.array(conductance), np.array(delay),
                      np.array(height), np.array(stretch))  # fmt: skip


def membrane_currents(m: Morphology, t_ms: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(compartments, len(t_ms)) membrane current, outward positive, arbitrary unit; columns sum to zero."""
    fast = rng.random() < 0.3  # narrow-spiking cell
    rise = rng.uniform(0.06, 0.10) if fast else rng.uniform(0.09, 0.17)
    width = rng.uniform(0.12, 0.22) if fast else rng.uniform(0.22, 0.60)
    shape = rise, width, rng.uniform(0.03, 0.20), rng.uniform(0.5, 1.6)
    t = (t_ms[None] - m.delay_ms[:, None]) / m.stretch[:, None]
    v = m.height[:, None] * action_potential(t, *shape)
    child = np.arange(1, len(m.parent))
    flow = m.conductance[child, None] * (v[m.parent[child]] - v[child])  # from the parent into the child
    current = np.zeros_like(v)
    current[child] += flow
    np.subtract.at(current, m.parent[child], flow)
    return current


def _potential(
    positions_um: np.ndarray, soma_um: tuple[float, float, float], t_ms: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(channels, len(t_ms)) of a newly drawn cell, arbitrary unit."""
    cell = grow(rng)
    current = membrane_currents(cell, t_ms, rng)
    sources = cell.position_um + np.asarray(soma_um)
    # A neurite that wanders through an electrode would give an infinite potential: its own radius bounds r.
    reach = (
        np.abs(positions_um[:, None, 0] - sources[:, 0]) ** 2
        + (positions_um[:, None, 1] - sources[:, 1]) ** 2
    )
    distance = np.sqrt(reach + np.maximum(np.abs(sources[:, 2]), 8.0) ** 2)
    return np.asarray((1 / distance) @ current)


def make_template(
    positions_um: np.ndarray, fs_hz: float, soma_um: tuple[float, float, float], rng: np.random.Generator,
    keep: float = 0.02, inverted: bool = False, family: str = "cable",
) -> Template:  # fmt: skip
    """Draw a cell at `soma_um` (z: distance from the plane of the electrodes) and record it.

    Channels on which the wave stays below `keep` of its peak on the root are left out. `family`: cable, or one of
    shapes.FAMILIES.
    """
    fine = fs_hz * OVERSAMPLE / 1000  # fine frames per ms
    pre, post = round(PRE_MS * fs_hz / 1000), round(POST_MS * fs_hz / 1000)
    # The axon may carry the largest wave up to 2.6 ms after the soma.
    t = np.arange(-round(3 * fine), round((POST_MS + 3.5) * fine)) / fine
    if family == "cable":
        wave = _potential(positions_um, soma_um, t, rng)
    else:
        wave = FAMILIES[family](positions_um, np.asarray(soma_um), t, rng)
    wave -= wave[:, :1]
    if inverted:
        wave = -wave
    trough, height = wave.min(1), wave.max(1)
    root = int(np.argmax(np.maximum(-trough, 0.5 * height)))
    upward = height[root] > -2 * trough[root]
    centre = int(wave[root].argmax() if upward else wave[root].argmin())
    centre = min(max(centre, pre * OVERSAMPLE + OVERSAMPLE), wave.shape[1] - post * OVERSAMPLE)
    wave = wave / abs(wave[root, centre])
    channels = np.flatnonzero(np.abs(wave).max(1) >= keep)
    edge = np.ones(pre + post)
    ramp = np.sin(np.linspace(0, np.pi / 2, round(0.4 * fs_hz / 1000))) ** 2
    edge[: len(ramp)], edge[-len(ramp) :] = ramp, ramp[::-1]
    start = centre - pre * OVERSAMPLE
    shifts = [wave[channels, start - k : start - k + (pre + post) * OVERSAMPLE : OVERSAMPLE] * edge
              for k in range(OVERSAMPLE)]  # fmt: skip
    return Template(np.stack(shifts).astype(np.float32), channels, root, pre, soma_um)
