"""What happens to a training when the machine, the disk or its user lets it down."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pyro_scenes import checkpoint, cli
from pyro_scenes.config import make_config
from pyro_scenes.errors import Terminated, UserError
from pyro_scenes.files import alone_in, atomic_write, write_json
from pyro_scenes.training import Run, train

ROOT = Path(__file__).parent.parent
# A step takes milliseconds, and so does a checkpoint.
TINY = ("grid_width=8", "grid_latent=2", "grid_stages=2", "networks=auxiliary", "batch_size=4",
        "eval_images=2", "log_every=1", "eval_every=1000", "checkpoint_every=2",
        "precision=float32")
STEPS = 6
# Trains in a process of its own, and says each step that it did.
SCRIPT = """
import sys, torch
from pathlib import Path
from pyro_scenes.config import make_config
from pyro_scenes.training import train
torch.set_num_threads(1)
data, out, steps, *settings = sys.argv[1:]
train(make_config("conv-vae", data, settings=settings, steps=int(steps)), Path(out), resume=True,
      device="cpu", progress=False, on_record=lambda run, figures: print(run.step, flush=True))
"""


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "noise.npz"
    images = np.random.default_rng(0).integers(0, 2, (24, 8, 8, 1), np.uint8) * np.uint8(255)
    np.savez(path, images=images)
    return str(path)


def configured(data: str, *settings: str, steps: int = STEPS):
    return make_config("conv-vae", data, settings=TINY + settings, steps=steps)


def run(data: str, out: Path, *settings: str, steps: int = STEPS, **options):
    return train(configured(data, *settings, steps=steps), out, device="cpu", progress=False,
                 **options)


def begin(data: str, out: Path, steps: int) -> subprocess.Popen:
    """The script in a process, which has not come to its first step yet."""
    words = [sys.executable, "-c", SCRIPT, data, str(out), str(steps), *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def command(data: str, out: Path, steps: int = STEPS, *words: str) -> list[str]:
    settings = [word for setting in TINY for word in ("--set", setting)]
    return ["--model", "conv-vae", "--data", data, "--out", str(out), "--steps", str(steps),
            "--device", "cpu", *settings, *words]


def last_line(result) -> str:
    """What a failed command says, after its progress."""
    assert "Traceback" not in result.output
    return result.stderr.splitlines()[-1]


def same(one: object, two: object) -> bool:
    """Whether nested containers are alike, tensors to the bit."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def state(out: Path) -> dict:
    """All that a run has come to, but for the time that it took."""
    content = checkpoint.read(out / checkpoint.FILE)
    content["training"].pop("seconds")
    return content


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act) -> None:
    """Do something when so many steps are done."""
    advance = Run.advance

    def wrapped(run: Run) -> dict:
        if run.step == step:
            act(run)
        return advance(run)

    monkeypatch.setattr(Run, "advance", wrapped)


# --- killed --------------------------------------------------------------------------------------


