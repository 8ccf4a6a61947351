"""Several processes at one run: `torchrun --nproc-per-node N bin/svi-train ...`.

torchrun starts N copies of a command and tells each its rank. Here they find each other, and have
the few operations that the rest of the package needs. In one process each of these is what it says
without the others: `mean` gives back what it gets, and so on.

- Every rank takes its part of each batch, `part`, and `Loss` inside DistributedDataParallel
  averages the gradients. What an objective reads of a whole batch it takes from all ranks.
- Rank 0 alone writes files and speaks.
- What is to be computed for many items, an evaluation, is shared out by `mapped`.
- Randomness is a function of the seed, the step and the rank, see `seed`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pyro_scenes.errors import Terminated, UserError

T = TypeVar("T")
R = TypeVar("R")
# What torchrun tells each process.
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long the others wait for one: looks at held-out images and saving are done at once.
TIMEOUT = timedelta(minutes=30)
# Seconds that a rank which lost the others waits for each of them to say so too.
ROLL_CALL = 5.0
# Seconds that another rank than 0 leaves to rank 0 to say what is wrong, and to save.
DEFERENCE = 2.0

_apart: Any = None  # the group of batch normalisation: its order and the gradients' are their own


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in TOLD) and int(os.environ["WORLD_SIZE"]) > 1


def world() -> int:
    """How many processes work together, here and now."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 speaks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def session(device: str) -> Iterator[None]:
    """Work with the other processes of torchrun, if there are any.

    An error that all have is told by rank 0, any other by the rank that has it. When a process
    dies, one of those left says which it was.

    :param device: auto, cpu or cuda: tensors of a GPU travel by NCCL, others by gloo.
    :raises UserError: if there are more processes than GPUs; and when another process died.
    """
    global _apart
    if not launched():
        yield
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    store, own, size = next(iter(dist.rendezvous("env://")))
    try:
        if cuda:
            local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= cards:
                raise UserError(f"there are more processes than the {cards} GPUs of this machine")
            torch.cuda.set_device(local)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=own, world_size=size,
            timeout=TIMEOUT,
        )
        _apart = dist.new_group()
        yield
        dist.barrier(_apart)
        dist.destroy_process_group()
    except KeyboardInterrupt as interrupt:
        if own:
            _leave(143 if isinstance(interrupt, Terminated) else 130)
        raise
    except (UserError, OSError, MemoryError) as error:
        if not own:
            store.set("told", "1")
            raise
        _deaf()
        if _came(store, "told", DEFERENCE):
            _leave(2)
        store.set("told", "1")
        raise UserError(f"rank {own}: {error}") from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(_obituary(store, own, size)) from error


def _obituary(store: Any, own: int, size: int) -> str:
    """Which ranks are gone; ends this process if another one says so, or an error of its own."""
    _deaf()
    silent = []
    try:
        store.set(f"alone {own}", "1")
        silent = [r for r in range(size) if r != own and not _came(store, f"alone {r}", ROLL_CALL)]
        if store.check(["told"]) or store.add("obituary", 1) > 1:
            sys.exit(2)
    except dist.DistError:
        pass  # the store is gone, with whoever held it
    who = " and ".join(f"rank {r}" for r in silent) or "another process"
    return (f"{who} died, which ended all {size} processes: of a training the last checkpoint is"
            " kept, and --resume goes on from it, with any number of processes")


def _deaf() -> None:
    """Hear no signal any more: torchrun sends some to all that are left when one process ends."""
    for known in (signal.SIGINT, signal.SIGTERM):
        signal.signal(known, signal.SIG_IGN)


def _leave(status: int) -> NoReturn:
    """End without a word, when rank 0 has had the time for its own."""
    _deaf()
    time.sleep(DEFERENCE)
    sys.exit(status)


