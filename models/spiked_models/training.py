"""Train a detection network on synthetic recordings: `python -m spiked_models.training --help`.

The architecture is RT-Sort's (networks.py). Unlike the published training, which pastes mean waveforms into
noise snippets, the windows are cut from continuous multi-channel synthetic recordings (examples.py), so that
overlaps, bursts, companion electrodes and sub-threshold units come as they would. Per-frame binary
cross-entropy, AdamW, cosine schedule. A published network may be added as a teacher (distillation): its probabilities
on the same recordings are targets as well. Lookahead is a choice of the run: it shifts the labels, nothing else.

The run is a function of its arguments alone and goes on from its checkpoint when started again. At the end
it levels the logits (`levelled`), validates on recordings of other seeds, chooses the thresholds, and writes
<name>.safetensors and the card. `--steps 0 --start NAME` does that alone with a network that is there.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from spiked_models.cards import WEIGHTS, Card, NetworkError, available, card, sha256_of
from spiked_models.examples import LIMIT_SD, MASKED, VALIDATION_SEED, Labelled, draw
from spiked_models.networks import DetectionNetwork, Layers, load
from spiked_models.scoring import TOLERANCE_MS, found_in, logits_of, score
from spiked_models.streaming import StreamingNetwork

log = logging.getLogger("spiked_models.training")

INPUT_SCALE = 0.125  # 8 microvolt of noise become 1 without inference scaling
NUMERATOR = 1.349 / INPUT_SCALE  # with it, the median noise SD becomes 1
POOL = 48  # recordings in memory at any time
AT_ONCE = 12  # of them in one batch
TAUGHT_EVERY = 4  # a teacher, far slower than its pupils, is asked about one recording in so many
WINDOW_MS, MEDIAN_MS = 16, 10
LICENCE = "GPL-3.0-or-later"
LEVEL = 0.95  # the probability at which a finished network detects best
SORTING_P = (0.275, 0.1)  # stringent, loose: RT-Sort's own, which fit a levelled network


@dataclass(frozen=True)
class Plan:
    """Everything that determines a run."""

    name: str
    fs_hz: int
    kernels: tuple[int, ...]
    lookahead: int
    width: int
    steps: int
    batch: int
    seed: int
    rate: float  # peak learning rate
    refresh: int  # steps between new recordings
    teacher: str  # folder of a published network, or empty
    teacher_weight: float
    start: str = ""  # network to begin with, narrower or of another rate, or empty

    @property
    def lookback(self) -> int:
        return sum(self.kernels) - len(self.kernels) - self.lookahead

    def command(self) -> str:
        start = f" --start {Path(self.start).name}" if self.start else ""
        taught = f" --teacher {Path(self.teacher).name} --teacher-weight {self.teacher_weight:g}"
        teacher = taught if self.teacher else ""
        return (f"python -m spiked_models.training --name {self.name} --fs {self.fs_hz} --width {self.width} "
                f"--kernels {' '.join(map(str, self.kernels))} --lookahead {self.lookahead} "
                f"--steps {self.steps} --batch {self.batch} --seed {self.seed} --rate {self.rate:g} "
                f"--refresh {self.refresh}{start}{teacher}")  # fmt: skip


class Trainee(nn.Module):
    """The network under training: (batch, samples) -> (batch, samples - lookback - lookahead).

    A convolution over a plane of height 1 in channels-last order: the fastest form for a CPU.
    """

    def __init__(self, kernels: Sequence[int], width: int) -> None:
        super().__init__()
        sizes = pairwise((1, width, width, width, 1))
        self.conv = nn.ModuleList(nn.Conv2d(a, b, (1, k)) for (a, b), k in zip(sizes, kernels, strict=True))
        for layer in self.conv:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_normal_(self.conv[3].weight)
        nn.init.constant_(self.conv[3].bias, -5.0)  # spikes are rare
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None, None].contiguous(memory_format=torch.channels_last)
        for layer in list(self.conv)[:3]:
            h = functional.relu(layer(h), inplace=True)
        return self.conv[3](h)[:, 0, 0]

    @torch.no_grad()
    def begin_as(self, other: DetectionNetwork, earlier: int = 0) -> None:
        """Take over a network of at most this width and any rate, so that training begins where it left off.

        `earlier`: samples of lookahead to give up: the last layer's taps move into the past, the latest are lost.

        Taps are interpolated at equal times. Further hidden channels keep their random inputs and are not yet
        heard by the old ones, so the outputs stay the same (Chen et al. 2016, Net2Net).
        """
        if other.width > self.conv[0].out_channels:
            raise NetworkError(f"{other.name} is wider ({other.width}) than the network to be trained")
        for layer, (weight, bias) in zip(self.conv, other.layers, strict=True):
            taps, old = layer.kernel_size[1], weight.shape[2]
            if taps != old:
                weight = functional.interpolate(weight, taps, mode="linear", align_corners=True)
                weight = weight * ((old - 1) / (taps - 1))
            if earlier > 0 and layer is self.conv[3]:
                weight = functional.pad(weight, (earlier, 0))[:, :, :taps]
            rows, columns = weight.shape[:2]
            layer.weight[:rows] = 0
            layer.weight[:rows, :columns, 0] = weight
            layer.bias[:rows] = bias

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """The weights as the loader wants them: (out, in, kernel) and (out,)."""
        return [(c.weight.detach()[:, :, 0].contiguous().float(), c.bias.detach().float()) for c in self.conv]


@dataclass(frozen=True)
class Taught:
    """A recording and a teacher's probabilities for its frames (float16, negative where it has none)."""

    data: Labelled
    probability: np.ndarray | None


