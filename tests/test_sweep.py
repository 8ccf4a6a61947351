"""Sweeps: the grid, what runs and what is kept, failures, interruption, launchers and the table."""

import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pyro_scenes import sweep
from pyro_scenes.cli import sweep as command
from pyro_scenes.errors import Terminated, UserError
from pyro_scenes.files import write_json

COMMON: dict[str, Any] = {
    "model": "conv-vae", "data": "multi-dsprites", "preset": "fast", "steps": 3, "settings": (),
    "images": 4, "particles": 2, "device": "cpu", "mnist": None,
}


def test_every_value_comes_with_every_other_and_every_seed(tmp_path) -> None:
    grid = ["schedule.learning_rate=1e-3,2e-3", "batch_size=4"]
    found = sweep.cells(grid, (0, 2), tmp_path, **COMMON)
    assert [(c.label, c.seed) for c in found] == [
        ("learning_rate=1e-3 batch_size=4", 0), ("learning_rate=1e-3 batch_size=4", 2),
        ("learning_rate=2e-3 batch_size=4", 0), ("learning_rate=2e-3 batch_size=4", 2),
    ]
    assert len({c.out for c in found}) == 4
    config = found[3].config()
    assert (config.schedule.learning_rate, config.train.batch_size) == (2e-3, 4)
    assert (config.seed, config.train.steps) == (2, 3)
    alone, = sweep.cells([], (1,), tmp_path, **COMMON)
    assert (alone.label, alone.out) == ("as the preset", str(tmp_path / "preset" / "seed1"))
    tuples = sweep.cells(["sprite_hidden=4,5;6"], (0,), tmp_path, **COMMON | {"model": "lavae"})
    assert [c.config().net.sprite_hidden for c in tuples] == [(4, 5), (6,)]


@pytest.mark.parametrize("grid", [
    ["learning_rate"], ["learning_rate="], ["=3"], ["speed=3"], ["training.learning_rate=1"],
    ["learning_rate=1e-3,1e-3"], ["learning_rate=1e-3", "schedule.learning_rate=2e-3"],
    ["learning_rate=fast"], ["learning_rate=1e-3,0.001"],
])
def test_a_grid_of_no_settings_is_refused(tmp_path, grid) -> None:
    with pytest.raises(UserError):
        sweep.cells(grid, (0,), tmp_path, **COMMON)


def test_steps_are_an_axis_or_given_not_both(tmp_path) -> None:
    with pytest.raises(UserError, match="leave --steps out"):
        sweep.cells(["steps=3,4"], (0,), tmp_path, **COMMON | {"steps": 5})
    found = sweep.cells(["steps=3,4"], (0,), tmp_path, **COMMON | {"steps": None})
    assert [cell.config().train.steps for cell in found] == [3, 4]


def test_seeds() -> None:
    assert sweep.seeds("0-4") == (0, 1, 2, 3, 4)
    assert sweep.seeds("1,3,7-8") == (1, 3, 7, 8)
    for wrong in ("", "a", "1-", "-1", "3-1", "1,5-3", "1,1", "0-2,1", "1.5", f"{2**64}",
                  f"0-{2**64 - 1}", "0-10000"):
        with pytest.raises(UserError):
            sweep.seeds(wrong)


def test_levels_are_reached_at_the_first_look_that_has_them() -> None:
    history = {"count accuracy": ([10, 20, 30, 40], [0.5, 0.985, 0.97, 0.99]),
               "loss": ([1, 40], [2.0, 1.0])}
    assert sweep.reached(history, 80.0) == {
        "98.0%": {"steps": 20, "seconds": 40.0}, "99.0%": {"steps": 40, "seconds": 80.0},
    }
    assert sweep.reached({"loss": ([1], [1.0])}, 5.0) == {}


def finished(
    cell: sweep.Cell, nll: float, met: dict[str, Any], likelihood: str = "bernoulli"
) -> None:
    out = Path(cell.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / sweep.FIGURES).write_text(json.dumps({
        "asked": cell.asked(),
        "figures": {"nll": nll, "likelihood": likelihood, "count_accuracy": None},
        "step": 3, "seconds": 6.0, "machine": "m", "reached": met,
    }))


def test_figures_that_are_damaged_are_refused(tmp_path: Path) -> None:
    (cell,) = sweep.cells([], (0,), tmp_path, **COMMON)
    finished(cell, 1.0, {})
    assert cell.figures() is not None
    for text in ('{"asked": ', "[1]", "{}"):
        (Path(cell.out) / sweep.FIGURES).write_text(text)
        with pytest.raises(UserError, match="figures.json is not what it should be"):
            cell.figures()


