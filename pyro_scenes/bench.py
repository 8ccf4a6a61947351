"""What training and evaluation cost on the machine at hand, in ratios first.

Contestants take turns, a step each a round, in an order that is reversed every round, so that
whatever else the machine does hits all alike. Ratios are taken within a round; every figure is a
median with the least and the most. Compared are

- a training step of ours (`LAVAEObjective.backward` after the warm-up, in one of the steps in
  which the location map learns; clipping, the optimiser) beside the same step with the ELBO of
  `plain.py`, without Pyro: the same networks, sampling and estimator on the same batch, with the
  inference networks in bfloat16 and all in float32;
- our step in float32 beside bfloat16;
- the paper's networks beside the fast preset's, in float32, per image: a smaller batch is theirs;
- if asked for, Pyro's own AIR beside ours, both presets, see `pyro_air.py`.

Besides: images generated a second, particles times images a second of the importance-weighted
bound (`bounds.measure`), and the most memory that the process ever held.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_scenes import checkpoint, plain, pyro_air
from pyro_scenes.bounds import measure
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData, make
from pyro_scenes.machine import machine
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.objectives.base import temporarily
from pyro_scenes.objectives.lavae import LAVAEObjective
from pyro_scenes.training import OPTIMIZERS

DATA = "multi-dsprites"
# how a ratio's name begins -> what it should be
GOALS = {"ours / plain torch": "  goal: at most 1.15", "Pyro's AIR / ours": "  goal: at least 4"}
# name -> what to call, and how much (images, say) a call does
Work = Mapping[str, tuple[Callable[[], object], int]]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int  # of the fast preset's training steps
    slow_rounds: int  # of the rest
    paper_batch: int  # images a step of the paper's networks
    generated: int  # images at a time
    particles: int  # of the bound
    batch: int = 64  # images a step
    evaluated: int = 10  # images at a time


FULL = Size(rounds=30, slow_rounds=7, paper_batch=16, generated=8192, particles=100)
QUICK = Size(rounds=5, slow_rounds=2, paper_batch=8, generated=1024, particles=20)


class Told(nn.Module):
    """A location network that finds the objects untrained: peaks are added to its heights.

    What a step costs depends on how many objects are found, and a bound on how far apart its
    particles are. The network's own heights are lowered, so that none of them counts.

    :param peaks: (N, H, W), for the images that it will be given, or the first of them.
    """

    def __init__(self, net: nn.Module, peaks: Tensor):
        super().__init__()
        self.net, self.stride = net, net.stride
        self.peaks = nn.Buffer(peaks)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.net(x) + self.peaks[: len(x)]


def peaks(data: SceneData, height: float) -> Tensor:
    """One pixel of that height at the centre of each object's box, (N, H, W)."""
    assert data.boxes is not None
    maps = torch.zeros(len(data), *data.shape[:2])
    boxes = torch.from_numpy(data.boxes)  # (N, M, 4)
    image, slot = (~boxes[..., 0].isnan()).nonzero(as_tuple=True)
    column, row = boxes[image, slot, :2].long().unbind(-1)
    maps[image, row, column] = height
    return maps


class Trainer:
    """A model late in its training, its optimiser and one batch.

    :param by_hand: take the ELBO of `plain.py` in place of the training's own objective.
    """

    def __init__(
        self, preset: str, data: SceneData, device: torch.device, bfloat16=False, by_hand=False
    ):
        config = make_config("lavae", DATA, preset)
        # No image is forced to one object, as the paper does at random: a step costs what it shows.
        schedule = replace(config.schedule, one_object_left=0.0, location_every=1)
        torch.manual_seed(config.seed)
        self.train, self.bfloat16, self.by_hand = config.train, bfloat16, by_hand
        self.x = data.batch().to(device)
        self.model = LAVAE(config.net, (3, *data.shape[:2]))
        # A peak that a trained network could make, sure to be counted and all but sure to be drawn.
        told = peaks(data, config.net.count_threshold + 3.0)
        self.model.location_net = Told(self.model.location_net, told)
        self.model.to(device).train()
        self.model.temperature = schedule.temperature_end
        self.objective = LAVAEObjective(schedule, self.model, self.train.steps)
        rates = self.objective.learning_rates(self.train.steps - 1)
        groups = [{"params": p, "lr": rates[name]} for name, p in self.model.groups().items()]
        options: dict[str, Any] = {"betas": (0.9, self.train.beta2)}
        self.optimizer = OPTIMIZERS[self.train.optimizer](groups, **options)

    def step(self) -> None:
        """As `training.Run.advance` does the last one."""
        self.optimizer.zero_grad(set_to_none=True)
        with temporarily(self.model, autocast=self.bfloat16):
            if self.by_hand:
                encoded = self.model.encode(self.x)
                noise = plain.fresh_noise(self.model, encoded)
                (-plain.elbo(self.model, self.x, encoded, noise).mean()).backward()
            else:
                self.objective.backward(self.model, self.x, self.train.steps - 1)
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()


