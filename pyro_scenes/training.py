"""The training loop: batches in, checkpoints out, interrupted and resumed without loss.

On the CPU a resumed run ends with the same bits as one that was never interrupted: the state of
the optimiser and of the random generators is kept, and the batch of each step follows from the
seed and the step alone. Several processes (see `distributed`) take the same batches in parts, and
the random numbers of each follow from the seed, the step and its rank: a run goes on with any
number of processes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pyro_scenes import checkpoint, distributed
from pyro_scenes.config import RunConfig
from pyro_scenes.data import DATASETS, SceneData, load, make, split_held_out
from pyro_scenes.errors import Terminated, UserError
from pyro_scenes.evaluate import look
from pyro_scenes.files import alone_in, read_json, remove_unfinished, write_json
from pyro_scenes.machine import described, seeded
from pyro_scenes.objectives import objective, temporarily

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True), "adamax": torch.optim.Adamax
}
History = dict[str, tuple[list[int], list[float]]]  # name of a series -> its steps and values


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    mnist: Path | None = None,
    progress: bool = True,
    on_record: Callable[[Run, dict[str, float]], None] | None = None,
) -> History:
    """Train a model in the folder ``out``: checkpoint.pt, config.json and history.json.

    :param on_record: is told what has just been added to the run's history.
    :raises UserError: for bad settings or data, a run that is there already without ``resume`` or
        ``force``, others' files of the same names, a resumed run with other settings, another
        training in the folder, and a loss that is not finite.
    :raises KeyboardInterrupt: after the last step was saved; Terminated for SIGTERM.
    :raises OSError: where a file cannot be written; the last one that was is kept.
    """
    path = out / checkpoint.FILE
    with ExitStack() as stack:
        there = out.exists()

        def enter() -> dict | None:
            if there:
                stack.enter_context(alone_in(out))
            kept = _resumable(path, config) if resume and path.exists() else None
            if kept is None and path.exists() and not force:
                raise UserError(
                    f"{out} holds a run already: use --resume, --force or another --out"
                )
            if kept is None and not force:
                _check_own(out)
            return kept

        def begin() -> None:
            if not there:
                try:
                    out.mkdir(parents=True)  # fails if another training has made it meanwhile
                except OSError as error:
                    raise UserError(f"{out} cannot be made: {error.strerror}") from error
                stack.enter_context(alone_in(out))
            for name in (checkpoint.FILE, checkpoint.CONFIG, checkpoint.HISTORY):
                remove_unfinished(out / name)
            if kept is None:  # else a run stopped before its first checkpoint would have another's
                for name in (checkpoint.FILE, checkpoint.HISTORY):
                    (out / name).unlink(missing_ok=True)
            write_json(out / checkpoint.CONFIG, config.to_dict())
            if kept is not None:  # A process that was killed may have written one file, not both.
                write_json(out / checkpoint.HISTORY, run.history)
                if checkpoint.configuration(kept).data != config.data:  # its file was moved
                    run.save(out)

        kept = distributed.shared(enter)
        run = Run(config, device, mnist)
        run.on_record = on_record
        if kept is not None:
            run.restore(kept, path)
        elif config.start:
            run.start()
        distributed.shared(begin)
        run.loop(out, progress)
        return run.history


class Run:
    """A model in training, with all that a checkpoint of it holds.

    :raises UserError: if settings do not suit the data or the machine, or the data cannot be read.
    """

    def __init__(self, config: RunConfig, device: str = "auto", mnist: Path | None = None):
        self.config = config
        settings = config.train
        self.device = checkpoint.resolve(device)
        self.data, self.held_out, self.images = _data(config, mnist)
        if settings.batch_size > len(self.data):
            raise UserError(
                f"batch_size {settings.batch_size} is more than the {len(self.data)} images there"
                f" are to train on: use --set batch_size={len(self.data)} or less"
            )
        if settings.batch_size % distributed.world():
            raise UserError(
                f"batch_size {settings.batch_size} does not divide into parts for"
                f" {distributed.world()} processes"
            )
        height, width, channels = self.data.shape
        torch.manual_seed(config.seed)
        self.model = checkpoint.build(config, (channels, height, width))
        distributed.synced(self.model).to(self.device)
        self.model.check(self.data.batch(slice(0, 1)))
        self.objective = objective(config.model)(config.schedule, self.model, settings.steps)
        distributed.synced(self.objective.modules).to(self.device)
        groups: dict[str, list[nn.Parameter]] = self.model.groups() | {
            name: list(module.parameters()) for name, module in self.objective.modules.items()
        }
        self.names = list(groups)
        options: dict[str, Any] = {"betas": (0.9, settings.beta2)}
        self.optimizer = OPTIMIZERS[settings.optimizer](
            [{"params": parameters} for parameters in groups.values()], lr=1e-3, **options
        )
        self.bfloat16 = _bfloat16(settings.precision, self.device)
        self.step = 0
        self.seconds = 0.0
        self.machine = described(self.device)
        if distributed.world() > 1:
            self.machine += f", {distributed.world()} processes"
        self.parallel: DistributedDataParallel | None = None
        self.history: History = {}
        self.on_record: Callable[[Run, dict[str, float]], None] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def loop(self, out: Path, progress: bool = True) -> None:
        """Go on to the last step.

        :raises KeyboardInterrupt, Terminated: when told to stop, with what was done kept.
        :raises UserError: if the loss is not finite.
        """
        settings = self.config.train
        started = time.perf_counter() - self.seconds
        shown: dict[str, float] = {}
        figures: dict[str, float] = {}
        with (
            _signals(patient=distributed.world() > 1) as stop,
            pyro.validation_enabled(False),
            tqdm(
                total=settings.steps,
                initial=self.step,
                desc=self.config.model,
                unit="step",
                disable=not progress or distributed.rank() > 0,
                dynamic_ncols=True,
            ) as bar,
        ):
            stopping = False
            while self.step < settings.steps and not stopping:
                logged = self.advance()
                stopping = distributed.agreed(bool(stop))
                self.seconds = time.perf_counter() - started
                bar.update()
                last = self.step == settings.steps
                if self.step % settings.log_every == 0 or last:
                    self._record(logged)
                    shown = dict([next(iter(logged.items()))])  # the loss, whatever its name
                if self.step % settings.eval_every == 0 or last:
                    figures |= self.look()
                if self.step % settings.log_every == 0 or last:
                    bar.set_postfix({k: f"{v:.4g}" for k, v in (shown | figures).items()})
                if self.step % settings.checkpoint_every == 0 or last or stopping:
                    self.save(out)
            if distributed.agreed(bool(stop)):
                self.save(out)
                terminated = distributed.agreed(stop[:1] == [signal.SIGTERM])
                raise Terminated if terminated else KeyboardInterrupt

    def advance(self) -> dict[str, float]:
        """One step. :raises UserError: before anything is changed, if the loss is not finite."""
        if event := self.objective.events.get(self.step):
            with seeded(distributed.seed(self.config.seed, self.step), self.device):
                event(self.model, self.data)
        x = self.batch(self.step)
        rates = self.objective.learning_rates(self.step)
        for group, name in zip(self.optimizer.param_groups, self.names, strict=True):
            group["lr"] = rates[name]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with temporarily(self.model, autocast=self.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # said below
            figures = self._backward(x)
        largest = self.config.train.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        for name, value in (*figures.items(), ("gradient", float(norm))):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is not finite at step {self.step + 1},"
                    f" {self._described(self.step)}: the last good checkpoint is kept; try a new"
                    " run with a lower learning rate, or look at the data"
                )
        self.optimizer.step()
        self.step += 1
        return figures

    def _backward(self, x: Tensor) -> dict[str, float]:
        """Gradients of a step, of all processes; figures to log, the same in each."""
        if distributed.world() == 1:
            return self.objective.backward(self.model, x, self.step)
        if self.parallel is None:
            self.parallel = distributed.parallel(self.objective, self.model)
        torch.manual_seed(distributed.seed(self.config.seed, self.step, distributed.rank()))
        return distributed.backward(self.parallel, x, self.step)

    def batch(self, step: int) -> Tensor:
        """The images of a step, (B, C, H, W); of several processes each has its part of them."""
        return self.data.batch(distributed.part(self._index(step))).to(self.device)

    def _index(self, step: int) -> np.ndarray:
        """The numbers of a step's images, (B,): a new order each epoch, known from the seed."""
        size = self.config.train.batch_size
        epoch, position = divmod(step, len(self.data) // size)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.data))
            self._order = epoch, order
        return self._order[1][position * size : (position + 1) * size]

    def _described(self, step: int) -> str:
        """The batch of a step in words, for whoever looks for the image that does harm."""
        batches = len(self.data) // self.config.train.batch_size
        epoch, position = divmod(step, batches)
        numbers = ", ".join(map(str, self._index(step)))
        return f"batch {position + 1} of {batches} in epoch {epoch + 1}, images {numbers} from 0"

    def look(self) -> dict[str, float]:
        """Figures on held-out images; draws no random numbers of the training's."""
        self.model.eval()
        figures = look(self.model, self.held_out[: self.config.train.eval_images])
        self._record(figures)
        return figures

    def _record(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            steps, values = self.history.setdefault(name, ([], []))
            steps.append(self.step)
            values.append(float(value))
        if self.on_record and distributed.rank() == 0:
            self.on_record(self, figures)

    def save(self, out: Path) -> None:
        """Write the run into its folder, from rank 0.

        :raises UserError: if a weight is not finite.
        :raises OSError: if a file cannot be written, or the folder is gone.
        """
        if distributed.rank() > 0:
            return
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise UserError(
                f"a weight is not finite after step {self.step}: the last good checkpoint is kept;"
                " try a new run with a lower learning rate"
            )
        training = {
            "optimizer": self.optimizer.state_dict(),
            "modules": self.objective.modules.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "seconds": self.seconds,
            "machine": self.machine,
            "history": self.history,
            "images": self.images,
        }
        if not out.is_dir():  # removed, and with it the lock: it is not made anew
            missing = errno.ENOENT
            raise FileNotFoundError(missing, os.strerror(missing), str(out / checkpoint.FILE))
        checkpoint.save(out / checkpoint.FILE, self.config, self.model, self.step, training)
        write_json(out / checkpoint.HISTORY, self.history)

    def start(self) -> None:
        """Take the weights of the checkpoint that the configuration says.

        :raises UserError: if they do not fit.
        """
        # Read once: with --force it may be what the run takes the place of.
        state = distributed.shared(
            lambda: checkpoint.load(self.config.start).model.state_dict()
        )
        try:
            self.model.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"the weights of {self.config.start} do not fit: it has networks of other settings,"
                " or for images of another size; leave out --set of networks, or --from"
            ) from error

    def restore(self, content: dict, path: Path) -> None:
        """Go on from the content of a checkpoint of the same configuration, read from ``path``.

        :raises UserError: if it does not fit.
        """
        training = content["training"]
        if training.get("images") not in (None, self.images):
            raise UserError(
                f"{self.config.data} has other images than those that {path} was trained on: bring"
                " them back, or start a run of its own in another folder"
            )
        try:
            self.model.load_state_dict(content["model"])
            self.objective.modules.load_state_dict(training["modules"])
            self._restore_optimizer(training["optimizer"])
            torch.set_rng_state(training["random"])
            if self.device.type == "cuda":  # it may have been a machine with more devices, or fewer
                for index, state in enumerate(training["random_cuda"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(state, index)
            self.history = {k: (list(s), list(v)) for k, (s, v) in training["history"].items()}
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            raise UserError(f"{path} does not fit its own settings: it is damaged") from error
        self.step, self.seconds = content["step"], training["seconds"]

    def _restore_optimizer(self, kept: dict) -> None:
        """:raises ValueError: if what it kept of a parameter is not of its shape."""
        settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(kept)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # of the configuration, whatever the file says
        for parameter, state in self.optimizer.state.items():
            if any(value.dim() and value.shape != parameter.shape for value in state.values()):
                raise ValueError("a moment is of another shape than its parameter")


def _check_own(out: Path) -> None:
    """:raises UserError: if a run would replace files that are no run's."""
    beside = checkpoint.CONFIG, checkpoint.HISTORY, checkpoint.PICTURE
    there = [name for name in beside if (out / name).exists()]
    if there:
        try:
            RunConfig.from_dict(read_json(out / checkpoint.CONFIG))  # of one that saved nothing yet
        except UserError:
            raise UserError(
                f"{out / there[0]} is there, and of no run: give another --out, or --force"
            ) from None


def _resumable(path: Path, config: RunConfig) -> dict:
    """The content of a checkpoint. :raises UserError: if no run of ``config`` goes on from it."""
    content = checkpoint.read(path)
    # Settings that came after the run have the values that did what it did.
    kept = _flat(checkpoint.configuration(content).to_dict())
    now = _flat(config.to_dict())
    changed = sorted({name for name, _ in kept.items() ^ now.items()})
    images = (content["training"] or {}).get("images")
    if changed == ["data"] and config.data not in DATASETS and images:
        changed = []  # a file may have been moved: it is known by its images, see `restore`
    if changed:
        raise UserError(
            f"{path.parent} was trained with other settings ({', '.join(changed)}): resume with"
            " the same, or start anew with --force or another --out"
        )
    if content["training"] is None:
        raise UserError(f"{path} holds weights only and cannot be resumed")
    return content


def _data(config: RunConfig, mnist: Path | None) -> tuple[SceneData, SceneData, str | None]:
    """Training and held-out images, and the digest of all of a file's."""
    if config.data in DATASETS:
        # Not of the test set: looks during a training may guide whoever watches it.
        held_out = make(
            config.data, config.train.eval_images, seed=1, mnist=mnist, segmentation=False
        )
        return load(config.data, split="train", mnist=mnist), held_out, None
    scenes = load(config.data)
    return *split_held_out(scenes), scenes.digest()


def _bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the inference networks run in bfloat16: where the processor gains from it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _flat(values: dict, prefix: str = "") -> dict[str, str]:
    """Nested settings as "part.name" -> JSON."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value)
    return flat


@contextmanager
def _signals(patient: bool) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in a list, so that a step is finished and saved first.

    A second Ctrl-C does not wait; when ``patient`` it does: torchrun passes on what its processes
    have had from the terminal, and ends those that do not end by themselves.
    """
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        stop.append(number)
        for known, previous in before.items():
            signal.signal(known, handle if patient else previous)

    for known in (signal.SIGINT, signal.SIGTERM):
        before[known] = signal.signal(known, handle)
    try:
        yield stop
    finally:
        for known, previous in before.items():
            signal.signal(known, previous)