def test_the_table_has_means_spreads_medians_and_failures(tmp_path) -> None:
    found = sweep.cells(["ramp=1,2"], (0, 1, 2), tmp_path, **COMMON)
    for cell, nll, steps in zip(found, (1.0, 2.0, 6.0), (100, 200, 400), strict=False):
        met = {"99.0%": {"steps": steps, "seconds": steps / 10}} if steps < 300 else {}
        finished(cell, nll, met)
    result = sweep.summary(found, {found[4].out: "Error: no luck"})
    first, second = result["settings"]
    assert (first["setting"], first["done"], second["done"]) == ("ramp=1", 3, 0)
    assert first["figures"] == {"nll": {"mean": 3.0, "deviation": pytest.approx(7**0.5)}}
    assert first["reached"] == {"99.0%": {"seeds": 2, "steps": 150, "seconds": 15.0}}
    assert [row["error"] for row in second["seeds"]] == [None, "Error: no luck", None]
    assert json.loads(json.dumps(result)) == result
    assert sweep.table(result).split("\n") == [
        "| setting | seeds | -log p(x) <= | to 99.0% |",
        "| --- | --- | --- | --- |",
        "| ramp=1 | 3 of 3 | 3.00 +- 2.65 | 150 steps, 15 s (2 seeds) |",
        "| ramp=2 | 0 of 3 | - | - |",
        f"failed: ramp=2, seed 1: Error: no luck ({found[4].out})",
    ]


def test_nats_of_several_likelihoods_are_told_apart(tmp_path) -> None:
    found = sweep.cells(["likelihood=normal,bernoulli"], (0, 1), tmp_path, **COMMON)
    for cell, nll in zip(found, (-9.0, -8.0, 40.0, 42.0), strict=True):
        kind = cell.config().net.likelihood
        finished(cell, nll, {}, "normal, sigma 0.3" if kind == "normal" else kind)
    assert sweep.table(sweep.summary(found, {})).split("\n")[2:] == [
        "| likelihood=normal | 2 of 2 | -8.50 +- 0.71 (normal, sigma 0.3) |",
        "| likelihood=bernoulli | 2 of 2 | 41.00 +- 1.41 (bernoulli) |",
    ]


def test_figures_of_other_settings_do_not_count(tmp_path) -> None:
    cell, = sweep.cells([], (0,), tmp_path, **COMMON)
    assert cell.figures() is None
    finished(cell, 1.0, {})
    assert cell.figures() is not None
    for change in ({"steps": 4}, {"particles": 3}, {"settings": ("ramp=7",)}):
        changed, = sweep.cells([], (0,), tmp_path, **COMMON | change)
        assert changed.figures() is None


# --- processes ------------------------------------------------------------------------------------

STAND_IN = """#!{python}
import json, os, signal, sys, time
cell = json.loads(sys.argv[-1])
def note(name, value):
    open(os.path.join(cell["out"], name), "w").write(json.dumps(value))
note("place", [os.environ.get("OMP_NUM_THREADS"), sorted(os.sched_getaffinity(0)), time.time()])
if cell["seed"] == 1:
    sys.exit("warning\\nError: no luck")
if cell["seed"] == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if cell["seed"] == 3:
    def save(number, frame):
        note("saved", number)
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    note("ready", 1)
    time.sleep(60)
note("end", time.time())
"""
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """In the place of Python: a process that does by its seed what a training may do."""
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    return tmp_path / "out"


def told(found: list[sweep.Cell], jobs: int) -> dict[int, str | None]:
    results: dict[int, str | None] = {}
    sweep.locally(found, jobs, lambda cell, error: results.update({cell.seed: error}))
    return results


@linux
def test_failures_are_told_and_keep_no_other_run_from_going_on(stand_in) -> None:
    found = sweep.cells([], (0, 1, 2, 4), stand_in, **COMMON)
    assert told(found, 1) == {0: None, 1: "Error: no luck", 2: "ended by signal 9", 4: None}
    threads, cores, _ = json.loads((stand_in / "preset" / "seed0" / "place").read_text())
    assert threads == os.environ.get("OMP_NUM_THREADS")
    assert cores == sorted(os.sched_getaffinity(0))


@linux
def test_several_runs_at_a_time_have_a_core_and_a_thread_each(stand_in) -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = sweep.cells([], (4, 5), stand_in, **COMMON)
    assert told(found, 2) == {4: None, 5: None}
    places = [json.loads((Path(cell.out) / "place").read_text()) for cell in found]
    assert [place[0] for place in places] == ["1", "1"]
    assert [place[1] for place in places] == [[cores[0]], [cores[1 % len(cores)]]]


@linux
def test_an_interruption_ends_the_processes_when_they_have_saved(stand_in) -> None:
    found = sweep.cells([], (3, 6), stand_in, **COMMON)
    ready = Path(found[0].out) / "ready"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        told(found, 1)
    thread.join()
    assert json.loads((Path(found[0].out) / "saved").read_text()) == signal.SIGTERM
    assert not Path(found[1].out).exists()


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def data(squares: Path) -> str:
    return str(squares)


