"""The commands under torchrun: one log, one line when it ends early, and which process died."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyro_scenes import checkpoint

ROOT = Path(__file__).parents[1]
PATIENCE = 400.0  # seconds, on a busy machine
TINY = ("grid_width=8", "batch_size=4", "log_every=1", "eval_images=2", "checkpoint_every=1",
        "eval_every=1000000")

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@pytest.fixture
def data(squares: Path) -> Path:
    return squares


def torchrun(command: str, *arguments: object) -> subprocess.Popen:
    """Two processes of a command, in a process group of their own with torchrun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "bin" / command), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )


def train(data: Path, out: Path, *options: object) -> subprocess.Popen:
    settings = [word for setting in TINY for word in ("--set", setting)]
    return torchrun("svi-train", "--model", "conv-vae", "--data", data, "--out", out,
                    "--device", "cpu", *settings, *options)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def interrupted(data: Path, out: Path, act: Callable[[subprocess.Popen], None]) -> tuple:
    """What a long training says when something happens to it after its first checkpoint."""
    process = train(data, out, "--steps", 1_000_000)
    deadline = time.monotonic() + PATIENCE
    while not (out / "history.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if process.poll() is None:
        act(process)
    return ended(process)


def kill_rank_1(process: subprocess.Popen) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


def our_lines(err: str) -> list[str]:
    return [line for line in err.split("\n") if line.startswith(("Error", "Interrupted", "Termin"))]


def test_a_dead_process_ends_the_run_which_is_kept(data, tmp_path) -> None:
    status, _, err = interrupted(data, tmp_path, kill_rank_1)
    assert status != 0
    line, = our_lines(err)
    assert line.startswith("Error: rank 1 died") and "the last checkpoint is kept" in line
    kept = checkpoint.load(tmp_path)
    assert kept.step >= 1 and all(p.isfinite().all() for p in kept.model.parameters())


@pytest.mark.parametrize("act", [
    lambda process: os.killpg(process.pid, signal.SIGINT),  # Ctrl-C in a terminal
    lambda process: os.kill(process.pid, signal.SIGTERM),
])
def test_an_interruption_saves_the_same_step_everywhere_and_says_one_line(
    data, tmp_path, act
) -> None:
    status, _, err = interrupted(data, tmp_path, act)
    assert status != 0
    line, = our_lines(err)
    assert "--resume goes on" in line
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["loss"][0] == list(range(1, checkpoint.load(tmp_path).step + 1))


def test_a_run_and_its_evaluation_say_everything_once(data, tmp_path) -> None:
    status, out, err = ended(train(data, tmp_path / "run", "--steps", 3))
    assert status == 0, err
    assert out.count("held-out scenes") == out.count("Picture:") == 1
    assert err.count("conv-vae: 100%") >= 1 and "find_unused" not in err
    arguments = ("svi-eval", tmp_path / "run", "--data", data, "--particles", 30, "--device", "cpu")
    status, out, err = ended(torchrun(*arguments, "--json", tmp_path / "two.json"))
    assert status == 0, err
    assert out.count("-log p(x) <= (nats)") == 2  # of the table and of the curve
    one = subprocess.run(
        [sys.executable, ROOT / "bin" / "svi-eval", *map(str, arguments[1:]), "--chunk-seeds",
         "--json", tmp_path / "one.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=PATIENCE,
    )
    assert one.returncode == 0, one.stderr
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_an_error_of_all_processes_is_told_once(data, tmp_path) -> None:
    status, out, err = ended(train(data, tmp_path / "run", "--set", "batch_size=5"))
    assert status != 0 and out == ""
    assert our_lines(err) == ["Error: batch_size 5 does not divide into parts for 2 processes"]
    assert "pyro_scenes/training.py" not in err  # torchrun's own traceback there is