def taught(seed: int, fs_hz: float, teacher: DetectionNetwork | None, cache: Path | None) -> Taught:
    """Draw a recording and ask the teacher, or read what an earlier run kept in `cache`."""
    path = cache and cache / f"{fs_hz:g}-{seed}-{teacher.sha256[:12] if teacher else 'labels'}.npz"
    if path and path.is_file():
        with np.load(path) as kept:
            known = kept["probability"] if teacher else None
            return Taught(Labelled(kept["traces"].astype(np.float32), kept["labels"], fs_hz), known)
    data = draw(seed, fs_hz)
    data = replace(data, traces=data.traces.astype(np.float16).astype(np.float32))
    out = Taught(data, _asked(teacher, data) if teacher else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as f:
            none = np.zeros((0, 0), np.float16)
            given = none if out.probability is None else out.probability
            np.savez(f, traces=data.traces.astype(np.float16), labels=data.labels, probability=given)
        os.replace(part, path)
    return out


def _asked(teacher: DetectionNetwork, data: Labelled) -> np.ndarray:
    """The teacher's probabilities on the traces less their baseline (medians of 10 ms, joined by lines)."""
    block, n = round(MEDIAN_MS * data.fs_hz / 1000), data.traces.shape[1]
    levels = np.median(data.traces[:, : n // block * block].reshape(len(data.traces), -1, block), axis=2)
    middles = (np.arange(levels.shape[1]) + 0.5) * block
    base = np.stack([np.interp(np.arange(n), middles, level) for level in levels])
    stream = StreamingNetwork(teacher, len(base), precision="auto")
    logits = stream.process_array((data.traces - base).astype(np.float32), _noise_gain(teacher))
    out = np.full(data.traces.shape, -1, np.float16)
    first = teacher.lookback
    out[:, first : logits.shape[1]] = 1 / (1 + np.exp(-logits[:, first:].astype(np.float64)))
    return out


def batches(
    plan: Plan, first_step: int, teacher: DetectionNetwork | None = None, cache: Path | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Windows (batch, length) in noise SD, their labels and the teacher's probabilities, from `first_step` on."""
    length = round(WINDOW_MS * plan.fs_hz / 1000)
    inner = slice(plan.lookback, length - plan.lookahead)
    pool: dict[int, Taught] = {}
    for step in range(first_step, plan.steps):
        newest = POOL + step // plan.refresh
        for i in range(newest - POOL, newest):
            if i not in pool:
                asked = teacher if i % TAUGHT_EVERY == 0 else None
                pool[i] = taught(plan.seed * 1_000_003 % VALIDATION_SEED + i, plan.fs_hz, asked, cache)
        pool = {i: r for i, r in pool.items() if i >= newest - POOL}
        rng = np.random.default_rng(np.random.SeedSequence([plan.seed, 5, step]))
        x, y, p = [], [], []
        for i, share in zip(rng.choice(list(pool), AT_ONCE, replace=False), _parts(plan.batch), strict=True):
            recording = pool[int(i)]
            data = recording.data
            # Twice as many as needed: windows with a spike are preferred.
            channel = rng.integers(0, len(data.traces), 2 * share)
            start = rng.integers(0, data.traces.shape[1] - length, 2 * share)
            at = start[:, None] + np.arange(length)
            labels = data.labels[channel[:, None], at]
            some = (labels[:, inner] != 0).any(1)
            pick = np.argsort(-(some * 0.5 + rng.random(2 * share)), kind="stable")[:share]
            x.append(data.traces[channel[pick, None], at[pick]])
            y.append(labels[pick])
            known = recording.probability
            none = np.full((share, length), -1, np.float16)
            p.append(none if known is None else known[channel[pick, None], at[pick]])
        told = torch.from_numpy(np.concatenate(p).astype(np.float32)) if teacher else None
        yield _prepare(np.concatenate(x), plan.fs_hz, rng), torch.from_numpy(np.concatenate(y)), told


def _parts(batch: int) -> list[int]:
    return [batch // AT_ONCE + (i < batch % AT_ONCE) for i in range(AT_ONCE)]


def _prepare(x: np.ndarray, fs_hz: int, rng: np.random.Generator) -> Tensor:
    """Subtract the median of 10 ms somewhere in the window; vary the baseline a little, and the gain."""
    inner = round(MEDIAN_MS * fs_hz / 1000)
    start = int(rng.integers(0, x.shape[1] - inner))
    t = torch.from_numpy(x)
    t = t - t[:, start : start + inner].median(dim=1, keepdim=True).values
    base = torch.from_numpy(rng.normal(0, 0.1, (len(x), 1)).astype(np.float32))
    gain = torch.from_numpy(np.exp(rng.normal(0, 0.15, (len(x), 1))).astype(np.float32))
    return (t + base) * gain


def loss_of(logits: Tensor, labels: Tensor, told: Tensor | None, weight: float) -> Tensor:
    """Cross-entropy summed over the frames of a window, mean over windows; MASKED frames do not count.

    `told`: the teacher's probabilities of all frames (negative: none), added with `weight`.
    """
    counted = (labels != MASKED).float()
    each = functional.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
    loss = (each * counted).sum() / len(logits)
    if told is not None and weight > 0:
        known, target = (told >= 0).float(), told.clamp(min=0)
        each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = loss + weight * (each * known).sum() / len(logits)
    return loss


def train(plan: Plan, work: Path, cache: Path | None = None) -> tuple[Trainee, dict[str, Any]]:
    """Run the plan, or what is left of it. Returns the network and figures of the run."""
    torch.manual_seed(plan.seed)
    net = Trainee(plan.kernels, plan.width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    warm = min(200, plan.steps // 10 + 1)

    def pace(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (
            0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, plan.steps)))) + 0.01
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    if plan.start:
        known = load(plan.start)
        net.begin_as(known, round(known.lookahead * plan.fs_hz / known.fs_hz) - plan.lookahead)
    teacher = load(plan.teacher) if plan.teacher else None
    done, seconds, mean = 0, 0.0, float("nan")
    checkpoint = work / f"{plan.name}.checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done, seconds, mean = saved["done"], saved["seconds"], saved["mean"]
        log.info("%s goes on at step %d of %d", plan.name, done, plan.steps)
    start, last = time.monotonic() - seconds, time.monotonic()
    for step, (x, labels, told) in enumerate(batches(plan, done, teacher, cache), done):
        inner = slice(plan.lookback, labels.shape[1] - plan.lookahead)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        told = None if told is None else told[:, inner]
        loss = loss_of(logits.float(), labels[:, inner], told, plan.teacher_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        mean = float(loss.detach()) if np.isnan(mean) else 0.98 * mean + 0.02 * float(loss.detach())
        if step % 200 == 199:
            spent = time.monotonic() - start
            log.info("%s step %d of %d: loss %.3f, %.0f s", plan.name, step + 1, plan.steps, mean, spent)
        if time.monotonic() - last > 60 or step + 1 == plan.steps:
            last = time.monotonic()
            parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            _save({**state, "done": step + 1, "seconds": last - start, "mean": mean}, checkpoint)
    loss = None if math.isnan(mean) else round(mean, 4)
    return net, {"loss": loss, "seconds": round(time.monotonic() - start)}


def _save(state: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def validate(student: DetectionNetwork, compare: str, n_recordings: int) -> dict[str, Any]:
    """Scores of the network on unseen seeds, and of a published network on the same data if one is named.

    Against the published network: its detections at its best threshold on these data take the place of the labels.
    """
    recordings = [draw(VALIDATION_SEED + i, student.fs_hz, 24, 1.5) for i in range(n_recordings)]
    what = (
        f"{n_recordings} synthetic recordings of unseen seeds, 24 channels x 1.5 s; waves of at least "
        f"{LIMIT_SD:g} noise SD on their electrode, tolerance {TOLERANCE_MS:g} ms"
    )
    mine = _logits(student, recordings)
    if not compare:
        return {"validation": what, "this network": score(mine, recordings)}
    other = load(compare)
    theirs = _logits(other, recordings)
    published = score(theirs, recordings)
    p = published["stringent"]["p"]
    its = [found_in(logits, r, p) for logits, r in zip(theirs, recordings, strict=True)]
    return {
        "validation": what,
        "this network": score(mine, recordings, its),
        "published RT-Sort network, same data": {"sha256": other.sha256, **published},
    }


def _logits(network: DetectionNetwork, recordings: list[Labelled]) -> list[np.ndarray]:
    """Of whole recordings, by the streaming kernels in float32: many times faster than the batch network."""
    streams: dict[int, StreamingNetwork] = {}

    def windows(x: Tensor) -> Tensor:
        stream = streams.setdefault(len(x), StreamingNetwork(network, len(x), precision="float32"))
        stream.reset()
        return stream.process(x)[:, network.lookback :]

    reach, gain = (network.lookback, network.lookahead), _noise_gain(network)
    return [logits_of(windows, r, *reach, gain) for r in recordings]


def levelled(layers: Layers, best_p: float) -> Layers:
    """The same layers with the last bias moved so that the probability `best_p` becomes LEVEL.

    No detection changes, the thresholds move along. Trained on single frames, a network gives a wave whose exact
    trough the noise hides a few percent and no more; RT-Sort weighs electrodes by their probability and leaves out
    those below 0.03, so it lost the weak ones. The published networks say 0.9 and more where they are sure.
    """
    *others, (weight, bias) = layers
    return (*others, (weight, bias + math.log(LEVEL / (1 - LEVEL)) - math.log(best_p / (1 - best_p))))


def _noise_gain(network: DetectionNetwork) -> float:
    """What one noise SD is at the network's input."""
    return network.inference_scaling_numerator / 1.349 * network.input_scale


def finish(plan: Plan, net: Trainee, run: dict[str, Any], out: Path, compare: str, n_validation: int) -> Card:
    """Level, validate, choose the thresholds, write weights and card into `out`."""
    student = DetectionNetwork(
        plan.name, plan.fs_hz, tuple(net.layers()), INPUT_SCALE, NUMERATOR, 0.5, 0.5, "", plan.lookahead
    )
    best_p = validate(student, "", n_validation)["this network"]["stringent"]["p"]
    layers = levelled(student.layers, best_p)
    metrics = validate(replace(student, layers=layers), compare, n_validation)
    stringent, loose = (metrics["this network"][k]["p"] for k in ("stringent", "loose"))
    training = {"command": plan.command(), "windows": plan.steps * plan.batch, **run}
    if plan.start:
        training["start_sha256"] = load(plan.start).sha256
        if plan.start in available():
            training["start"] = card(plan.start).training
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{plan.name}.safetensors"  # which may be that of plan.start
    tensors = {f"conv.{i}.weight": w for i, (w, _) in enumerate(layers)}
    tensors |= {f"conv.{i}.bias": b for i, (_, b) in enumerate(layers)}
    save_file(tensors, path, metadata={"licence": LICENCE})
    path.chmod(0o644)  # safetensors writes for its owner alone
    data = (
        "spiked_models.synthesis and .examples: parametric cells and waves, synthetic noise, no recorded data"
    )
    if plan.teacher:
        data += (
            "; distilled in part from RT-Sort's published weights (van der Molen, Lim et al. 2024, MIT), "
            f"sha256 {load(plan.teacher).sha256}"
        )
    about = Card(
        plan.name, float(plan.fs_hz), list(plan.kernels), plan.width, student.lookahead, student.lookback,
        INPUT_SCALE, NUMERATOR, stringent, loose, data, plan.seed, training, metrics, LICENCE,
        sha256_of(path), list(SORTING_P),
    )  # fmt: skip
    (out / f"{plan.name}.json").write_text(about.to_json(), encoding="utf-8")
    log.info("%s written; stringent %g, loose %g", plan.name, stringent, loose)
    return about


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m spiked_models.training", description=__doc__.split("\n\n")[0])
    p.add_argument("--name", required=True)
    p.add_argument("--fs", type=int, default=20000, help="sampling rate in Hz, a multiple of 1000")
    p.add_argument("--width", type=int, default=50, help="channels of the hidden layers")
    p.add_argument("--kernels", type=int, nargs=4, help="taps of the layers; RT-Sort's: rate in kHz + 1")
    p.add_argument("--lookahead", type=int, help="samples after the one judged; RT-Sort's: half of the rest")
    p.add_argument("--steps", type=int, default=10000)
    p.add_argument("--batch", type=int, default=192, help="windows of 16 ms per step")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--refresh", type=int, default=10, help="steps between new recordings in the pool")
    p.add_argument("--start", default="", help="network to begin with: narrower, or of another rate")
    p.add_argument("--teacher", default="", help="folder of a published network to distil from")
    p.add_argument("--teacher-weight", type=float, default=0.2)
    p.add_argument("--compare", default="", help="folder of a published network to score on the same data")
    p.add_argument("--validation", type=int, default=12, help="number of validation recordings")
    p.add_argument("--work", type=Path, default=Path("."), help="folder of the checkpoint")
    p.add_argument("--cache", type=Path, help="folder in which drawn recordings are kept for further runs")
    p.add_argument("--out", type=Path, default=WEIGHTS, help="folder for weights and card")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(a.threads)
    kernels = tuple(a.kernels or [a.fs // 1000 + 1] * 4)
    lookahead = (sum(kernels) - 4) // 2 if a.lookahead is None else a.lookahead
    plan = Plan(
        a.name, a.fs, kernels, lookahead, a.width, a.steps, a.batch, a.seed, a.rate, a.refresh, a.teacher,
        a.teacher_weight, a.start,
    )  # fmt: skip
    a.work.mkdir(parents=True, exist_ok=True)
    net, run = train(plan, a.work, a.cache)
    finish(plan, net, run, a.out, a.compare, a.validation)


if __name__ == "__main__":
    main()