def _came(store: Any, key: str, patience: float) -> bool:
    """Whether a key is there before patience ends; store.wait would print its own warnings."""
    deadline = time.monotonic() + patience
    while not store.check([key]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return store.check([key])


# --- operations -----------------------------------------------------------------------------------


def seed(*parts: int) -> int:
    """A seed for torch from whole numbers >= 0, such as a run's seed, a step and a rank."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def part(index: np.ndarray) -> np.ndarray:
    """This rank's part of the images of a batch; the parts are as long as each other.

    :param index: (B,), B a multiple of the number of processes.
    """
    return index.reshape(world(), -1)[rank()]


def total(values: Tensor) -> Tensor:
    """The sum over ranks."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """What all ranks have, one after the other; of the same shape on each."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def mean(figures: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of each figure; the same names on each rank."""
    if world() == 1:
        return figures
    values = total(torch.tensor(list(figures.values()), dtype=torch.double))
    return dict(zip(figures, (values / world()).tolist(), strict=True))


def agreed(wish: bool) -> bool:
    """Whether any rank wishes it."""
    return wish if world() == 1 else bool(total(torch.tensor(int(wish))))


def shared(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank. :raises UserError: on every rank, if rank 0 does."""
    return mapped(lambda _: make(), [None])[0]


def mapped(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``function`` of each item, in order, on every rank: computed in turns, then exchanged.

    :raises UserError: on every rank, if it is raised on one.
    """
    if world() == 1:
        return [function(item) for item in items]
    found: list[R] = []
    wrong: str | None = None
    try:
        for item in items[rank()::world()]:
            found.append(function(item))
    except UserError as error:
        wrong = str(error)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, (found, wrong))
    for _, message in parts:
        if message is not None:
            raise UserError(message)
    return [parts[i % world()][0][i // world()] for i in range(len(items))]


# --- gradients ------------------------------------------------------------------------------------


class Loss(nn.Module):
    """The loss of a step as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, objective: Any, model: nn.Module):
        super().__init__()
        self.objective, self.model, self.others = objective, model, objective.modules
        # DistributedDataParallel is told to look for parameters without a gradient, and complains
        # about a step in which it finds none.
        self.idle = nn.Parameter(torch.zeros(1, device=next(model.parameters()).device))

    def forward(self, x: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.objective.loss(self.model, x, step)


def parallel(objective: Any, model: nn.Module) -> DistributedDataParallel:
    """`Loss` with gradients averaged over ranks; all start from rank 0's parameters and buffers.

    Which parameters a step trains differs: location maps rest, parts may show no object.
    """
    return DistributedDataParallel(Loss(objective, model), find_unused_parameters=True)


def backward(loss: DistributedDataParallel, x: Tensor, step: int) -> dict[str, float]:
    """What ``objective.backward`` does, of a batch in parts: gradients, and figures to log."""
    value, figures = loss(x, step)
    value.backward()
    inner: Any = loss.module
    inner.objective.settle(inner.model, len(x))
    return mean(figures)


def synced(model: nn.Module) -> nn.Module:
    """Let batch normalisation, in place, read the batches of all ranks."""
    if world() > 1:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    setattr(parent, name, SyncedBatchNorm(child))
    return model


class SyncedBatchNorm(_BatchNorm):
    """Batch normalisation over the batches of all ranks, which may be of any sizes, empty too.

    torch.nn.SyncBatchNorm does the same on GPUs alone.
    """

    def __init__(self, like: _BatchNorm):
        super().__init__(like.num_features, like.eps, like.momentum)
        self.weight, self.bias = like.weight, like.bias
        self.load_state_dict(like.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, ...) -> the same shape."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes, shape = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        size = wide.new_full((1,), x.numel() / self.num_features)
        *sums, number = _Total.apply(torch.cat([wide.sum(axes), size])).split(
            [self.num_features, 1]
        )
        number = number.clamp(min=1.0)
        middle = sums[0] / number
        centred = wide - middle.view(shape)
        variance = _Total.apply(centred.square().sum(axes)) / number
        self._follow(middle.detach(), (variance * number / (number - 1).clamp(min=1.0)).detach())
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, middle: Tensor, variance: Tensor) -> None:
        """The running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(middle.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # any will do


class _Total(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=_apart)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=_apart)
        return gradient
