"""Many runs of one model: every setting of a grid with every seed, and one table of them.

Each cell of a sweep is the folder of a run, with its figures on held-out scenes beside it in
figures.json; a cell that has these is done, and any other goes on where it was. Cells run in
processes of this machine, or where submitit takes them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyro_scenes import checkpoint, extensions, report, tables, training
from pyro_scenes.config import RunConfig, find, make_config, spelled
from pyro_scenes.data import DATASETS, load
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.files import read_json, write_json
from pyro_scenes.limits import LAST_SEED

FIGURES, LOG = "figures.json", "log.txt"
# Parts of held-out counts that are right, up to which steps and seconds are counted.
LEVELS = (0.98, 0.99, 0.999)
# Heading, figure, digits.
COLUMNS = (
    ("count right", "count_accuracy", 4),
    ("-log p(x) <=", "nll", 2),
    ("correspondence", "category_correspondence", 4),
    ("purity", "purity", 4),
    ("ARI", "ari", 4),
)
GRACE = 60.0  # seconds that a process has to save its run when the sweep is interrupted
POLL = 0.2  # seconds
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; all that a process elsewhere needs to know of it."""

    model: str
    data: str
    preset: str
    steps: int | None
    seed: int
    varied: tuple[str, ...]  # "name=value", those of the grid
    settings: tuple[str, ...]  # and those of all cells
    out: str
    images: int
    particles: int
    device: str
    mnist: str | None

    @property
    def label(self) -> str:
        """What it shares with the same setting's other seeds."""
        return " ".join(self.varied) or "as the preset"

    def config(self) -> RunConfig:
        """:raises UserError: for settings that are none."""
        settings = [*self.settings, *self.varied]
        return make_config(self.model, self.data, self.preset, settings, self.steps, self.seed)

    def asked(self) -> dict[str, Any]:
        """What its figures are of."""
        settings = json.loads(json.dumps(self.config().to_dict()))
        asked = {"images": self.images, "particles": self.particles, "settings": settings}
        if self.data not in DATASETS:  # a file may have other images by now
            asked["file"] = _digest(self.data)
        return asked

    def check(self) -> None:
        """:raises UserError: if its folder holds a run of other settings."""
        path = Path(self.out) / checkpoint.CONFIG
        if (path.parent / checkpoint.FILE).exists() and path.is_file():
            if RunConfig.from_dict(read_json(path)) != self.config():
                raise UserError(f"{self.out} holds a run of other settings: give another --out")

    def figures(self) -> dict[str, Any] | None:
        """Its figures, if they are those that are asked for."""
        path = Path(self.out) / FIGURES
        kept = read_json(path, ("asked",)) if path.is_file() else None
        return kept if kept and kept["asked"] == self.asked() else None