def invoke(data: str, out: Path, *options: str) -> Any:
    return CliRunner().invoke(command, [
        "--model", "conv-vae", "--data", data, "--steps", "3", "--set", "grid_width=8",
        "--set", "eval_images=2", "--seeds", "0", "--images", "4", "--particles", "2",
        "--device", "cpu", "--out", str(out), *options,
    ])


def test_a_sweep_trains_measures_and_goes_on(data, tmp_path) -> None:
    """Once for good, once for what fails: that is tried again, and the other is not."""
    grid = ("--grid", "batch_size=4,999")
    result = invoke(data, tmp_path / "out", *grid)
    assert result.exit_code == 1
    assert "2 runs, 0 done already" in result.output
    assert "| batch_size=4 | 1 of 1 |" in result.output
    assert "failed: batch_size=999, seed 0: Error: batch_size 999 is more than" in result.output
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written["settings"][0]["figures"]["nll"]["mean"] > 0
    assert (tmp_path / "out" / "sweep.md").read_text() in result.output
    run = tmp_path / "out" / "batch_size=4" / "seed0"
    assert {"checkpoint.pt", "history.json", "figures.json"} <= {p.name for p in run.iterdir()}
    kept = (run / "figures.json").stat().st_mtime_ns
    again = invoke(data, tmp_path / "out", "--grid", "batch_size=4")
    assert again.exit_code == 0 and "1 runs, 1 done already" in again.output
    assert (run / "figures.json").stat().st_mtime_ns == kept