def killed_again_and_again(data: str, folder: Path, kills: int, seed: int) -> None:
    steps, chance = 8 * kills, random.Random(seed)
    reached = 0
    for _ in range(kills):
        with begin(data, folder / "killed", steps) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 7)):
                assert process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))  # somewhere in a step, or in a checkpoint
            process.kill()
            assert process.wait() == -signal.SIGKILL
        for name in ("config.json", "history.json"):
            path = folder / "killed" / name
            assert not path.exists() or json.loads(path.read_text())
        if (folder / "killed" / checkpoint.FILE).exists():
            kept = checkpoint.load(folder / "killed")
            assert reached <= kept.step < steps
            reached = kept.step
    assert reached  # it got somewhere between the kills
    run(data, folder / "killed", steps=steps, resume=True)
    run(data, folder / "whole", steps=steps)
    assert same(state(folder / "killed"), state(folder / "whole"))
    names = {checkpoint.FILE, "config.json", "history.json"}
    for out in ("killed", "whole"):
        assert {path.name for path in (folder / out).iterdir()} == names
    one, two = (folder / out / "history.json" for out in ("killed", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_that_is_killed_loses_nothing(data: str, tmp_path: Path) -> None:
    killed_again_and_again(data, tmp_path, 4, seed=0)


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_loses_nothing(data: str, tmp_path: Path) -> None:
    killed_again_and_again(data, tmp_path, 50, seed=1)


def test_states_that_differ_are_seen(data: str, tmp_path: Path) -> None:
    """The comparison above would see a step more, and a seed."""
    run(data, tmp_path / "one")
    run(data, tmp_path / "two", steps=STEPS + 1)
    assert not same(state(tmp_path / "one"), state(tmp_path / "two"))


def test_what_kills_in_a_write_leave_behind_is_mended(data: str, tmp_path: Path) -> None:
    """A checkpoint without its history, and files that were begun; others' files are kept."""
    run(data, tmp_path / "out")
    history = tmp_path / "out" / "history.json"
    content = history.read_bytes()
    history.unlink()
    for name in (".checkpoint.pt.1.tmp", ".history.json.23.tmp", ".figures.json.1.tmp"):
        (tmp_path / "out" / name).write_text("half of")
    run(data, tmp_path / "out", resume=True)
    assert history.read_bytes() == content
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".figures.json.1.tmp"]


@pytest.mark.parametrize("sent, status, said", [
    (signal.SIGTERM, 143, "Terminated. The same command with --resume goes on with the run in "),
    (signal.SIGINT, 130, "Interrupted. The same command with --resume goes on with the run in "),
])
def test_a_signal_to_the_command_keeps_the_step_and_says_one_line(
    data: str, tmp_path: Path, sent: signal.Signals, status: int, said: str
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, str(ROOT / "bin" / "svi-train"), *command(data, out, 100_000)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not (out / checkpoint.FILE).exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == status
    lines = error.replace("\r", "\n").splitlines()
    assert lines[-1] == f"{said}{out}." and "Traceback" not in error
    kept = checkpoint.load(out)
    assert kept.training is not None and kept.training["history"]["loss"][0][-1] == kept.step


def test_sigterm_outside_of_the_steps_is_one_line_too(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*arguments: object, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("pyro_scenes.data.make", terminated)
    result = CliRunner().invoke(cli.make_scenes, ["multi-dsprites", "--out", "new.npz"])
    assert (result.exit_code, result.stderr) == (143, "Terminated.\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_in_a_training_is_told_from_ctrl_c(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 3, lambda run: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Terminated):
        run(data, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").step == 4


# --- two trainings -------------------------------------------------------------------------------


def test_a_second_training_in_a_folder_is_refused(data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with begin(data, out, 100_000) as first:
        assert first.stdout is not None
        for _ in range(3):
            first.stdout.readline()
        for options in ([], ["--resume"], ["--force"]):
            result = CliRunner().invoke(cli.train, command(data, out, 100_000, *options))
            assert result.exit_code == 2
            assert result.stderr == (f"Error: {out} is in use by another training: wait for it, or"
                                     " give another --out\n")
        assert first.poll() is None
        first.kill()
    assert checkpoint.load(out).step >= 2
    with alone_in(out):  # no lock was left behind
        pass


def test_two_trainings_that_make_the_same_folder_do_not_share_it(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other made it while this one made its model."""
    out, before = tmp_path / "out", Run.__init__

    def slow(self: Run, *arguments) -> None:
        before(self, *arguments)
        out.mkdir()
        write_json(out / checkpoint.FILE, {"of": "the other"})

    monkeypatch.setattr(Run, "__init__", slow)
    with pytest.raises(UserError, match="cannot be made: File exists"):
        run(data, out)
    assert json.loads((out / checkpoint.FILE).read_text()) == {"of": "the other"}


def test_a_folder_is_free_again_after_a_training(data: str, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    run(data, tmp_path / "out", force=True)


# --- files that cannot be written or are gone ----------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process end after 2 KiB, fewer than a checkpoint has.

    A file that pytest itself reports to would end there too: not for longer than a command.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with ExitStack() as stack:
        before_step(monkeypatch, 3, lambda run: stack.enter_context(full_disk()))
        result = CliRunner().invoke(cli.train, command(data, out))
    assert result.exit_code == 2
    assert last_line(result) == f"Error: {out / checkpoint.FILE}: File too large"
    assert checkpoint.load(out).step == 2
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_late_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError) as error:
        with atomic_write(path) as file:
            file.write(b"new")
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stops in between would keep the name of an empty file."""
    done: list = []
    path = tmp_path / "file"
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_size) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("named") or replace(*names))
    with atomic_write(path) as file:
        file.write(b"new")
    assert done == [3, "named"] and path.read_bytes() == b"new"


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which nobody may write: root may everywhere, so the test is not root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("out, said", [
    ("new", "new cannot be made: Permission denied"), (".", "config.json: Permission denied")])
def test_a_folder_that_is_read_only_is_one_line(
    data: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    out: str, said: str,
) -> None:
    assert CliRunner().invoke(cli.train, command(data, tmp_path / "out")).exit_code == 0
    loaded, folder = Run.__init__, []

    def change(self: Run, *arguments) -> None:
        """All that a training reads is read: from here on the user is one who may not write."""
        loaded(self, *arguments)
        folder.append(request.getfixturevalue("read_only"))
        os.chdir(folder[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "__init__", change)
    result = CliRunner().invoke(cli.train, command(data, Path(out)))
    assert result.exit_code == 2
    assert last_line(result) == f"Error: {said}"
    assert list(folder[0].iterdir()) == []


def test_a_run_whose_folder_vanishes_is_one_line(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before_step(monkeypatch, 3, lambda run: shutil.rmtree(out))
    result = CliRunner().invoke(cli.train, command(data, out))
    assert result.exit_code == 2
    assert last_line(result) == f"Error: {out / checkpoint.FILE}: No such file or directory"


def test_data_that_vanish_are_one_line_and_the_run_is_kept(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a training they are in memory; the figures at its end need them again."""
    out = tmp_path / "out"
    before_step(monkeypatch, 3, lambda run: Path(data).unlink())
    result = CliRunner().invoke(cli.train, command(data, out))
    assert result.exit_code == 2 and str(data) in last_line(result)
    assert last_line(result).startswith("Error: no data set and no file is called ")
    assert checkpoint.load(out).step == STEPS
    again = CliRunner().invoke(cli.train, command(data, out, STEPS, "--resume"))
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1) and str(data) in again.stderr


# --- numbers that are not finite -----------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_step_and_the_images(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 images, 5 batches of 4 an epoch: the 8th step is the third of the second epoch."""
    def poison(run: Run) -> None:
        next(run.model.parameters()).data.fill_(float("nan"))

    before_step(monkeypatch, 7, poison)
    with pytest.raises(UserError) as error:
        run(data, tmp_path / "out", steps=20)
    order = np.random.default_rng([0, 1]).permutation(23)[8:12]
    assert str(error.value).startswith(
        "the loss is not finite at step 8, batch 3 of 5 in epoch 2, images "
        f"{order[0]}, {order[1]}, {order[2]}, {order[3]} from 0: the last good checkpoint is kept")
    assert checkpoint.load(tmp_path / "out").step == 6


def test_weights_that_are_not_finite_are_not_saved(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step from a finite loss may lead there."""
    advance = Run.advance

    def diverging(run: Run) -> dict:
        figures = advance(run)
        if run.step == 4:
            next(run.model.parameters()).data[0] = float("inf")
        return figures

    monkeypatch.setattr(Run, "advance", diverging)
    with pytest.raises(UserError, match="a weight is not finite after step 4: the last good"):
        run(data, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").step == 2


def test_a_bad_loss_is_not_tried_again_with_other_numbers(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def poison(run: Run) -> None:
        seen.append(run.step)
        next(run.model.parameters()).data.fill_(float("nan"))

    before_step(monkeypatch, 3, poison)
    for _ in range(2):  # nor by going on
        with pytest.raises(UserError, match="not finite at step 4, batch 4 of 5 in epoch 1"):
            run(data, tmp_path / "out", resume=True)
    assert seen == [3, 3]
