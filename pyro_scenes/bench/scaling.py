"""What several processes gain on the machine at hand: a training step and an evaluation of LAVAE.

Each row is a torchrun of this module with so many processes, of so many threads each, at the same
global batch; every process does its part of the same work. A plain process with one thread is what
the others are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyro
import torch

from pyro_scenes import bounds, checkpoint, distributed, tables
from pyro_scenes.bench import launches
from pyro_scenes.bench.turns import spread
from pyro_scenes.config import make_config
from pyro_scenes.errors import UserError
from pyro_scenes.machine import machine
from pyro_scenes.training import Run

MODEL, DATA, BATCH = "lavae", "multi-dsprites", 64
WARM = 5  # steps that do not count
IMAGES, PARTICLES, CHUNK = 64, 20, 100  # of an evaluation
# What links are taken to carry, bytes a second, and numbers of machines.
RATES = {"gloo on one machine": 2e9, "10 Gbit Ethernet": 1e9, "NVLink": 2e11}
MANY = (2, 8)
# Microseconds that an operation is taken to need: a launch alone, and with Python and autograd
# round it (RUNS.md, On a GPU).
LAUNCHES = (10, 30)


def run(device: str, steps: int, most: int | None = None) -> dict:
    """Measure with 1, 2, 4 ... processes; ready for JSON.

    :param steps: training steps of each row.
    :param most: processes; by default one a GPU, or one a core that this process may use.
    :raises UserError: if a row fails.
    """
    target = checkpoint.resolve(device)
    cuda = target.type == "cuda"
    if most is None:
        most = torch.cuda.device_count() if cuda else len(_cores())
    counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
    # Threads are a process's other way to use cores.
    threads = [] if cuda else [(1, n) for n in counts[1:]]
    rows = [
        _row(processes, each, target.type, steps)
        for processes, each in [(1, 1), *threads, *((n, 1) for n in counts[1:])]
    ]
    return {"machine": machine(target), "batch": BATCH, "steps": steps, "rows": rows,
            "launches": launches.count()}


def _cores() -> set[int] | range:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _row(processes: int, threads: int, device: str, steps: int) -> dict:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:]]),
    }
    command = ["-m", "pyro_scenes.bench.scaling", device, str(steps)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                   str(processes), *command]
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.split("\n") if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip() or "no message").split("\n")[-1]
        raise UserError(f"{processes} processes of {threads} threads failed: {last}")
    return {"processes": processes, "threads": threads} | json.loads(lines[-1])


def measured(device: str, steps: int) -> dict:
    """What one of the processes does: seconds of a step, of exchanging gradients, of an image."""
    training = Run(make_config(MODEL, DATA, settings=[f"batch_size={BATCH}"]), device)
    seconds = []
    with pyro.validation_enabled(False):
        for _ in range(WARM + steps):
            start = time.perf_counter()
            training.advance()
            _settled(training.device)
            seconds.append(time.perf_counter() - start)
        numbers = [p.numel() for p in training.model.parameters()]
        gradient = torch.zeros(sum(numbers), device=training.device)
        exchange = []
        for _ in range(steps):
            start = time.perf_counter()
            distributed.total(gradient)
            _settled(training.device)
            exchange.append(time.perf_counter() - start)
        model = training.model.eval()
        start = time.perf_counter()
        bounds.measure(model, training.held_out[:IMAGES], PARTICLES, CHUNK, seed=0)
        evaluation = (time.perf_counter() - start) / IMAGES
    return {
        "step": spread(seconds[WARM:]),
        "exchange": spread(exchange),
        "image": evaluation,
        "gradient": 4 * sum(numbers),  # bytes
    }


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(result: dict) -> str:
    """The same as Markdown tables, with the machine above them: measured, reckoned, counted."""
    one = result["rows"][0]
    about = "{processor}, {cores} cores, {device}, torch {torch}".format(**result["machine"])
    headings = ("processes", "threads each", "ms a step", "times as fast",
                "exchange of gradients, ms", "ms an image evaluated", "times as fast")
    rows = []
    for row in result["rows"]:
        step, image = row["step"]["median"], row["image"]
        exchange = f"{1e3 * row['exchange']['median']:.1f}" if row["processes"] > 1 else "-"
        rows.append((
            str(row["processes"]), str(row["threads"]), f"{1e3 * step:.0f}",
            f"{one['step']['median'] / step:.2f}", exchange, f"{1e3 * image:.0f}",
            f"{one['image'] / image:.2f}",
        ))
    links = ("link", *(f"exchange of {n}, ms" for n in MANY),
             *(f"{n}: times as fast" for n in MANY))
    # Each machine in the fastest way that this one has.
    alone = min(row["step"]["median"] for row in result["rows"])
    reckoned = [
        (f"{name}, {1e-9 * rate:g} GB/s", *(f"{1e3 * _exchange(n, rate, one):.3g}" for n in MANY),
         *(f"{alone / (alone / n + _exchange(n, rate, one)):.1f}" for n in MANY))
        for name, rate in RATES.items()
    ]
    return "\n".join([
        f"{about}; LAVAE's fast preset on {DATA}, {result['batch']} images a step in all,"
        f" medians of {result['steps']} steps of the warm-up, which are dearer than those after it."
        f" A gradient has {one['gradient'] / 1e6:.1f} MB; an evaluation is of {PARTICLES} particles"
        " an image.", "",
        *tables.lines(headings, rows), "",
        "What follows for N machines such as this one, by the arithmetic below and at rates that"
        " are assumed:", "",
        *tables.lines(links, reckoned), "",
        "What a training step asks of a GPU, counted on the processor, in the middle of shipped"
        " trainings, and what they take at a time for each that is assumed:", "",
        *tables.lines(
            ("training", "images a step", "operations", "of which it waits for",
             *(f"ms at {each} us each" for each in LAUNCHES)),
            [
                (name, str(row["batch"]), f"{row['operations']:,}", str(row["waits"]),
                 *(f"{1e-3 * each * row['operations']:.0f}" for each in LAUNCHES))
                for name, row in result["launches"].items()
            ],
        ),
    ])


def _exchange(machines: int, rate: float, row: dict) -> float:
    """Seconds that a ring takes to exchange the gradients, at so many bytes a second."""
    return 2 * (machines - 1) / machines * row["gradient"] / rate


def main() -> None:
    """The device and the steps are the arguments."""
    device, steps = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with distributed.session(device):
        found = measured(device, steps)
        if distributed.rank() == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
