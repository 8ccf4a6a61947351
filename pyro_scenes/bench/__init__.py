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
- if asked for, Pyro's own AIR beside ours, both presets, see `pyro_air.py`;
- a step of each model beside the arithmetic of its networks, see `floors.py`.

Besides: images generated a second, particles times images a second of the importance-weighted
bound (`bounds.measure`), how the cost grows with the size of a problem (`growth.py`), and the most
memory that the process ever held.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro
import torch

from pyro_scenes import checkpoint
from pyro_scenes.bench import floors, growth, pyro_air
from pyro_scenes.bench.late import DATA, Trainer
from pyro_scenes.bench.turns import Work, spread, take_turns
from pyro_scenes.bounds import measure
from pyro_scenes.data import make
from pyro_scenes.machine import machine

# how a ratio's name begins -> what it should be
GOALS = {"ours / plain torch": "  goal: at most 1.15", "Pyro's AIR / ours": "  goal: at least 4"}


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
        arithmetic = floors.compare(size.slow_rounds, target)
        sizes = growth.costs(growth.QUICK if quick else growth.FULL, size.slow_rounds, target)
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
            name: spread([a / b for a, b in zip(seconds[one], seconds[two], strict=True)])
            for name, (seconds, one, two) in pairs.items()
        },
        "seconds_per_image": {name: spread(row) for name, row in (steps | both | air).items()},
        "per_second": {name: spread([1 / s for s in row]) for name, row in rates.items()},
        "arithmetic": arithmetic,
        "growth": sizes,
        "peak_memory_mib": memory | {"after everything": _memory()},
    }


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
            lines.append(f"  {name:<42}{median:>9}  ({least} to {most}){goal}")
    lines += ["", "arithmetic of a step at the rate of a product of matrices, of the step's time"]
    for name, row in result["arithmetic"]["steps"].items():
        middle, least, most = (f"{row['floor'][k]:.0%}" for k in ("median", "min", "max"))
        billions = sum(row["operations"].values()) / 1e9
        lines.append(
            f"  {name:<42}{middle:>9}  ({least} to {most})  of {row['seconds']['median']:.3f} s;"
            f" {billions:.1f} billion operations, batch {row['batch']}"
        )
    for name, row in result["arithmetic"]["rate"].items():
        lines.append(f"  {name} product, billion operations a second: {row['median'] / 1e9:.0f}")
    lines += ["", "LAVAE's cost by size, float32, milliseconds an image"]
    lines += [f"  {label:<42}{cost:>9.2f}" for label, cost in _costs(result["growth"])]
    lines += ["", "peak memory, MiB"]
    lines += [f"  {name:<42}{mib:>9,.0f}" for name, mib in result["peak_memory_mib"].items()]
    return "\n".join(lines)


def _costs(sizes: list[dict]) -> list[tuple[str, float]]:
    """What was measured of each size, and its median in milliseconds."""
    lines = []
    for row in sizes:
        kind = "bound, particles" if "particles" in row else "step, batch"
        amount = row.get("particles", row.get("batch"))
        label = f"{row['side']} x {row['side']}, {row['objects']} objects, {kind} {amount}"
        lines.append((label, 1000 * row["seconds_per_image"]["median"]))
    return lines


def _memory() -> float:
    """The most memory that the process has held so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