@pytest.mark.parametrize("kind, status", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_sweep_writes_the_table_of_what_is_done(
    data, tmp_path, monkeypatch, kind, status
) -> None:
    def one(todo: list[sweep.Cell], jobs: int, tell: sweep.Tell) -> None:
        finished(todo[0], 1.5, {})
        tell(todo[0], None)
        raise kind

    monkeypatch.setattr(sweep, "locally", one)
    result = invoke(data, tmp_path / "out", "--grid", "batch_size=4,5")
    assert result.exit_code == status
    assert result.stderr == "Interrupted. The same command goes on with the sweep.\n"
    assert result.stdout.splitlines() == ["2 runs, 0 done already", "batch_size=4, seed 0: done"]
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [setting["done"] for setting in written["settings"]] == [1, 0]
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| batch_size=4 | 1 of 1 | 1.50 |" in table and "| batch_size=5 | 0 of 1 |" in table


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_submitit_runs_the_same_cells(data, tmp_path) -> None:
    pytest.importorskip("submitit")
    result = invoke(data, tmp_path / "out", "--grid", "batch_size=4,5", "--launcher", "submitit",
                    "--launcher-set", "cluster=debug")
    assert result.exit_code == 0, result.output
    assert "| batch_size=5 | 1 of 1 |" in result.output


def test_figures_of_other_images_of_that_name_do_not_count(tmp_path) -> None:
    file = tmp_path / "scenes.npz"
    for value in (0, 255):
        np.savez(file, images=np.full((24, 16, 16, 1), value, np.uint8))
        sweep._digest.cache_clear()
        cell, = sweep.cells([], (0,), tmp_path / "out", **COMMON | {"data": str(file)})
        assert cell.figures() is None
        finished(cell, 1.0, {})
        assert cell.figures() is not None


class Job:
    def __init__(self, cell: sweep.Cell):
        self.cell, self.cancelled = cell, False

    def exception(self) -> Exception | None:
        if self.cell.seed == 2:
            raise KeyboardInterrupt
        return RuntimeError("a traceback\nUserError: no luck") if self.cell.seed else None

    def cancel(self) -> None:
        self.cancelled = True


class Executor:
    """Stands for submitit's: notes what it is given."""

    last: "Executor"

    def __init__(self, folder: Path, cluster: str | None):
        if cluster == "moon":
            raise ValueError("no executor named moon")
        self.folder, self.cluster = folder, cluster
        Executor.last = self

    def update_parameters(self, **parameters: Any) -> None:
        if "speed" in parameters:
            raise NameError("Unknown argument 'speed'")
        assert isinstance(parameters["timeout_min"], int), "expected int\nnot that"
        self.parameters = parameters

    def map_array(self, function: Any, cells: list[sweep.Cell]) -> list[Job]:
        assert function is sweep.run_cell
        self.jobs = [Job(cell) for cell in cells]
        return self.jobs


@pytest.fixture
def launcher(monkeypatch) -> None:
    class Module:
        AutoExecutor = Executor

    monkeypatch.setitem(sys.modules, "submitit", Module)


def test_submitit_is_given_the_parameters_and_tells_failures(launcher, tmp_path) -> None:
    found = sweep.cells([], (0, 1), tmp_path, **COMMON)
    results: dict[int, str | None] = {}
    sweep.by_submitit(
        found, 3, lambda cell, error: results.update({cell.seed: error}), tmp_path,
        {"cluster": "slurm", "slurm_partition": "gpu", "timeout_min": 60},
    )
    assert results == {0: None, 1: "UserError: no luck"}
    assert (Executor.last.cluster, Executor.last.folder) == ("slurm", tmp_path / "submitit")
    assert Executor.last.parameters == {
        "name": "svi-sweep", "timeout_min": 60, "slurm_partition": "gpu",
        "slurm_array_parallelism": 3,
    }


def test_an_interruption_cancels_the_jobs_of_submitit(launcher, tmp_path) -> None:
    found = sweep.cells([], (0, 2), tmp_path, **COMMON)
    with pytest.raises(KeyboardInterrupt):
        sweep.by_submitit(found, 1, lambda cell, error: None, tmp_path, {})
    assert [job.cancelled for job in Executor.last.jobs] == [True, True]


def test_where_there_is_no_slurm_not_all_runs_start_at_once(launcher, tmp_path) -> None:
    found = sweep.cells([], (0, 1), tmp_path, **COMMON)
    here = {"cluster": "local"}
    with pytest.raises(UserError, match="all 2 runs at once: use --launcher local"):
        sweep.by_submitit(found, 1, lambda cell, error: None, tmp_path, here)
    told: list[int] = []
    sweep.by_submitit(found, 2, lambda cell, error: told.append(cell.seed), tmp_path, here)
    assert told == [0, 1]


def test_values_for_submitit_are_json_or_text(launcher, data, tmp_path) -> None:
    words = ("mem_gb=1.5", "stderr_to_stdout=true", 'slurm_setup=["a", "b"]', "slurm_time=1:00",
             "cluster=slurm")
    options = [option for word in words for option in ("--launcher-set", word)]
    invoke(data, tmp_path / "out", "--launcher", "submitit", *options)
    found = Executor.last.parameters
    assert (found["mem_gb"], found["stderr_to_stdout"]) == (1.5, True)
    assert (found["slurm_setup"], found["slurm_time"]) == (["a", "b"], "1:00")


@pytest.mark.parametrize("options, said", [
    (("--seeds", "x"), "seeds are like"),
    (("--grid", "speed=3"), "no setting is called 'speed'"),
    (("--launcher-set", "a=b"), "--launcher-set goes with"),
    (("--launcher", "submitit", "--launcher-set", "a"), "name=value"),
    (("--launcher", "submitit", "--launcher-set", "speed=3"), "submitit does not take"),
    (("--launcher", "submitit", "--launcher-set", "cluster=moon"), "no executor named moon"),
    (("--launcher", "submitit", "--launcher-set", "timeout_min=x"), "expected int not that"),
])
def test_bad_input_is_one_line(launcher, data, tmp_path, options, said) -> None:
    result = invoke(data, tmp_path / "out", *options)
    assert result.exit_code == 2 and said in result.output
    assert len([line for line in result.output.split("\n") if "Error" in line]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("word, said", [
    ("speed=3", "prefixed by an executor"), ("timeout_min=x", "does not take"),
    ("cluster=moon", "moon"), ("cluster=local", "would start all 2 runs"),
])
def test_what_submitit_refuses_leaves_no_folder(word, said, data, tmp_path) -> None:
    pytest.importorskip("submitit")
    words = ("--launcher", "submitit", "--launcher-set", word, "--seeds", "0-1", "--jobs", "1")
    result = invoke(data, tmp_path / "out", *words)
    assert result.exit_code == 2 and said in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_without_submitit_it_says_what_to_install(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    result = invoke(data, tmp_path / "out", "--launcher", "submitit")
    assert result.exit_code == 2 and "install pyro_scenes[cluster]" in result.output


def test_another_sweeps_folder_is_left_as_it_is(tmp_path) -> None:
    cell, = sweep.cells([], (0,), tmp_path, **COMMON)
    finished(cell, 1.0, {})
    write_json(Path(cell.out) / "config.json", cell.config().to_dict())
    (Path(cell.out) / "checkpoint.pt").touch()
    (tmp_path / "sweep.json").write_text("precious")
    words = ["--model", "conv-vae", "--data", "multi-dsprites", "--seeds", "0", "--images", "4",
             "--particles", "2", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(command, [*words, "--steps", "4"])
    assert result.exit_code == 2 and "other settings" in result.stderr, result.output
    assert (tmp_path / "sweep.json").read_text() == "precious"
    result = CliRunner().invoke(command, [*words, "--steps", "3"])
    assert result.exit_code == 0 and "1 done already" in result.stdout, result.output