def run(device: str = "auto", quick: bool = False, air_folder: Path | None = None) -> dict:
    """Measure; ready for JSON. Each figure is a median, a least and a most.

    :param quick: fewer and smaller measurements, in under a minute.
    :param air_folder: with Pyro's own AIR, to be compared with ours.
    :raises UserError: if there is no such device, or no AIR in the folder.
    """
    target = checkpoint.resolve(device)
    size = QUICK if quick else FULL
    theirs = None if air_folder is None else pyro_air.load(air_folder)
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        airs: Work = {} if theirs is None else pyro_air.contestants(theirs, size.batch, target)
        data = make(DATA, size.batch, segmentation=False)
        steps = take_turns({
            f"{name}, {precision}":
                (Trainer("fast", data, target, precision == "bfloat16", by_hand).step, size.batch)
            for precision in ("bfloat16", "float32")
            for name, by_hand in (("ours", False), ("plain torch", True))
        }, size.rounds, target)
        memory = {"after the fast preset's steps": _memory()}
        fast = Trainer("fast", data, target)
        paper = Trainer("paper", data[:size.paper_batch], target)
        both = take_turns({
            "paper's networks": (paper.step, size.paper_batch),
            "fast preset's": (fast.step, size.batch),
        }, size.slow_rounds, target)
        model, scenes = fast.model.eval(), data[:size.evaluated]
        model.temperature = None
        rates = take_turns({
            "images generated":
                (lambda: make(DATA, size.generated, segmentation=False), size.generated),
            "particles x images evaluated":
                (lambda: measure(model, scenes, size.particles), size.particles * len(scenes)),
        }, size.slow_rounds, target)
        with pyro_air.apart():
            air = take_turns(airs, size.rounds, target)
    pairs = {
        "ours / plain torch, bfloat16": (steps, "ours, bfloat16", "plain torch, bfloat16"),
        "ours / plain torch, float32": (steps, "ours, float32", "plain torch, float32"),
        "float32 / bfloat16": (steps, "ours, float32", "ours, bfloat16"),
        "paper's networks / fast preset's": (both, "paper's networks", "fast preset's"),
    }
    if air:
        pairs |= {
            f"Pyro's AIR / ours, {preset}": (air, pyro_air.THEIRS, name)
            for preset, name in pyro_air.OURS.items()
        }
    shared = {"air": {"side": pyro_air.SIDE, "steps": pyro_air.STEPS}} if air else {}
    return {
        "machine": machine(target),
        "quick": quick,
        "data": DATA,
        "size": asdict(size) | shared,
        "ratios": {
            name: _spread([a / b for a, b in zip(seconds[one], seconds[two], strict=True)])
            for name, (seconds, one, two) in pairs.items()
        },
        "seconds_per_image": {name: _spread(row) for name, row in (steps | both | air).items()},
        "per_second": {name: _spread([1 / s for s in row]) for name, row in rates.items()},
        "peak_memory_mib": memory | {"after everything": _memory()},
    }


def take_turns(work: Work, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call over its amount, by name and round; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order = list(work)
    for counts in [False] + [True] * rounds:
        for name in order:
            call, amount = work[name]
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if counts:
                seconds[name].append((time.perf_counter() - start) / amount)
        order.reverse()
    return seconds


def table(result: dict) -> str:
    """The figures of `run` to print, ratios first."""
    computer, size = result["machine"], result["size"]
    lines = [
        "{processor}, {cores} cores, {threads} threads, torch {torch}, {device}".format(**computer),
        "batches of {batch}, of {paper_batch} for the paper's networks; medians (least to most) of"
        " {rounds} rounds, of {slow_rounds} from the paper's networks on".format(**size),
    ]
    if "air" in size:
        lines.append(
            "AIR: images of {side} x {side} pixels, T = {steps}, batches of {batch};"
            " {rounds} rounds".format(**size, **size["air"])
        )
    parts = [
        ("times as long", "ratios", 1.0, ".2f"),
        ("training, milliseconds an image", "seconds_per_image", 1000.0, ".2f"),
        ("a second", "per_second", 1.0, ",.0f"),
    ]
    for title, part, scale, form in parts:
        lines += ["", title]
        for name, row in result[part].items():
            median, least, most = (format(row[k] * scale, form) for k in ("median", "min", "max"))
            goal = next((g for start, g in GOALS.items() if name.startswith(start)), "")
            lines.append(f"  {name:<34}{median:>9}  ({least} to {most}){goal}")
    lines += ["", "peak memory, MiB"]
    lines += [f"  {name:<34}{mib:>9,.0f}" for name, mib in result["peak_memory_mib"].items()]
    return "\n".join(lines)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _memory() -> float:
    """The most memory that the process has held so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