def seeds(text: str) -> tuple[int, ...]:
    """Seeds such as "0-4" or "1,3,7-9". :raises UserError: for others."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"seeds are like 0-4 or 1,3,7-9, not {text!r}")
        begin, end = int(first), int(last or first)
        if end < begin:
            raise UserError(f"the seeds {part} end before they begin")
        if end > LAST_SEED:
            raise UserError(f"seeds must be at most {LAST_SEED}, not {part:.60}")
        if end - begin >= MOST_SEEDS:
            raise UserError(f"a sweep has {MOST_SEEDS:,} seeds at most, not those of {part:.60}")
        found += range(begin, end + 1)
    if not found or len(set(found)) < len(found):
        raise UserError(f"the seeds {text!r} are none, or one of them comes twice")
    return tuple(found)


def cells(
    grid: Sequence[str], numbers: Sequence[int], out: Path, **common: Any
) -> list[Cell]:
    """Every combination of the grid's values with every seed, seeds last.

    :param grid: "name=value,value": a name may have its part before it, as schedule.ramp; values
        that contain commas are parted by semicolons.
    :param common: what is the same in all, see `Cell`.
    :raises UserError: for settings that are none.
    """
    axes: dict[str, list[str]] = {}
    usual = make_config(common["model"], common["data"], common["preset"])
    for axis in grid:
        name, equals, text = axis.partition("=")
        if not equals or not text:
            raise UserError(f"an axis of the grid is like learning_rate=1e-3,2e-3, not {axis!r}")
        name = spelled(usual, *find(usual, name))
        values = text.split(";" if ";" in text else ",")
        if name in axes:
            raise UserError(f"the grid has {name} twice")
        if name == "steps" and common.get("steps") is not None:
            raise UserError("steps are an axis of the grid: leave --steps out")
        axes[name] = values
    found: list[Cell] = []
    configs: list[RunConfig] = []  # of the first seed
    for combination in itertools.product(*axes.values()):
        varied = tuple(f"{name}={value}" for name, value in zip(axes, combination, strict=True))
        folder = out / ("_".join(varied).replace("/", "-") or "preset")
        for seed in numbers:
            cell = Cell(seed=seed, varied=varied, out=str(folder / f"seed{seed}"), **common)
            config = cell.config()
            if seed == numbers[0]:
                if config in configs:
                    raise UserError(f"the grid has the settings {cell.label} twice")
                configs.append(config)
            found.append(cell)
    return found


@lru_cache
def _digest(data: str) -> str:
    return load(data).digest()


def run_cell(cell: Cell) -> None:
    """Train one cell from where it is, and measure it; in any process, on any machine."""
    extensions.run()
    out, mnist = Path(cell.out), Path(cell.mnist) if cell.mnist else None
    config = cell.config()
    training.train(config, out, resume=True, device=cell.device, mnist=mnist, progress=False)
    trained = checkpoint.load(out, cell.device)
    data = report.unseen(trained, cell.data, cell.images, None, mnist)
    figures = evaluate(
        trained.model, data, particles=cell.particles, limit=math.inf, progress=False
    )
    assert trained.training is not None
    write_json(out / FIGURES, {
        "asked": cell.asked(),
        "figures": figures,
        "step": trained.step,
        "seconds": trained.training["seconds"],
        "machine": trained.training["machine"],
        "reached": reached(trained.training["history"], trained.training["seconds"]),
    })


def reached(history: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """At which looks counts were first so often right: steps, and seconds in proportion to them."""
    steps, values = history.get("count accuracy", ([], []))
    found = {}
    for level in LEVELS:
        first = next((s for s, v in zip(steps, values, strict=True) if v >= level), None)
        if first is not None:
            last = max(numbers[-1] for numbers, _ in history.values())
            found[f"{level:.1%}"] = {"steps": first, "seconds": seconds * first / last}
    return found


# --- launchers: they run cells, tell of each that ends, and return what went wrong ----------------

Tell = Callable[[Cell, str | None], None]


def locally(todo: Sequence[Cell], jobs: int, tell: Tell) -> None:
    """So many at a time in processes of this machine; if several, each on a core of its own."""
    waiting, running = list(todo), dict[int, tuple[Cell, subprocess.Popen]]()
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    running[slot] = waiting[0], _start(waiting[0], slot if jobs > 1 else None)
                    waiting.pop(0)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    tell(cell, None if process.returncode == 0 else _last_line(cell, process))
            time.sleep(POLL)
    finally:
        for _, process in running.values():
            process.terminate()  # it saves its run first
        deadline = time.monotonic() + GRACE
        for _, process in running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(cell: Cell, slot: int | None) -> subprocess.Popen:
    """A process of its own for a cell, which a Ctrl-C in the terminal does not reach."""
    out = Path(cell.out)
    out.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    }
    if slot is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with open(out / LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from pyro_scenes.sweep import child; child()",
             json.dumps(asdict(cell))],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )
    if slot is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        with suppress(ProcessLookupError):  # it may have ended already
            os.sched_setaffinity(process.pid, {cores[slot % len(cores)]})
    return process


def child() -> None:
    """What such a process does: its argument is a cell as JSON."""
    values = json.loads(sys.argv[1])
    lists = {name: tuple(values[name]) for name in ("varied", "settings")}
    try:
        run_cell(Cell(**values | lists))
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:  # of SIGTERM, too, once the training has begun
        sys.exit(130)


def _last_line(cell: Cell, process: subprocess.Popen) -> str:
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}"
    lines = (Path(cell.out) / LOG).read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no message")


def by_submitit(
    todo: Sequence[Cell], jobs: int, tell: Tell, out: Path, parameters: dict[str, Any]
) -> None:
    """As one job array of submitit, on SLURM where that is.

    :param jobs: most at a time, on SLURM; elsewhere submitit starts all at once.
    :param parameters: of submitit's executor, such as slurm_partition, and cluster.
    :raises UserError: if submitit is not here, does not take a parameter, or finds no cluster and
        would start more runs than that on this machine.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher submitit needs a package that is not here:"
                        " install pyro_scenes[cluster]") from None
    given: dict[str, Any] = {"name": "svi-sweep", "timeout_min": 24 * 60} | parameters
    cluster = given.pop("cluster", None)

    def executor(folder: str | Path) -> Any:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster)
        made.update_parameters(slurm_array_parallelism=jobs, **given)
        return made

    try:
        # Tried elsewhere first: what submitit refuses would leave a folder.
        with tempfile.TemporaryDirectory() as folder:
            found = executor(folder).cluster
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        # What an assertion says may have lines of its own.
        raise UserError(
            f"submitit does not take these parameters: {' '.join(str(error).split())}"
        ) from error
    if found == "local" and jobs < len(todo):
        raise UserError(f"submitit finds no SLURM here, and would start all {len(todo)} runs at"
                        " once: use --launcher local, which minds --jobs")
    submitted = executor(out / "submitit").map_array(run_cell, todo)
    try:
        for cell, job in zip(todo, submitted, strict=True):
            wrong = job.exception()
            lines = str(wrong).strip().split("\n")
            tell(cell, None if wrong is None else lines[-1] or type(wrong).__name__)
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise


# --- the table ------------------------------------------------------------------------------------


def summary(all_cells: Iterable[Cell], errors: dict[str, str]) -> dict[str, Any]:
    """All that is known of a sweep, ready for JSON.

    :param errors: the folder of a cell -> what went wrong.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in all_cells:
        row: dict[str, Any] = {"seed": cell.seed, "out": cell.out, "error": errors.get(cell.out)}
        kept = cell.figures()
        if kept is not None:
            row |= {key: value for key, value in kept.items() if key != "asked"}
        groups.setdefault(cell.label, []).append(row)
    return {
        "settings": [
            {"setting": label, "done": sum("figures" in r for r in rows), **_spread(rows),
             "seeds": rows}
            for label, rows in groups.items()
        ]
    }


def _spread(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds that are done; medians of when levels were met.
    """
    done = [row for row in rows if "figures" in row]
    figures = [row["figures"] for row in done]
    found: dict[str, Any] = {"figures": {}, "reached": {}}
    for _, key, _ in COLUMNS:
        values = tables.known(figures, key)
        if values:
            found["figures"][key] = {
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
    for level in (f"{level:.1%}" for level in LEVELS):
        met = [row["reached"][level] for row in done if level in row["reached"]]
        if met:
            found["reached"][level] = {"seeds": len(met)} | {
                unit: statistics.median(m[unit] for m in met) for unit in ("steps", "seconds")
            }
    return found


def table(result: dict[str, Any]) -> str:
    """The same to print: a row a setting, then a line a failure."""
    headings = ["setting", "seeds", *(heading for heading, *_ in COLUMNS)]
    headings += [f"to {level:.1%}" for level in LEVELS]
    rows = []
    measured = [
        [done["figures"] for done in entry["seeds"] if "figures" in done]
        for entry in result["settings"]
    ]
    # Nats of different likelihoods do not compare.
    several = len({seed["likelihood"] for figures in measured for seed in figures}) > 1
    for entry, figures in zip(result["settings"], measured, strict=True):
        row = [entry["setting"], f"{entry['done']} of {len(entry['seeds'])}"]
        row += [
            tables.bound(figures, digits) if several and key == "nll"
            else tables.spread(figures, key, digits) for _, key, digits in COLUMNS
        ]
        for level in LEVELS:
            met = entry["reached"].get(f"{level:.1%}")
            few = f" ({met['seeds']} seeds)" if met and met["seeds"] < entry["done"] else ""
            row.append(
                f"{met['steps']:,.0f} steps, {met['seconds']:,.0f} s{few}" if met else "-"
            )
        rows.append(row)
    lines = tables.lines(headings, rows, keep=2)
    for entry in result["settings"]:
        for row in entry["seeds"]:
            if row["error"]:
                lines.append(f"failed: {entry['setting']}, seed {row['seed']}: {row['error']}"
                             f" ({row['out']})")
    return "\n".join(lines)
